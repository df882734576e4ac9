// A scan's step: one token for every row, the state updated in place.
//
// A block per (row, value head, 32 x VECTOR value columns), 16 keys a warp: the block's part of the state is loaded once, all
// of it at once (16 loads of 16 bytes in flight a thread), stays in registers, and is stored once. r = S^T k and S^T q are
// summed over the warps through shared memory, in a fixed order.
//
// Arithmetic at K = V = 128: 64 KB read and written a (row, head), 6 FLOP an element: memory alone. 64 rows of 64 heads:
// 537 MB, 0.16 ms at an H100's 3.35 TB/s. 256 threads of about 100 registers: 2 blocks, 128 KB in flight an SM.
#pragma once

#include "scan_call.cuh"

namespace writesae::cuda {

constexpr int STEP_KEYS = 16;  // of a warp

// The sum over the block in every thread. `box` holds one float a warp.
__device__ __forceinline__ float block_sum(float x, float* box, int warps) {
  x = tile::warp_sum(x);
  tile::sync();
  if (tile::lane() == 0) box[tile::warp()] = x;
  tile::sync();
  float sum = 0;
  for (int i = 0; i < warps; i++) sum += box[i];
  return sum;
}

template <int VECTOR>
struct alignas(4 * VECTOR) Floats {
  float x[VECTOR];
};

template <class Rule, int VECTOR>
__global__ void __launch_bounds__(512) step(const __grid_constant__ ScanStepParams p) {
  constexpr int WIDTH = tile::WARP * VECTOR, KEYS = STEP_KEYS;
  const int K = static_cast<int>(p.K), V = static_cast<int>(p.V);
  const int warps = tile::block_threads() / tile::WARP, warp = tile::warp(), lane = tile::lane();
  const int tiles = (V + WIDTH - 1) / WIDTH, column = tile::block_x() % tiles * WIDTH + lane * VECTOR;
  const int64_t bh = tile::block_x() / tiles, b = bh / p.H, h = bh % p.H, hk = h / (p.H / p.Hk);
  const bool inside = column < V;  // VECTOR divides V
  // Of the warp's first key; made anew where it is needed, or 16 addresses stay in registers from the loads to the stores.
  const auto place = [&] { return p.state + (tile::fresh(bh) * K + warp * KEYS) * V + column; };
  Floats<VECTOR> s[KEYS];
  const float* from = place();
#pragma unroll
  for (int i = 0; i < KEYS; i++, from += V) {
    s[i] = {};
    if (inside && warp * KEYS + i < K) s[i] = *reinterpret_cast<const Floats<VECTOR>*>(from);
  }

  tile::Shared shared;
  float* k = shared.take<float>(warps * KEYS);
  float* q = shared.take<float>(warps * KEYS);
  float* box = shared.take<float>(warps);
  float* sums = shared.take<float>(warps * 2 * WIDTH);  // [warps][k, q][WIDTH]
  float* gates = Rule::CHANNEL ? shared.take<float>(warps * KEYS) : nullptr;
  float* erase_reads = Rule::LOW_RANK ? shared.take<float>(warps * KEYS) : nullptr;   // a
  float* erase_writes = Rule::LOW_RANK ? shared.take<float>(warps * KEYS) : nullptr;  // b
  const int i = tile::thread();
  float ki = 0, qi = 0;
  if (i < K) ki = read(p.k, b, hk, i), qi = read(p.q, b, hk, i);
  if (p.use_qk_l2norm) {  // a thread has at most one key: threads >= keys
    const float kk = block_sum(ki * ki, box, warps), qq = block_sum(qi * qi, box, warps);
    ki *= tile::reciprocal_root(kk + 1e-6f), qi *= tile::reciprocal_root(qq + 1e-6f);
  }
  qi *= p.scale;
  if (i < warps * KEYS) k[i] = ki, q[i] = qi;
  if constexpr (Rule::CHANNEL) {
    if (i < warps * KEYS) gates[i] = i < K ? tile::exponential(read(p.g, b, h, i)) : 0.0f;
  }
  float bq = 0;
  if constexpr (Rule::LOW_RANK) {
    const float ai = i < K ? read(p.a, b, h, i) : 0.0f, bi = i < K ? read(p.b, b, h, i) : 0.0f;
    if (i < warps * KEYS) erase_reads[i] = ai, erase_writes[i] = bi;
    bq = block_sum(bi * qi, box, warps);
  }
  if (p.left != nullptr && i < K && column - lane * VECTOR == 0 && h % (p.H / p.Hk) == 0)
    p.left[(b * p.Hk + hk) * K + i] = ki;
  const float kq = block_sum(ki * qi, box, warps);  // and k, q are there

  float r[VECTOR] = {}, o[VECTOR] = {};
#pragma unroll
  for (int j = 0; j < KEYS; j++) {
    const float kj = k[warp * KEYS + j], qj = q[warp * KEYS + j];
    if constexpr (Rule::LOW_RANK) {
#pragma unroll
      for (int l = 0; l < VECTOR; l++) r[l] += erase_reads[warp * KEYS + j] * s[j].x[l];
    }
    if constexpr (Rule::CHANNEL) {
#pragma unroll
      for (int l = 0; l < VECTOR; l++) s[j].x[l] *= gates[warp * KEYS + j];
    }
#pragma unroll
    for (int l = 0; l < VECTOR; l++) {
      if constexpr (Rule::READS && !Rule::LOW_RANK) r[l] += kj * s[j].x[l];
      o[l] += qj * s[j].x[l];
    }
  }
#pragma unroll
  for (int l = 0; l < VECTOR; l++) {
    sums[(warp * 2) * WIDTH + lane * VECTOR + l] = r[l];
    sums[(warp * 2 + 1) * WIDTH + lane * VECTOR + l] = o[l];
  }
  tile::sync();
#pragma unroll
  for (int l = 0; l < VECTOR; l++) {
    r[l] = o[l] = 0;
    for (int w = 0; w < warps; w++) {
      r[l] += sums[(w * 2) * WIDTH + lane * VECTOR + l];
      o[l] += sums[(w * 2 + 1) * WIDTH + lane * VECTOR + l];
    }
  }

  // Edits of this row and head, their positions ignored.
  int64_t first = 0, last = 0;
  bool native = true, kept = true;
  if (p.edits.count > 0) {
    for (first = last = first_edit(p.edits, b, h, INT64_MIN); last < p.edits.count; last++) {
      const int64_t* x = p.edits.index + 4 * last;
      if (x[0] != b || x[2] != h) break;
      native = native && !p.edits.kind(last).removes(), kept = kept && !p.edits.kind(last).removes_after();
    }
  }
  const float gate = Rule::CHANNEL ? 1.0f : tile::exponential(read(p.g, b, h, 0)), beta = read(p.beta, b, h, 0);
  float u[VECTOR];
#pragma unroll
  for (int l = 0; l < VECTOR; l++) {
    const float old = Rule::READS && !Rule::LOW_RANK ? gate * r[l] : 0.0f;
    u[l] = inside && native ? beta * (read(p.v, b, h, column + l) - old) : 0.0f;
    o[l] = gate * o[l] + kq * u[l];
    if constexpr (Rule::LOW_RANK) o[l] += bq * r[l];
  }
#pragma unroll
  for (int j = 0; j < KEYS; j++) {
    const float kj = k[warp * KEYS + j];
#pragma unroll
    for (int l = 0; l < VECTOR; l++) {
      s[j].x[l] = gate * s[j].x[l] + (kept ? kj : 0.0f) * u[l];
      if constexpr (Rule::LOW_RANK) s[j].x[l] += erase_writes[warp * KEYS + j] * r[l];
    }
  }
  for (int64_t e = first; e < last; e++) {
    if (!p.edits.kind(e).adds()) continue;
    const float* left = p.edits.left + e * K;
    const float reach = block_sum(i < K && !p.edits.kind(e).after() ? left[i] * qi : 0.0f, box, warps);
    float w[VECTOR];
#pragma unroll
    for (int l = 0; l < VECTOR; l++) w[l] = inside ? p.edits.right[e * V + column + l] : 0.0f, o[l] += reach * w[l];
#pragma unroll
    for (int j = 0; j < KEYS; j++) {
      const int key = warp * KEYS + j;
      const float side = key < K ? left[key] : 0.0f;
#pragma unroll
      for (int l = 0; l < VECTOR; l++) s[j].x[l] += side * w[l];
    }
  }
  if (!inside) return;
  float* to = place();
#pragma unroll
  for (int j = 0; j < KEYS; j++, to += V)
    if (warp * KEYS + j < K) *reinterpret_cast<Floats<VECTOR>*>(to) = s[j];
  if (warp != 0) return;
#pragma unroll
  for (int l = 0; l < VECTOR; l++) {
    write(p.o, p.o_type, bh * V + column + l, o[l]);
    if (p.right != nullptr) p.right[bh * V + column + l] = u[l];
    if constexpr (Rule::LOW_RANK) {
      if (p.erased != nullptr) p.erased[bh * V + column + l] = r[l];
    }
    if (p.first_nonfinite != nullptr && !(finite(u[l]) && (!Rule::LOW_RANK || finite(r[l]))))
      note_nonfinite(p.first_nonfinite + b, h);
  }
}

template <class Rule, int VECTOR>
void launch_step(const ScanStepParams& p, tile::Stream stream) {
  const int warps = static_cast<int>(parts(p.K, STEP_KEYS)), width = tile::WARP * VECTOR;
  const size_t shared = 2 * tile::shared_piece(warps * STEP_KEYS * 4) + tile::shared_piece(warps * 4) +
                        tile::shared_piece(warps * 2 * width * 4) +
                        ((Rule::CHANNEL ? 1 : 0) + (Rule::LOW_RANK ? 2 : 0)) * tile::shared_piece(warps * STEP_KEYS * 4);
  const auto blocks = static_cast<unsigned>(p.B * p.H * parts(p.V, width));
  tile::launch("scan step", step<Rule, VECTOR>, {blocks, 1, 1}, warps * tile::WARP, shared, stream, p);
}

template <class Rule>
void run_step(const ScanStepParams& p, tile::Stream stream) {
  check_keys(Rule::NAME, "_step", p.K);
  clear_nonfinite(p.first_nonfinite, p.B, stream);
  const bool aligned = reinterpret_cast<uintptr_t>(p.state) % 16 == 0;
  if (p.V % 4 == 0 && p.V > 64 && aligned) return launch_step<Rule, 4>(p, stream);
  if (p.V % 2 == 0 && p.V > 32 && aligned) return launch_step<Rule, 2>(p, stream);
  launch_step<Rule, 1>(p, stream);
}

}  // namespace writesae::cuda
