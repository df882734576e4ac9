// The backward of a write rule's scan on CUDA: what its kernels are given. Letters as in scan.cuh; S0 the state before a chunk,
// D the adjoint of the state after it, N = (I + A)^-1, U the increments (from the forward), B = diag(beta).
//     R  = dR + e^{G_C - G} K D + reach^T dO          adjoint of the increments, from everything after them
//     dY = N^T R,   dV = B dY                         of beta (V - what was read)
//     D <- e^{G_C} D + Q^T (e^G dO) - K^T (e^G B dY)
//     dQ = e^G dO S0^T + (e o D_ji) K,                                            e = tril(dO U^T)
//     dK = e^{G_C - G} U D^T - e^G B dY S0^T + (e o D_ji)^T Q - (F + F^T) K,      F = B (f o D_ji),  f = tril(dY U^T, -1)
//     dbeta_j = dY_j . (V_j - e^{G_j} k_j S0 - sum_i D_ji k_j.k_i U_i)            nothing is divided by beta
//     dg_l = all that decays through token l, a sum of such terms only, so that a strong gate keeps its own precision
// (K and Q normalised and scaled as the forward uses them.)
//
// Of a rule that does not read: dY = R, and of the others what has dY and K or S0 in it falls away.
//
// In the order of launches: cuts, where edits or snapshots stand (below); the forward's factors of tokens, with `solve` left
// plain; `starts` runs forward and leaves S0 of every chunk, `reverse` runs backward and leaves D, the adjoint of the state
// after every chunk, and dY, both with the state on chip and a value column owned by a warp, so that they share nothing;
// `gradients` (scan_gradients.cuh) does the rest, all chunks at once and the value heads of a group in their order; `finish`
// (scan_finish.cu) goes back through normalisation and scale. No atomics on floats.
//
// An edit adds to the state, and a snapshot to its adjoint, after some token. Chunks are cut to end at such tokens: then both
// happen between chunks, and no kernel has terms of its own for every pair of a token and an edit.
#pragma once

#include "scan.cuh"

namespace writesae::cuda {

struct Backward {
  Problem p;            // its outputs are not looked at; `solve` is N
  View right, d_right;  // [B, T, H, V]; d_right without data: none
  Rows d_o;
  const float *d_left, *d_final_state, *d_snapshots;
  View q, k;  // as they were given
  Element v_type, g_type, beta_type;
  bool channel_gate;
  void *d_q, *d_k, *d_v, *d_g, *d_beta;
  float *d_initial_state, *d_edit_left, *d_edit_right;
  // Workspace. Widths are of whole 16-byte units.
  int key_width, value_width;
  const int64_t* spans;         // [N, 2]  first slot and chunks of a sequence that is cut, or null
  void *starts, *ends;          // [slots, H, V, key_width] of the type of computation: S0^T and D^T
  void* d_y;                    // [B, T, H, value_width] of the type of computation
  float* parts;                 // [B, T, Hk, 2, K]  dQ and dK as above, of a group's value heads in their order
  float* scalars;               // [B, T, H, 2, key tiles]  dg (of a gate of each head) and dbeta
  int *first_shot, *next_shot;  // [slots], [P]: the snapshots after a chunk as lists of 1 + place, 0 at the end; or null
};

// With a gate of each channel the walks multiply states with the rows of prepare (ChannelProblem in scan.cuh), which hold it:
//     R = dR + write D + reach^T dO,    D <- e^{G_C} D + ask^T dO - read^T (B dY)
// and `gradients_channels` (scan_gradients_channels.cuh) is in the place of `gradients`.
struct ChannelBackward : Backward {
  Rows read, ask, write;  // [B, T, H, K]
  float* decays;          // [slots, H, padded_keys(K)]  e^{G_C}, 0 beyond K
};

// With a low-rank erase (LowRankProblem) R are the erased rows of the forward, dP the adjoint of the right side of their system,
// and the native increments V have an adjoint of their own:
//     dR_all = dR + erase_write D + erase_reach^T dO,    dP = N^T dR_all
//     dU = dV + write D + reach^T dO + found^T dP,    found_ji = a_j . D_{j-1,i} r_i k_i  for i < j
//     D <- e^{G_C} D + ask^T dO + read^T dP
// `d_y` is dP. `gradients_channels` runs twice, for what k and then b has written, and adds.
struct LowRankBackward : ChannelBackward {
  View erased, d_erased;  // [B, T, H, V]; d_erased without data: none
  Rows a, b;              // [B, T, H, K]
  Element a_type, b_type;
  void *d_a, *d_b;
  Rows erase_write;           // [B, T, H, K]
  void *found, *erase_reach;  // as `reach`
  void* d_u;                  // as `d_y`
  float *a_parts, *g_parts;   // [B, T, H, K]  dA and dg of what k has written
};

template <class Rule>
using GivenBack =
    std::conditional_t<Rule::LOW_RANK, LowRankBackward, std::conditional_t<Rule::CHANNEL, ChannelBackward, Backward>>;

// A sequence's chunks.
struct Span {
  Sequence s;
  int64_t first_slot;
  int chunks;
};

template <int C>
__device__ __forceinline__ Span span_of(const Backward& b, int64_t n) {
  const Sequence s = sequence<C>(b.p, n);
  if (b.spans != nullptr) return {s, b.spans[2 * n], static_cast<int>(b.spans[2 * n + 1])};
  return {s, s.first_slot, static_cast<int>((s.length + C - 1) / C)};
}

template <int C>
__device__ __forceinline__ Cut cut_of(const Backward& b, const Span& span, int chunk) {
  if (b.p.cuts != nullptr) return b.p.cuts[span.first_slot + chunk];
  const int64_t left = span.s.length - static_cast<int64_t>(chunk) * C;
  return {0, chunk * C, left < C ? static_cast<int>(left) : C};
}

// The slot of a chunk that ends at `position` of sequence n, where a cut was made.
template <int C>
__device__ __forceinline__ int64_t slot_ending(const Backward& b, int64_t n, int64_t position) {
  int64_t low = b.spans[2 * n], high = low + b.spans[2 * n + 1] - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (b.p.cuts[middle].first + b.p.cuts[middle].count <= position) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Two neighbours at once.
__device__ __forceinline__ void store_pair(float* to, float low, float high) { to[0] = low, to[1] = high; }
__device__ __forceinline__ void store_pair(bf16* to, float low, float high) {
  *reinterpret_cast<uint32_t*>(to) = tile::pack_bf16(low, high);
}

constexpr int key_tile(int64_t K) { return K <= 32 ? 32 : 64; }
constexpr int64_t key_tiles(int64_t K) { return (K + key_tile(K) - 1) / key_tile(K); }

constexpr int BACK_WARPS = 4;  // of a walk's block

template <class Rule, class T, int KP>
struct StartsShared {
  static constexpr int C = Operand<T>::CHUNK;
  static constexpr size_t BYTES = ((Rule::LOW_RANK ? 2 : 1) * KP * C + BACK_WARPS * 16 * KP) * sizeof(T) +
                                  tile::shared_piece(Factors<C>::SIZE * 4) + (Rule::CHANNEL ? KP * 4 : 0);
};
template <class Rule, class T, int KP>
struct ReverseShared {
  static constexpr int C = Operand<T>::CHUNK, IMAGES = (Rule::READS ? 2 : 1) + (Rule::LOW_RANK ? 2 : 0);
  static constexpr size_t BYTES =
      StartsShared<Rule, T, KP>::BYTES + (KP * C + IMAGES * Triangle<T, C>::SIZE + BACK_WARPS * C * 16) * sizeof(T);
};

// Shared memory of a walk, in bytes: of `reverse`, which takes more.
template <class Rule, class T>
size_t reverse_shared(int64_t K) {
  return with_padded_keys(K, [](auto keys) { return ReverseShared<Rule, T, decltype(keys)::value>::BYTES; });
}

// Where chunks end, as it is made.
struct Cutting {
  uint8_t* ends;   // [B, T] not 0 where a chunk must end; null: no chunk is cut
  Cut* cuts;       // [slots]
  int64_t* spans;  // [N, 2]
};

// Host, before the chunks (scan_marks.cu): what edits remove, and chunks of at most so many tokens.
void run_cuts(const Backward& b, const Cutting& to, int chunk, tile::Stream stream);
// After them (scan_finish.cu).
void run_finish(const Backward& b, tile::Stream stream);

}  // namespace writesae::cuda
