// selective_scan on CUDA: what its kernels share.
//
// A block takes CHANNELS channels of one sequence and goes along its tokens, in tiles of TOKENS that lie in shared memory. A channel's
// state is spread over PARTS neighbouring lanes, EACH keys a thread, in registers; what is summed over keys is summed by shuffles.
// Tokens follow each other, one multiply-add a key apart.
//
// Counted an entry and token: one exponential, 3 multiply-adds. Predicted on an H100 (16 exponentials a multiprocessor and cycle),
// 2,048 tokens of 1,536 channels and 16 keys: 13 us of exponentials on all of it; one sequence fills 48 of 132 multiprocessors, and
// its time is that of 2,048 tokens one after the other, about 100 cycles each, 0.12 ms.
#pragma once

#include "../selective_scan.h"
#include "scan_layout.cuh"

namespace writesae::cuda::selective_scan {

// Without a number of blocks to keep, compilers give registers up for one block more.
constexpr int THREADS = 128, BLOCKS = 2;  // so many blocks a multiprocessor at least

template <int PARTS_, int EACH_>
struct Shape {
  static constexpr int PARTS = PARTS_, EACH = EACH_, KEYS = PARTS * EACH, CHANNELS = THREADS / PARTS;
  static constexpr int TOKENS = EACH > 4 ? 8 : 32;  // of a tile: a thread's states of all of them are 128 floats
  static constexpr int LD = CHANNELS + 1;
  static constexpr int ROWS = TOKENS * LD, FACTORS = TOKENS * KEYS;  // floats of a tile of channels, of keys
  static constexpr int STATES = (TOKENS + 1) * EACH * THREADS;
};

// f(the shape for so many keys).
template <class F>
void with_shape(const char* op, int64_t K, const F& f) {
  if (K > 256)
    throw std::invalid_argument(std::string(op) + ": the CUDA kernels take K up to 256, got K = " + std::to_string(K));
  if (K <= 16) return f(Shape<4, 4>{});
  if (K <= 64) return f(Shape<16, 4>{});
  f(Shape<16, 16>{});
}

struct Given {
  SelectiveScanParams in;
  int *first_place, *next_place;  // [B T], [P]: the snapshots of a token as lists of 1 + place, 0 at the end; or null
  float* starts;                  // [slots, K, V]  the state before each tile, or null
};

struct Span {
  int64_t row, origin, length, first_slot;  // its tiles have the slots first_slot..
};

template <class S>
__device__ __forceinline__ Span span_of(const SelectiveScanParams& p, int64_t n) {
  if (p.cu_seqlens == nullptr) return {n, 0, p.T, n * ((p.T + S::TOKENS - 1) / S::TOKENS)};
  const int64_t start = p.cu_seqlens[n];
  return {0, start, p.cu_seqlens[n + 1] - start, start / S::TOKENS + n};
}

template <class S>
int64_t slots(const SelectiveScanParams& p) {
  return p.cu_seqlens != nullptr ? p.T / S::TOKENS + p.N : p.N * parts(p.T, S::TOKENS);
}

// Where a thread stands.
struct Place {
  int slot, part, channel;  // of the block's channels; of the channel's threads; of all channels
  int64_t n;
};

template <class S>
__device__ __forceinline__ Place place(const SelectiveScanParams& p) {
  const int blocks = static_cast<int>((p.V + S::CHANNELS - 1) / S::CHANNELS);
  const int slot = tile::thread() / S::PARTS;
  return {slot, tile::thread() % S::PARTS, tile::block_x() % blocks * S::CHANNELS + slot, tile::block_x() / blocks};
}

// f(data) with a view's numbers in their type, from element (a, b, c) on; of none, with null.
template <class F>
__device__ __forceinline__ void with_data(const View& x, int64_t a, int64_t b, int64_t c, const F& f) {
  const int64_t offset = x.data == nullptr ? 0 : a * x.stride[0] + b * x.stride[1] + c * x.stride[2];
  if (x.type == Element::bf16) return f(static_cast<const bf16*>(x.data) + offset);
  if (x.type == Element::f16) return f(static_cast<const f16*>(x.data) + offset);
  f(static_cast<const float*>(x.data) + offset);
}

// Tokens [first, first + count) of the block's channels, zeros elsewhere. Threads go along whichever axis lies dense.
template <class S>
__device__ __forceinline__ void load_rows(const View& x, int64_t row, int64_t first, int count, int channel, int V,
                                          float* to) {
  with_data(x, row, first, channel, [&](const auto* from) {
    const bool turned = x.stride[2] != 1;
    const int tokens = from == nullptr ? 0 : count;
#pragma unroll 4
    for (int i = tile::thread(); i < S::TOKENS * S::CHANNELS; i += THREADS) {
      const int t = turned ? i % S::TOKENS : i / S::CHANNELS, c = turned ? i / S::TOKENS : i % S::CHANNELS;
      const bool inside = t < tokens && channel + c < V;
      to[t * S::LD + c] = inside ? tile::load_float(from + t * x.stride[1] + c * x.stride[2]) : 0.0f;
    }
  });
}

template <class S>
__device__ __forceinline__ void load_factors(const View& x, int64_t row, int64_t first, int count, int K, float* to) {
  with_data(x, row, first, 0, [&](const auto* from) {
#pragma unroll 4
    for (int i = tile::thread(); i < S::FACTORS; i += THREADS) {
      const int t = i / S::KEYS, n = i % S::KEYS;
      to[i] = t < count && n < K ? tile::load_float(from + t * x.stride[1] + n) : 0.0f;
    }
  });
}

// A thread's entries of a state [K, V], zeros where there are none, and back.
template <class S>
__device__ __forceinline__ void load_state(const float* from, const Place& at, int K, int V, float (&s)[S::EACH]) {
#pragma unroll
  for (int r = 0; r < S::EACH; r++) {
    const int n = at.part + S::PARTS * r;
    s[r] = from != nullptr && n < K && at.channel < V ? from[static_cast<int64_t>(n) * V + at.channel] : 0.0f;
  }
}

template <class S>
__device__ __forceinline__ void store_state(float* to, const Place& at, int K, int V, const float (&s)[S::EACH]) {
#pragma unroll
  for (int r = 0; r < S::EACH; r++) {
    const int n = at.part + S::PARTS * r;
    if (n < K && at.channel < V) to[static_cast<int64_t>(n) * V + at.channel] = s[r];
  }
}

template <class S>
__device__ __forceinline__ void load_rates(const SelectiveScanParams& p, const Place& at, float (&rate)[S::EACH]) {
#pragma unroll
  for (int r = 0; r < S::EACH; r++) {
    const int n = at.part + S::PARTS * r;
    rate[r] = n < p.K && at.channel < p.V ? cuda::read(p.rates, at.channel, n, 0) : 0.0f;
  }
}

// Sums over a channel's threads, and over the channels of a warp; every lane has them.
template <class S>
__device__ __forceinline__ float sum_parts(float x) {
#pragma unroll
  for (int step = S::PARTS / 2; step > 0; step /= 2) x += tile::shuffle_xor(x, step);
  return x;
}
template <class S>
__device__ __forceinline__ float sum_channels(float x) {
#pragma unroll
  for (int step = tile::WARP / 2; step >= S::PARTS; step /= 2) x += tile::shuffle_xor(x, step);
  return x;
}

// The edits of a token, [begin, end): whether its write is made, and stays.
struct Here {
  int64_t begin, end;
  bool native, kept;
};

__device__ __forceinline__ int64_t position(const EditList& edits, int64_t e) { return edits.index[4 * e + 1]; }

// Those from `begin` on that stand at t.
__device__ __forceinline__ Here edits_here(const EditList& edits, int64_t begin, int64_t limit, int64_t t) {
  Here here = {begin, begin, true, true};
  for (; here.end < limit && position(edits, here.end) == t; here.end++) {
    here.native = here.native && !edits.kind(here.end).removes();
    here.kept = here.kept && !edits.kind(here.end).removes_after();
  }
  return here;
}

// What edits add before or after the read.
template <class S>
__device__ __forceinline__ void add_edits(const SelectiveScanParams& p, const Here& here, bool after, const Place& at,
                                          float (&s)[S::EACH]) {
  for (int64_t e = here.begin; e < here.end; e++) {
    if (!p.edits.kind(e).adds() || p.edits.kind(e).after() != after) continue;
    const float right = at.channel < p.V ? p.edits.right[e * p.V + at.channel] : 0.0f;
#pragma unroll
    for (int r = 0; r < S::EACH; r++) {
      const int n = at.part + S::PARTS * r;
      if (n < p.K) s[r] += p.edits.left[e * p.K + n] * right;
    }
  }
}

// Host: lists of snapshots by token, in order of their numbers.
void run_places(const Given& g, tile::Stream stream);

}  // namespace writesae::cuda::selective_scan
