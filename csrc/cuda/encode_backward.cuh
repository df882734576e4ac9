// The kernels of encode's backward. With lambda_i(t) = da_i(t) + e^{g_{t+1}} lambda_i(t+1), and of one head, one write and
// one rank of the atoms P = left v^T, Q = right w^T:
//    d_left = (lambda * Q) v    d_right = (lambda * P) w    d_v = (lambda * Q)^T left    d_w = (lambda * P)^T right
// Tokens and features play the same part, so one kernel makes both pairs: a block owns some of the one and goes through all
// of the other. Its own rows X0, X1 (keys, values) stay in shared memory, rows Y0, Y1 of the others come by tiles of 32:
//    S0 = X0 Y0^T, S1 = X1 Y1^T;    G0 = lambda * S1, G1 = lambda * S0;    out0 += G0 Y0, out1 += G1 Y1
// Features as owners walk a part of the tokens from its last one back and carry lambda themselves; where a part ends, and for
// tokens as owners where their chunk ends, it is given (tails_kernel), so that none waits for another. Parts make up for few
// heads: their sums are added in order (add_parts_kernel).
// Products are float by three tf32 (operand.cuh). Each tile's are added to `out` by ordinary additions: sums over tens of
// thousands of tokens are not left to the matrix units, which cut off where they should round.
#pragma once

#include <type_traits>

#include "encode.h"
#include "encode_numbers.cuh"
#include "encode_rows.cuh"
#include "operand.cuh"
#include "tile.cuh"

namespace writesae::cuda {

constexpr int OTHERS = 32;         // rows of a tile that goes past
constexpr int BACKWARD_WARPS = 8;  // four for the keys, four for the values
constexpr int BACKWARD_THREADS = BACKWARD_WARPS * tile::WARP;
constexpr int TAIL_FEATURES = 64;
constexpr int TAIL_SEQUENCES = 1024;  // side by side, at most

// Rows that a block owns, and fewer of them where a device has less shared memory a block.
__host__ __device__ constexpr int owned_rows(int depth) { return depth > 128 ? 32 : 64; }
__host__ __device__ constexpr int fewer_rows(int depth) { return depth > 64 ? 32 : 64; }

// lambda of at most TOKENS tokens and FEATURES features, rows of tokens in shared memory.
template <int TOKENS_, int FEATURES_>
struct Lambda {
  static constexpr int TOKENS = TOKENS_, FEATURES = FEATURES_;
  static constexpr int STRIDE = FEATURES + 1;
  static constexpr int SIZE = TOKENS * STRIDE;
  float* at;     // [TOKENS][STRIDE]
  float* gates;  // [TOKENS]
  float* carry;  // [FEATURES] e^g lambda of the token after the segment; afterwards of its own first token

  __device__ explicit Lambda(tile::Shared& shared)
      : at(shared.take<float>(SIZE)),
        gates(shared.take<float>(TOKENS)),
        carry(shared.take<float>(FEATURES)) {}

  // Of the features from `first` on. Called by all threads of the block, after a barrier behind what wrote `carry`.
  __device__ void fill(const EncodeBackwardParams& p, const Segment& segment, int h, int head, int first) const {
    const EncodeParams& e = p.rows;
    const int count = segment.last - segment.first, m = static_cast<int>(e.m);
    for (int i = tile::thread(); i < SIZE; i += tile::block_threads()) at[i] = 0.0f;
    for (int t = tile::thread(); t < count; t += tile::block_threads())
      gates[t] = tile::exponential(e.decay[(segment.origin + int64_t{segment.first} + t) * e.H + head]);
    tile::sync();
    // A warp has a token at a time, and adds its few hits one after the other: in a fixed order, whatever repeats.
    for (int t = tile::warp(); t < count; t += tile::block_threads() / tile::WARP) {
      const int64_t place = ((segment.origin + int64_t{segment.first} + t) * e.Hs + h) * m;
      for (int start = 0; start < m; start += tile::WARP) {
        const int j = start + tile::lane();
        const int64_t f = j < m ? e.at[place + j] - first : -1;
        const bool hit = f >= 0 && f < FEATURES;
        const float da = hit ? p.grad[place + j] : 0.0f;
        for (uint32_t hits = tile::ballot(hit); hits != 0; hits &= hits - 1) {
          const int from = tile::lowest_bit(hits);
          const int column = tile::shuffle(static_cast<int>(f), from);
          const float x = tile::shuffle(da, from);
          if (tile::lane() == 0) at[t * STRIDE + column] += x;
        }
      }
    }
    tile::sync();
    for (int f = tile::thread(); f < FEATURES; f += tile::block_threads()) {
      float next = carry[f];
      for (int t = count - 1; t >= 0; t--) {
        const float x = at[t * STRIDE + f] + next;
        at[t * STRIDE + f] = x;
        next = x * gates[t];
      }
      carry[f] = next;
    }
    tile::sync();
  }
};

// Rows [0, ROWS) of `count` that exist into a tile of D columns, zeros elsewhere.
template <int ROWS, int D, class At>
__device__ __forceinline__ void load_rows_of(float* data, int count, int64_t size, const View& from, const At& at) {
  const Tile<float, D> to = {data};
  for (int row = tile::warp(); row < ROWS; row += BACKWARD_WARPS) {
    const int64_t start = row < count ? at(row) : 0;
#pragma unroll
    for (int i = tile::lane(); i < D; i += tile::WARP)
      *to.at(row, i) = row < count && i < size ? load_element(from.data, from.type, start + i) : 0.0f;
  }
}

__device__ __forceinline__ int64_t offset(const View& x, int64_t a, int64_t b, int64_t c, int64_t d) {
  return a * x.stride[0] + b * x.stride[1] + c * x.stride[2] + d * x.stride[3];
}

template <int D, int OWN, bool FEATURES_OWN>
__global__ void __launch_bounds__(BACKWARD_THREADS, 1)
    encode_backward_kernel(EncodeBackwardParams p, const Segment* segments, int count, int each, const float* tails) {
  constexpr int BLOCK_ROWS = OWN / 16, GROUPS = 4 / BLOCK_ROWS;
  constexpr int PRODUCT_PAIRS = OTHERS / 16 / GROUPS;  // pairs of 16 x 8 tiles of S a warp
  constexpr int OUT_PAIRS = D / 16 / GROUPS;
  using Op = Operand<float>;
  using Lambdas = Lambda<FEATURES_OWN ? OTHERS : OWN, FEATURES_OWN ? OWN : OTHERS>;
  const EncodeParams& e = p.rows;
  const int h = tile::block_y(), F = static_cast<int>(e.F), R = static_cast<int>(e.R), rank = static_cast<int>(e.rank);
  const int head = static_cast<int>(e.heads[h]), left_head = head / static_cast<int>(e.H / e.Hl);
  if (head < 0 || head >= e.H) return;
  const int parts = FEATURES_OWN ? rank : R;
  const int mine = tile::block_x() / parts, part = tile::block_x() % parts;  // part: the rank or write of the own rows
  Segment segment = {-1, 0, 0, 0, 0};
  if constexpr (!FEATURES_OWN) {
    segment = segments[mine];
    if (segment.n < 0 || segment.first == segment.last) return;
  }
  const int first_own = FEATURES_OWN ? mine * OWN : segment.first;
  const int own = FEATURES_OWN ? (F - first_own < OWN ? F - first_own : OWN) : segment.last - segment.first;

  tile::Shared shared;
  float* const x = shared.take<float>(2 * OWN * D);     // keys, then values
  float* const y = shared.take<float>(2 * OTHERS * D);  // likewise
  float* const g = shared.take<float>(2 * OWN * OTHERS);
  const Lambdas lambda(shared);

  const auto load_features = [&](float* to, auto rows, int first, int n, int r) {
#pragma unroll
    for (int side = 0; side < 2; side++) {
      const View& from = side == 0 ? e.v_enc : e.w_enc;
      load_rows_of<decltype(rows)::value, D>(to + side * decltype(rows)::value * D, n, side == 0 ? e.K : e.V, from,
                                             [&](int row) { return offset(from, h, first + row, r, 0); });
    }
  };
  const auto load_tokens = [&](float* to, auto rows, const Segment& of, int r) {
    const bool packed = e.cu_seqlens != nullptr;
#pragma unroll
    for (int side = 0; side < 2; side++) {
      const View& from = side == 0 ? e.left : e.right;
      load_rows_of<decltype(rows)::value, D>(
          to + side * decltype(rows)::value * D, of.last - of.first, side == 0 ? e.K : e.V, from, [&](int row) {
            return offset(from, packed ? 0 : of.n, (packed ? of.origin : 0) + int64_t{of.first} + row,
                          side == 0 ? left_head : head, r);
          });
    }
  };

  const int warp = tile::warp(), side = warp / 4, row0 = warp % 4 % BLOCK_ROWS * 16, group = warp % 4 / BLOCK_ROWS;
  const Tile<float, D> owned = {x + side * OWN * D}, others = {y + side * OTHERS * D};
  const Tile<float, OTHERS> made = {g + (1 - side) * OWN * OTHERS}, weights = {g + side * OWN * OTHERS};
  float out[2 * OUT_PAIRS][4] = {};
  // What the others' tile in y gives, lambda being there.
  const auto multiply = [&] {
    float s[2 * PRODUCT_PAIRS][4] = {};
    const auto own_down = Op::lane_place_down(owned);
    const int other_along = Op::lane_place_along(others);
#pragma unroll 4
    for (int k = 0; k < D; k += Op::STEP) {
      const Op::A a = Op::load_left(owned, own_down, row0, k);
#pragma unroll
      for (int n = 0; n < PRODUCT_PAIRS; n++) {
        Op::B b[2];
        Op::load_rows(b, others, other_along, (group * PRODUCT_PAIRS + n) * 16, k);
        Op::multiply(s[2 * n], a, b[0]), Op::multiply(s[2 * n + 1], a, b[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < 2 * PRODUCT_PAIRS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = row0 + tile::accumulator_row(i / 2);
        const int column = (group * 2 * PRODUCT_PAIRS + n) * 8 + tile::accumulator_column() + i % 2;
        const int token = FEATURES_OWN ? column : row, feature = FEATURES_OWN ? row : column;
        *made.at(row, column) = s[n][i] * lambda.at[token * Lambdas::STRIDE + feature];
      }
    tile::sync();
    Op::A a[OTHERS / Op::STEP];
    const auto g_down = Op::lane_place_down(weights);
    const auto other_down = Op::lane_place_down(others);
#pragma unroll
    for (int k = 0; k < OTHERS / Op::STEP; k++) a[k] = Op::load_left(weights, g_down, row0, k * Op::STEP);
#pragma unroll
    for (int n = 0; n < OUT_PAIRS; n++) {
      float sum[2][4] = {};
      const int column = (group * OUT_PAIRS + n) * 16;
#pragma unroll
      for (int k = 0; k < OTHERS / Op::STEP; k++) {
        Op::B b[2];
        Op::load_columns(b, others, other_down, k * Op::STEP, column);
        Op::multiply(sum[0], a[k], b[0]), Op::multiply(sum[1], a[k], b[1]);
      }
#pragma unroll
      for (int i = 0; i < 8; i++) out[2 * n + i / 4][i % 4] += sum[i / 4][i % 4];
    }
    tile::sync();  // y, g and lambda are written again
  };

  using Own = std::integral_constant<int, OWN>;
  using Others = std::integral_constant<int, OTHERS>;
  if constexpr (FEATURES_OWN) {
    load_features(x, Own{}, first_own, own, part);
    const int begin = tile::block_z() * each, end = begin + each < count ? begin + each : count;
    const float* tail = tails + (int64_t{tile::block_z()} * e.Hs + h) * F + first_own;
    for (int s = end - 1; s >= begin; s--) {
      const Segment tokens = segments[s];
      if (tokens.n < 0) continue;
      if (tokens.final || s == end - 1)
        for (int f = tile::thread(); f < OWN; f += BACKWARD_THREADS)
          lambda.carry[f] = tokens.final || f >= own ? 0.0f : tail[f];
      tile::sync();
      lambda.fill(p, tokens, h, head, first_own);
      for (int r = 0; r < R && tokens.first < tokens.last; r++) {
        load_tokens(y, Others{}, tokens, r);
        tile::sync();
        multiply();
      }
      if (tokens.first == 0 && part == 0)
        for (int f = tile::thread(); f < own; f += BACKWARD_THREADS)
          p.d_carry[(tokens.n * e.Hs + h) * F + first_own + f] = lambda.carry[f];
      tile::sync();
    }
  } else {
    load_tokens(x, Own{}, segment, part);
    for (int first = 0; first < F; first += OTHERS) {
      const int n = F - first < OTHERS ? F - first : OTHERS;
      const float* tail = tails + (int64_t{mine} * e.Hs + h) * F + first;
      for (int f = tile::thread(); f < OTHERS; f += BACKWARD_THREADS) lambda.carry[f] = f < n ? tail[f] : 0.0f;
      tile::sync();
      lambda.fill(p, segments[tile::fresh(mine)], h, head, first);  // read again, which costs no registers meanwhile
      // Tokens of the tile past the segment's end: their rows of x are zero, and lambda there is zero too.
      for (int r = 0; r < rank; r++) {
        load_features(y, Others{}, first, n, r);
        tile::sync();
        multiply();
      }
    }
  }

  if constexpr (!FEATURES_OWN) segment = segments[tile::fresh(mine)];
#pragma unroll
  for (int n = 0; n < 2 * OUT_PAIRS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = row0 + tile::accumulator_row(i / 2);
      const int column = (group * 2 * OUT_PAIRS + n) * 8 + tile::accumulator_column() + i % 2;
      const int64_t size = side == 0 ? e.K : e.V;
      if (row >= own || column >= size) continue;
      const int64_t place = FEATURES_OWN ? (int64_t{h} * F + first_own + row) * rank + part
                                         : ((segment.origin + int64_t{segment.first} + row) * e.Hs + h) * R + part;
      float* to = FEATURES_OWN ? (side == 0 ? p.dv : p.dw) : (side == 0 ? p.d_left : p.d_right);
      const int64_t whole = FEATURES_OWN ? tile::block_z() * e.Hs * F * rank * size : 0;
      to[whole + place * size + column] = out[n][i];
    }
}

// to[i] = from[i] + from[size + i] + .., in this order.
__global__ void add_parts_kernel(const float* from, int parts, int64_t size, float* to) {
  const int64_t i = int64_t{tile::block_x()} * tile::block_threads() + tile::thread();
  if (i >= size) return;
  float sum = from[i];
  for (int part = 1; part < parts; part++) sum += from[part * size + i];
  to[i] = sum;
}

// For the last of every `each` segments: e^g lambda of the token after it, zero at the end of a sequence. A block has 64
// features of a head.
template <int TOKENS>
__global__ void __launch_bounds__(BACKWARD_THREADS, 4)
    tails_kernel(EncodeBackwardParams p, const Segment* segments, int count, int each, float* tails) {
  const EncodeParams& e = p.rows;
  const int h = tile::block_y(), head = static_cast<int>(e.heads[h]), first = tile::block_x() * TAIL_FEATURES;
  if (head < 0 || head >= e.H) return;
  tile::Shared shared;
  const Lambda<TOKENS, TAIL_FEATURES> lambda(shared);
  for (int n = tile::block_z(); n < e.N; n += TAIL_SEQUENCES) {
    // Segments are in the order of sequences, those of none (n < 0) last: where the next sequence's begin.
    int low = 0, high = count;
    while (low < high) {
      const int middle = (low + high) / 2, of = segments[middle].n;
      if (of >= 0 && of <= n) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    for (int s = low - 1; s >= 0; s--) {
      const Segment segment = segments[s];
      if (segment.n != n) break;
      for (int f = tile::thread(); f < TAIL_FEATURES; f += BACKWARD_THREADS) {
        if (segment.final) lambda.carry[f] = 0.0f;
        if (first + f < e.F && (s + 1) % each == 0)
          tails[(int64_t{s / each} * e.Hs + h) * e.F + first + f] = lambda.carry[f];
      }
      tile::sync();
      lambda.fill(p, segment, h, head, first);
    }
  }
}

}  // namespace writesae::cuda
