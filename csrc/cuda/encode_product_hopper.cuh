// The kernel of encode_product_hopper.h. Why it is shaped so is in docs/hopper.md.
//
// A block has 128 tokens, which stay in shared memory, and walks tiles of features, which stream past: P^T's rows are features,
// the M of a product, its columns tokens, the N. Its third warpgroup only copies; the other two multiply and store. Tiles come
// in panels of 64 k, rows of 128 bytes swizzled by as many, through a ring of stages: `full` counts a stage's bytes, `empty` the
// warps that are done with it. Two blocks of a cluster have other tokens and the same features: each copies half of every
// panel to both, and a stage is empty when the warps of both are done.
#pragma once

#include "encode_product_hopper.h"
#include "tile_hopper.cuh"

namespace writesae::cuda::product {

constexpr int TOKENS = 128, PANEL = 64, ROW = 2 * PANEL;  // tokens of a block; k of a panel; its bytes
constexpr int CONSUMERS = 2, THREADS = (CONSUMERS + 1) * tile::WARPGROUP;
constexpr int RING = 64 * 1024;  // bytes of all stages
constexpr auto SWIZZLE = tile::Swizzle::bytes_128;

__host__ __device__ constexpr int features_of(bool ping_pong) { return ping_pong ? 64 : 128; }  // of a tile
__host__ __device__ constexpr int stages_of(bool ping_pong) { return RING / (features_of(ping_pong) * ROW); }
inline size_t shared_bytes(int panels, bool ping_pong) {
  return tile::shared_piece(static_cast<size_t>(panels) * TOKENS * ROW + 1024 - 128) +
         tile::shared_piece(RING + 1024 - 128) +
         tile::shared_piece(sizeof(tile::Barrier) * (2 * stages_of(ping_pong) + 1 + CONSUMERS));
}

// Faults that checks put in, to see that the twin finds them.
enum class Fault { none, no_fence_of_barriers, wrong_parity, other_swizzle, released_early, no_last_wait, no_last_meeting };

// The n-th panel's stage, and the parity of its phases: how often the ring has been round before it.
template <int STAGES>
__device__ __forceinline__ int stage_of(uint32_t n) {
  static_assert((STAGES & (STAGES - 1)) == 0, "a power of two, so that n may wrap around");
  return static_cast<int>(n % STAGES);
}
template <int STAGES>
__device__ __forceinline__ int phase_of(uint32_t n) {
  return static_cast<int>(n / STAGES % 2);
}

struct alignas(8) Pair {
  float x, y;
};

// Stores a warpgroup's 64 features x TOKENS from `feature`, `token` on.
__device__ __forceinline__ void store(const float (&d)[TOKENS / 2], float* out, int64_t F, int64_t T, int64_t feature,
                                      int64_t token) {
  const bool pairs = T % 2 == 0;
  const int lane = tile::lane();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t f = feature + 16 * (tile::warp() % 4) + lane / 4 + 8 * half;
    if (f >= F) continue;
    float* row = out + f * T;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
      const int64_t t = token + 8 * j + 2 * (lane % 4);
      const float x = d[4 * j + 2 * half], y = d[4 * j + 2 * half + 1];
      if (pairs) {
        if (t < T) *reinterpret_cast<Pair*>(row + t) = {x, y};
      } else {
        if (t < T) row[t] = x;
        if (t + 1 < T) row[t + 1] = y;
      }
    }
  }
}

// Blocks (token tile, share of the feature tiles). `tiles`: of features in all, `share`: a block's.
template <int CLUSTER, bool PING_PONG, Fault FAULT = Fault::none>
__global__ void __launch_bounds__(THREADS, 1)
    encode_product_kernel(const __grid_constant__ tile::TensorMap features, const __grid_constant__ tile::TensorMap tokens,
                          float* out, int64_t F, int64_t T, int panels, int tiles, int share) {
#if WRITESAE_HOPPER
  constexpr int ROWS = features_of(PING_PONG), STAGES = stages_of(PING_PONG), STAGE = ROWS * ROW;
  tile::Shared shared;
  char* held = tile::take_at_boundary<1024>(shared, panels * TOKENS * ROW);
  char* ring = tile::take_at_boundary<1024>(shared, RING);
  auto* full = shared.take<tile::Barrier>(2 * STAGES + 1 + CONSUMERS);
  tile::Barrier *empty = full + STAGES, *held_full = empty + STAGES, *turn = held_full + 1;
  const int group = tile::shuffle(tile::thread() / tile::WARPGROUP, 0);  // which the compiler then knows a warp to share
  const int lane = tile::lane();
  const int rank = CLUSTER == 1 ? 0 : tile::cluster_rank();
  if (tile::thread() == 0) {
    for (int i = 0; i < STAGES; i++) {
      tile::barrier_init(full + i, 1);
      tile::barrier_init(empty + i, CLUSTER * 4 * (PING_PONG ? 1 : CONSUMERS));
    }
    tile::barrier_init(held_full, 1);
    for (int i = 0; i < CONSUMERS; i++) tile::barrier_init(turn + i, 4);
    if (FAULT != Fault::no_fence_of_barriers) tile::fence_barriers();
  }
  if constexpr (CLUSTER == 1) {
    tile::sync();
  } else {
    tile::cluster_sync();
  }

  const int64_t token = int64_t{tile::block_x()} * TOKENS;
  const int first = tile::block_y() * share, last = first + share < tiles ? first + share : tiles;
  if (group == CONSUMERS) {
    tile::registers_down<40>();
    if (tile::thread() == CONSUMERS * tile::WARPGROUP) {
      tile::barrier_expect(held_full, panels * TOKENS * ROW);
      for (int p = 0; p < panels; p++)
        tile::copy_tile(held + p * TOKENS * ROW, tokens, p * PANEL, static_cast<int>(token), held_full);
      uint32_t n = 0;
      for (int i = first; i < last; i++)
        for (int p = 0; p < panels; p++, n++) {
          const int stage = stage_of<STAGES>(n);
          tile::barrier_wait(empty + stage, phase_of<STAGES>(n) ^ 1);
          tile::barrier_expect(full + stage, STAGE);
          char* to = ring + stage * STAGE + rank * (STAGE / CLUSTER);
          const int row = i * ROWS + rank * (ROWS / CLUSTER);
          if constexpr (CLUSTER == 1) {
            tile::copy_tile(to, features, p * PANEL, row, full + stage);
          } else {
            tile::copy_tile_to_all(to, features, p * PANEL, row, full + stage, (1 << CLUSTER) - 1);
          }
        }
    }
    tile::sync_warp();
  } else {
    tile::registers_up<232>();
    const auto release = [&](int stage) {
      if constexpr (CLUSTER == 1) {
        if (lane == 0) tile::barrier_arrive(empty + stage);
      } else {
        if (lane < CLUSTER) tile::barrier_arrive_at(empty + stage, lane);
      }
    };
    constexpr auto READ_AS = FAULT == Fault::other_swizzle ? tile::Swizzle::none : SWIZZLE;
    const uint64_t a = tile::describe(ring + (PING_PONG ? 0 : group * 64 * ROW), 0, 8 * ROW, READ_AS);
    const uint64_t b = tile::describe(held, 0, 8 * ROW, READ_AS);
    tile::barrier_wait(held_full, 0);
    uint32_t n = PING_PONG ? group * panels : 0;
    int turns = group;  // parity of the turn that is waited for: the first warpgroup's first has been
    for (int i = first + (PING_PONG ? group : 0); i < last; i += PING_PONG ? CONSUMERS : 1) {
      float d[TOKENS / 2];
      if (PING_PONG) {
        tile::barrier_wait(turn + group, turns ^ 1);
        turns ^= 1;
      }
      for (int p = 0; p < panels; p++, n++) {
        const int stage = stage_of<STAGES>(n), phase = phase_of<STAGES>(n);
        tile::barrier_wait(full + stage, FAULT == Fault::wrong_parity ? phase ^ 1 : phase);
        tile::products_fence();
#pragma unroll
        for (int k = 0; k < PANEL / 16; k++)
          tile::multiply_wide<TOKENS>(d, tile::advance(a, stage * STAGE + 32 * k),
                                      tile::advance(b, p * TOKENS * ROW + 32 * k), p + k > 0);
        tile::products_commit();
        if (FAULT == Fault::released_early) release(stage);
        if (p > 0) {
          tile::products_wait<1>();
          if (FAULT != Fault::released_early) release(stage_of<STAGES>(n - 1));
        }
      }
      if (PING_PONG && lane == 0) tile::barrier_arrive(turn + 1 - group);
      if (FAULT != Fault::no_last_wait) tile::products_wait<0>();
      if (FAULT != Fault::released_early) release(stage_of<STAGES>(n - 1));
      store(d, out, F, T, int64_t{i} * ROWS + (PING_PONG ? 0 : group * 64), token);
      if (PING_PONG) n += panels;  // the other's
    }
  }
  // A block's shared memory is there until nobody copies to it or arrives in it any more.
  if (CLUSTER > 1 && FAULT != Fault::no_last_meeting) tile::cluster_sync();
#endif
}

// On a device of so many `processors`.
template <int CLUSTER, bool PING_PONG, Fault FAULT = Fault::none>
void run(const EncodeProductParams& p, int processors, tile::Stream stream) {
  constexpr int ROWS = features_of(PING_PONG);
  const int panels = static_cast<int>((p.K + PANEL - 1) / PANEL), tiles = static_cast<int>((p.F + ROWS - 1) / ROWS);
  const tile::TensorMap features =
      tile::tensor_map("encode_product: v", p.v, p.F, p.K, 2 * p.v_stride, ROWS / CLUSTER, PANEL, SWIZZLE);
  const tile::TensorMap tokens =
      tile::tensor_map("encode_product: left", p.left, p.T, p.K, 2 * p.left_stride, TOKENS, PANEL, SWIZZLE);
  // A processor holds one block. Where there are few token tiles the features are shared out.
  const int64_t across = (p.T + TOKENS * CLUSTER - 1) / (TOKENS * CLUSTER) * CLUSTER;
  const int64_t wanted = (processors + across - 1) / across;
  const int shares = static_cast<int>(wanted < tiles ? wanted : tiles), share = (tiles + shares - 1) / shares;
  const tile::Grid grid = {static_cast<unsigned>(across), static_cast<unsigned>((tiles + share - 1) / share), 1};
  tile::launch_cluster("encode_product", encode_product_kernel<CLUSTER, PING_PONG, FAULT>, grid, CLUSTER, THREADS,
                       shared_bytes(panels, PING_PONG), stream, features, tokens, p.out, p.F, p.T, panels, tiles, share);
}

}  // namespace writesae::cuda::product
