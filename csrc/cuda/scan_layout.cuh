// A scan on CUDA, the host's tools for laying a call out: workspace, and inputs brought into a form that the chunks'
// kernels can load.
#pragma once

#include <algorithm>
#include <string>

#include "../scan.h"
#include "scan.cuh"

namespace writesae::cuda {

// Copies rows that the chunks' kernels cannot load as they lie (another type, odd sizes or strides) into dense ones of whole
// 16-byte units, filled up with zeros. Normalises on request. A warp per (row, token, head).
template <class T>
__global__ void __launch_bounds__(128)
    pack(View from, T* to, int64_t rows, int64_t T_, int heads, int size, int width, bool normalise) {
  const int64_t i = static_cast<int64_t>(tile::block_x()) * 4 + tile::warp();
  if (i >= rows) return;
  const int64_t head = i % heads, token = i / heads % T_, row = i / heads / T_;
  float factor = 1;
  if (normalise) {
    float squares = 0;
    for (int e = tile::lane(); e < size; e += tile::WARP) {
      const float x = read(from, row, token, head, e);
      squares += x * x;
    }
    factor = tile::reciprocal_root(tile::warp_sum(squares) + 1e-6f);
  }
  for (int e = tile::lane(); e < width; e += tile::WARP)
    tile::store_float(to + i * width + e, e < size ? factor * read(from, row, token, head, e) : 0.0f);
}

inline int64_t up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
inline int64_t parts(int64_t x, int64_t size) { return (x + size - 1) / size; }

// Hands out the workspace; with none, counts.
struct Workspace {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += up(count * static_cast<int64_t>(sizeof(T)), 256);
    return piece;
  }
};

template <class F>
auto with_type(Element type, const F& f) {
  if (type == Element::bf16) return f(bf16{});
  if (type == Element::f16) return f(f16{});
  return f(0.0f);
}

// A view as rows, where they may be loaded as they lie.
inline bool loadable(const View& x, Element type, int64_t size) {
  const int64_t each = 16 / element_size(type);
  bool whole = x.type == type && size % each == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  for (int axis = 0; axis < 3; axis++) whole = whole && x.stride[axis] % each == 0;
  return whole;
}

// The copy that makes rows of an input, where one is needed.
struct Packing {
  bool needed, normalise;
  View from;
  int heads, size;
};

// [B, T, heads, size] as rows of the type of computation; no data: rows of zeros.
inline Packing lay_rows(const View& x, Element type, int64_t B, int64_t T, int64_t heads, int64_t size, bool normalise,
                        Workspace& space, Rows& to) {
  const bool needed = x.data != nullptr && (normalise || !loadable(x, type, size));
  to = {x.data, {x.stride[0], x.stride[1], x.stride[2]}, x.data == nullptr ? 0 : static_cast<int>(size)};
  if (needed) {
    const int64_t width = up(size, 16 / element_size(type));
    to.data = space.take<char>(B * T * heads * width * element_size(type));
    to.stride[0] = T * heads * width, to.stride[1] = heads * width, to.stride[2] = width;
    to.width = static_cast<int>(width);
  }
  return {needed, normalise, x, static_cast<int>(heads), static_cast<int>(size)};
}

inline void run_packing(const Packing& one, Element type, int64_t B, int64_t T, const Rows& to, tile::Stream stream) {
  if (!one.needed) return;
  const int64_t count = B * T * one.heads;
  with_type(type, [&](auto x) {
    using E = decltype(x);
    tile::launch("scan pack", pack<E>, {static_cast<unsigned>(parts(count, 4)), 1, 1}, 128, 0, stream, one.from,
                 static_cast<E*>(const_cast<void*>(to.data)), count, T, one.heads, one.size, to.width, one.normalise);
  });
}

// Chooses segments and stages, and returns the warps of a block: by the problem's sizes and the device, where the plan does
// not say. Throws where a block would need more shared memory than the device has.
template <class Rule>
int choose_plan(Problem& p, Element type, int C, Plan plan) {
  // Enough blocks for the device first; then fewer, wider blocks, which load k and q less often.
  const int64_t heads = static_cast<int64_t>(p.N) * p.H, cores = tile::multiprocessors();
  const bool wide = Rule::ALL && type != Element::f32 && (padded_keys(p.K) == 64 || padded_keys(p.K) == 128);
  int warps = plan.warps != 0 ? plan.warps : p.V > 64 && heads * parts(p.V, 128) >= cores ? 8 : 4;
  if (!wide) warps = 4;
  const int64_t chunks = parts(p.T, C), blocks = heads * parts(p.V, 16 * warps);
  // The first walk costs about 1.3 of the second where K = V, so that two segments would gain nothing.
  p.segments = plan.segments;
  if (p.segments == 0) p.segments = static_cast<int>(std::min(cores / std::max<int64_t>(blocks, 1), chunks / 8));
  if (p.segments < (plan.segments == 0 ? 3 : 2)) p.segments = 1;
  p.segment_chunks = static_cast<int>(parts(std::max<int64_t>(chunks, 1), p.segments));
  const auto shared = [&](int stages) {
    return with_type(type, [&](auto x) { return walk_shared<Rule, decltype(x)>(p.K, warps, stages); });
  };
  const size_t limit = tile::shared_limit();
  if (warps == 8 && shared(2) > limit && plan.warps == 0) warps = 4;
  p.stages = plan.stages != 0 ? plan.stages : shared(2) <= limit ? 2 : 1;
  tile::require_shared(std::string(Rule::NAME) + ": K = " + std::to_string(p.K), shared(p.stages));
  return warps;
}

}  // namespace writesae::cuda
