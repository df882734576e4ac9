// A scan, between the two walks of a split sequence: the states at the ends of the segments, one after the other,
//     S_end = moves S_start + adds,
// in three-fold tf32. A warp owns 16 value columns, S^T [16, K] in registers as in scan_walk.cuh; rows of `moves` come through
// shared memory 32 at a time. Per (sequence, head, segment) K^2 V multiply-adds and K (K + 2 V) floats: 4 MFLOP and 196 KB at
// K = V = 128, some 10 us a segment for a lone block: 16 heads, 4 segments: 30 us.
#pragma once

#include "scan_walk.cuh"

namespace writesae::cuda {

constexpr int JOIN_WARPS = 4;

template <int KP>
__global__ void __launch_bounds__(32 * JOIN_WARPS) join(const __grid_constant__ Problem p, int chunk_tokens) {
  using Op = Operand<float>;
  tile::Shared shared;
  const Tile<float, KP> rows = {shared.template take<float>(32 * KP)};
  const int tiles = (p.V + 16 * JOIN_WARPS - 1) / (16 * JOIN_WARPS);
  const int64_t head = tile::block_x() / tiles, n = head / p.H;
  const int column = (tile::block_x() % tiles * JOIN_WARPS + tile::warp()) * 16;
  const int64_t length = p.cu_seqlens == nullptr ? p.T : p.cu_seqlens[n + 1] - p.cu_seqlens[n];
  const int64_t per_segment = static_cast<int64_t>(p.segment_chunks) * chunk_tokens;
  const int64_t segments = (length + per_segment - 1) / per_segment, size = static_cast<int64_t>(p.K) * p.V;
  const float* from = p.initial_state == nullptr ? nullptr : p.initial_state + head * size;
  for (int64_t segment = 0; segment + 1 < segments; segment++) {
    const float* moves = p.moves + (head * p.segments + segment) * p.K * p.K;
    float* adds = p.adds + (head * p.segments + segment) * size;
    const int along = tile::fresh(Op::lane_place_along(rows));
    float state[KP / 8][4] = {};
    if (from != nullptr) each_owned<KP>(p.K, p.V, column, [&](int i, int e, int64_t at) { state[i][e] = from[at]; });
    for (int top = 0; top < p.K; top += 32) {
      tile::sync();
      for (int i = tile::thread(); i < 32 * KP; i += 32 * JOIN_WARPS) {
        const int row = i / KP, k = i % KP;
        *rows.at(row, k) = top + row < p.K && k < p.K ? moves[static_cast<int64_t>(top + row) * p.K + k] : 0.0f;
      }
      tile::sync();
      float x[4][4] = {};
#pragma unroll
      for (int step = 0; step < KP; step += Op::STEP) {
        const auto a = Op::accumulators(&state[step / 8]);
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          Op::B b[2];
          Op::load_rows(b, rows, along, 8 * j, step);
          Op::multiply(x[j], a, b[0]), Op::multiply(x[j + 1], a, b[1]);
        }
      }
      float* to = adds + static_cast<int64_t>(top) * p.V;
      each_owned<32>(p.K - top, p.V, column, [&](int i, int e, int64_t at) { to[at] += x[i][e]; });
    }
    from = adds;  // every lane reads back what it wrote itself
  }
}

// The same where `moves` are numbers, of each channel where the gate is: a thread per element of a head's state.
template <int THREADS, bool CHANNEL>
__global__ void __launch_bounds__(THREADS) carry(const __grid_constant__ Problem p, int chunk_tokens) {
  const int64_t size = static_cast<int64_t>(p.K) * p.V, blocks = (size + THREADS - 1) / THREADS;
  const int64_t head = tile::block_x() / blocks, n = head / p.H, i = tile::block_x() % blocks * THREADS + tile::thread();
  if (i >= size) return;
  const int64_t length = p.cu_seqlens == nullptr ? p.T : p.cu_seqlens[n + 1] - p.cu_seqlens[n];
  const int64_t per_segment = static_cast<int64_t>(p.segment_chunks) * chunk_tokens;
  const int64_t segments = (length + per_segment - 1) / per_segment;
  float state = p.initial_state == nullptr ? 0.0f : p.initial_state[head * size + i];
  for (int64_t segment = head * p.segments; segment + 1 < head * p.segments + segments; segment++)
    state = p.adds[segment * size + i] += p.moves[CHANNEL ? segment * p.K + i / p.V : segment] * state;
}

}  // namespace writesae::cuda
