// The scan of a write rule on CUDA, whatever the rule: what its kernels are given, and where sequences, chunks and edits lie.
//
// The recurrence goes in chunks of C tokens (64; 32 for float inputs). With S0 the state before a chunk, G_j the log-decay
// from the chunk's start to token j, D_ji = e^{G_j - G_i}, r_j what key k_j, as it lies in memory, is multiplied by:
//     U = solve (V - e^G r K S0)                               the increments (Writes.right)
//     O = e^G (scale Q/|Q|) S0 + reach U,    reach_ji = D_ji (scale q_j/|q_j|) . (r_i k_i)  for i <= j
//     S = e^{G_C} S0 + K^T (e^{G_C - G} r U)
//     solve = (I + A)^-1 diag(beta),    A_ji = beta_j D_ji (r_j k_j) . (r_i k_i)  for i < j
// `prepare` makes solve, reach and the factors of tokens, all chunks at once; scan_walk.cuh runs along the chunks of a sequence;
// scan_join.cuh and a first, shorter walk let several blocks share a sequence when there are few heads. A deleted or replaced
// native write is beta_j = 0: nothing erased, nothing written; one removed after the read is a column of A and of reach that
// ends on the diagonal, and no part of S.
//
// That is a rule that reads before it writes. One that does not has U = beta V, and what serves the reading is compiled out. A
// rule is a type, the kernels' first template argument, in a namespace of its own:
//     NAME     of its operator, for errors
//     READS    whether what its key finds in the state is subtracted from the value
//     CHANNEL  whether its gate is of each key channel, a vector of K; otherwise of each head, a number
//     LOW_RANK whether a token also writes b (a^T S)^T, of the state before its gate; with CHANNEL and READS, though its key
//              reads nothing
//     ALL      whether it is built for f16, which is otherwise computed as float, and for blocks of 128 value columns
//
// An added p q^T at token t is one more row: V_j -= D_jt (r_j k_j . p) q for j > t, o_j += D_jt (scale q_j/|q_j| . p) q for
// j >= t, S += D_Ct p q^T. These factors are made by `edit_factors`, all edits at once, so that a walk's chunk adds rank-1
// terms and one without edits compares two integers. After the read of token t it is the same row, without o_t.
//
// Only differences of log-decays are ever exponentiated, and G is kept as a whole number and a rest, so that a difference
// keeps its last bits even where G itself is in the thousands.
#pragma once

#include <type_traits>

#include "../edits.h"
#include "../element.h"
#include "operand.cuh"

#if !defined(WRITESAE_PLANT)
#define WRITESAE_PLANT 0  // builds with a fault on purpose, which the tests must notice
#endif

namespace writesae::cuda {

// q, k or v in the type of computation: rows of `width` elements, each 16 bytes aligned and a multiple of 16 bytes long.
struct Rows {
  const void* data;
  int64_t stride[3];  // of row, token, head; in elements
  int width;

  template <class T>
  __device__ __forceinline__ const T* at(int64_t row, int64_t token, int64_t head) const {
    return static_cast<const T*>(data) + row * stride[0] + token * stride[1] + head * stride[2];
  }
};

// Tokens [first, first + count) of sequence n; a slot without tokens has count 0.
struct Cut {
  int n, first, count;
};

struct Problem {
  int B, Hk, H, K, V, N;
  int64_t T;
  Rows q, k, v;
  View g, beta;
  float scale;
  bool normalise;
  const float* initial_state;  // [N, H, K, V] or null
  const int64_t* cu_seqlens;   // [N + 1] or null
  EditList edits;
  int64_t P;
  const int64_t* places;  // [P, 2]
  void* o;
  Element o_type;
  float *final_state, *left, *right, *snapshots;
  int64_t* first_nonfinite;  // [B] or null, as in scan.h
  // Workspace. A chunk's slot: see Sequence.
  int64_t slots;
  void *solve, *reach;  // [slots, H, Triangle::SIZE] of the type of computation; no `solve` where the rule does not read
  bool plain;           // `solve` is to lack its diag(beta)
  const Cut* cuts;      // [slots] where chunks are not all of C tokens (the backward's), or null
  float* factors;       // [slots, H, Factors::SIZE]
  uint8_t *removed,
      *gone;            // [B, T, H] not 0 where the native write is not made, or removed after its read; null without edits
  float* edit_factors;  // [E, EditFactors::SIZE]
  int *first_place, *next_place;  // [slots], [P]: the snapshots of a chunk as lists of 1 + place, 0 at the end; or null
  // Several blocks along one sequence: segments of so many chunks (all of them in one when segments == 1).
  int segments, segment_chunks;
  float* adds;   // [N, H, segments, K, V]  a segment's end from a zero start; `join` turns it into its end
  float* moves;  // [N, H, segments, K, K]  S_end = moves S_start + adds; where the rule does not read, a number each or [K]
  int stages;    // chunks in shared memory at once, 1 or 2
};

// With a gate of each channel D_ji is a diagonal matrix, and prepare, which knows the value heads' own gates, makes rows of them:
//     read_j = r_j e^{G_j} k_j,    ask_j = e^{G_j} scale q_j/|q_j|,    write_j = r_j e^{G_C - G_j} k_j
// Their exponents are sums of gates, never above 0.
struct ChannelProblem : Problem {
  Rows read, ask, write;  // [B, T, H, K]
  float* decays;          // [slots, H, padded_keys(K)]  e^{G_C}, 0 beyond K
  float* edit_rows;       // [E, K]  e^{G_C - G_t} p
  void* shot_rows;        // [P, H, C, read.width]  r_j e^{G_t - G_j} k_j of the place's chunk, for j <= t
  float* shot_decays;     // [P, H, K]  e^{G_t}
};

// With a low-rank erase a chunk's erased rows R (R_j = S_{j-1}^T a_j) solve a system of their own:
//     R = solve read S0 + mix V,    O = ask S0 + erase_reach R + reach V,    S = e^{G_C} S0 + write^T V + erase_write^T R
//     solve = (I - A)^-1,    mix = solve (a_j . D_{j-1,i} r_i k_i)  for i < j,    A_ji = a_j . D_{j-1,i} b_i  for i < j
//     erase_reach_ji = (scale q_j/|q_j|) . D_ji b_i  for i <= j
// with V the native increments, beta times the values, and
//     read_j = e^{G_{j-1}} a_j,    erase_write_j = e^{G_C - G_j} b_j
struct LowRankProblem : ChannelProblem {
  Rows a, b;          // [B, T, H, K]
  Rows erase_write;   // [B, T, H, K]
  void* mix;          // as `solve`; where that is plain, what a finds of k itself
  void* erase_reach;  // as `reach`
  void* erase_shots;  // as `shot_rows`, of b
  float* erased;      // [B, T, H, V] R, or null
};

template <class Rule>
using Given = std::conditional_t<Rule::LOW_RANK, LowRankProblem, std::conditional_t<Rule::CHANNEL, ChannelProblem, Problem>>;

struct Backward;  // scan_backward.cuh
struct ChannelBackward;
struct LowRankBackward;

// One chunk's factors by token. The first HOT floats are what every chunk needs.
template <int C>
struct Factors {
  static constexpr int READ = 0;       // e^{G_j} r_j where the key reads, otherwise beta_j
  static constexpr int ASK = C;        // e^{G_j} scale / |q_j|
  static constexpr int WRITE = 2 * C;  // e^{G_C - G_j} r_j, 0 where the native write is removed after its read
  static constexpr int DECAY = 3 * C;  // e^{G_C}, and three zeros
  static constexpr int HOT = 3 * C + 4;
  static constexpr int WHOLE = HOT;          // G_j, its whole part
  static constexpr int REST = HOT + C;       // and what is left
  static constexpr int KEY = HOT + 2 * C;    // r_j
  static constexpr int QUERY = HOT + 3 * C;  // scale / |q_j|
  static constexpr int BETA = HOT + 4 * C;   // 0 where the native write is not made
  static constexpr int KEPT = HOT + 5 * C;   // r_j, 0 where the native write is removed after its read
  static constexpr int SIZE = HOT + 6 * C;
};

// One added edit's factors: how it reaches the chunk's increments and outputs by token, and its end.
template <int C>
struct EditFactors {
  static constexpr int RIGHT = 0, OUT = C, END = 2 * C, SIZE = 2 * C + 4;
};

// Chunks of sequence n have the slots first_slot.. . In a packed batch these are floor(start / C) + n + c: sequences cannot
// meet, since ceil(length / C) <= floor((start + length) / C) - floor(start / C) + 1, and no sum over sequences is needed.
struct Sequence {
  int64_t row, origin, first_slot;
  int64_t length;
};

template <int C>
__device__ __forceinline__ Sequence sequence(const Problem& p, int64_t n) {
  if (p.cu_seqlens == nullptr) return {n, 0, n * ((p.T + C - 1) / C), p.T};
  const int64_t start = p.cu_seqlens[n];
  return {0, start, start / C + n, p.cu_seqlens[n + 1] - start};
}

// The sequence whose slots contain `slot`, if any do.
template <int C>
__device__ __forceinline__ int64_t sequence_at(const Problem& p, int64_t slot) {
  if (p.cu_seqlens == nullptr) return slot / ((p.T + C - 1) / C);
  int64_t low = 0, high = p.N;  // first_slot(low) <= slot < first_slot(high)
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (p.cu_seqlens[middle] / C + middle <= slot) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

struct Chunk {
  int64_t n;
  Sequence s;
  int first, count;
};

// What `slot` is; count <= 0: nothing.
template <int C>
__device__ __forceinline__ Chunk chunk_at(const Problem& p, int64_t slot) {
  if (p.cuts != nullptr) {
    const Cut cut = p.cuts[slot];
    return {cut.n, sequence<C>(p, cut.n), cut.first, cut.count};
  }
  const int64_t n = sequence_at<C>(p, slot);
  const Sequence s = sequence<C>(p, n);
  const int first = static_cast<int>(slot - s.first_slot) * C;
  return {n, s, first, s.length - first < C ? static_cast<int>(s.length - first) : C};
}

__device__ __forceinline__ float read(const View& x, int64_t a, int64_t b, int64_t c, int64_t d = 0) {
  const int64_t i = a * x.stride[0] + b * x.stride[1] + c * x.stride[2] + d * x.stride[3];
  if (x.type == Element::bf16) return tile::load_float(static_cast<const bf16*>(x.data) + i);
  if (x.type == Element::f16) return tile::load_float(static_cast<const f16*>(x.data) + i);
  return static_cast<const float*>(x.data)[i];
}

__device__ __forceinline__ void write(void* to, Element type, int64_t i, float x) {
  if (type == Element::bf16) {
    tile::store_float(static_cast<bf16*>(to) + i, x);
  } else if (type == Element::f16) {
    tile::store_float(static_cast<f16*>(to) + i, x);
  } else {
    static_cast<float*>(to)[i] = x;
  }
}

__device__ __forceinline__ bool finite(float x) { return (tile::float_to_bits(x) & 0x7f800000u) != 0x7f800000u; }

// `at` is a place of a NaN or infinity, for the first of all: `first` counts without a sign, where -1, none, is the largest.
__device__ __forceinline__ void note_nonfinite(int64_t* first, int64_t at) {
  tile::atomic_min(reinterpret_cast<unsigned long long*>(first), static_cast<unsigned long long>(at));
}

// Host: none yet.
inline void clear_nonfinite(int64_t* first, int64_t rows, tile::Stream stream) {
  if (first != nullptr) tile::fill(first, 0xff, rows * sizeof(int64_t), stream);
}

// Tiles are as wide as the next of these key sizes.
constexpr int padded_keys(int64_t K) { return K <= 32 ? 32 : K <= 64 ? 64 : K <= 128 ? 128 : 256; }

// f(padded_keys(K)), with the size as a type's `value`.
template <class F>
auto with_padded_keys(int64_t K, const F& f) {
  switch (padded_keys(K)) {
    case 32:
      return f(std::integral_constant<int, 32>{});
    case 64:
      return f(std::integral_constant<int, 64>{});
    case 128:
      return f(std::integral_constant<int, 128>{});
    default:
      return f(std::integral_constant<int, 256>{});
  }
}

template <class Rule, class T, int KP, int WARPS, bool FULL>
struct WalkShared {
  static constexpr int LOW = Rule::LOW_RANK ? 1 : 0;
  static constexpr int C = Operand<T>::CHUNK, ROWS = (FULL ? 2 : 1) + (Rule::CHANNEL && Rule::READS ? 1 : 0) + LOW,
                       IMAGES = (Rule::READS ? 1 : 0) + (FULL ? 1 : 0) + (FULL ? 2 : 1) * LOW;
  static constexpr size_t STAGE = (ROWS * KP * C + IMAGES * Triangle<T, C>::SIZE + WARPS * C * 16) * sizeof(T) +
                                  tile::shared_piece(Factors<C>::HOT * 4) + (Rule::CHANNEL ? KP * 4 : 0);
};

// Shared memory of a walk, in bytes.
template <class Rule, class T>
size_t walk_shared(int64_t K, int warps, int stages) {
  return with_padded_keys(K, [&](auto keys) -> size_t {
    constexpr int KP = decltype(keys)::value;
    if constexpr (Rule::ALL && (KP == 64 || KP == 128)) {
      if (warps == 8) return stages * WalkShared<Rule, T, KP, 8, true>::STAGE;
    }
    return stages * WalkShared<Rule, T, KP, 4, true>::STAGE;
  });
}

// Host, before the chunks (scan_marks.cu): what edits remove, the snapshots of chunks of so many tokens, nothing found yet.
void run_marks(const Problem& p, int chunk, tile::Stream stream);

}  // namespace writesae::cuda
