// gated_delta_rule, second kernel: along the chunks of a sequence with the state on chip. See gated_delta_rule.cuh.
//
// A block takes WARPS x 16 value columns of one (sequence, value head), or of one segment of it. Columns of the state do not
// meet, so a warp owns 16 of them and keeps everything transposed: S^T [16, K] in its registers as results of 16 x 8 tiles.
// Results of one product are, rounded, the left operand of the next without leaving the registers,
//     X^T = S^T K^T   ->   U^T = (V^T - e^G r X^T) solve^T   ->   O^T = ... + U^T reach^T,   S^T = ... + U^T K,
// and the right operands (k, q, solve, reach of the chunk) are the block's only shared data: one barrier a chunk, while the
// next chunk's copies run into the other half of shared memory.
//
// Arithmetic, bf16, K = 128, a warp and chunk of 64 tokens: products (16 x 8 x 16) 64 X + 64 Q S + 20 U + 20 O + 64 S = 232,
// 0.95 MFLOP; matrix loads 58 KB; about 800 instructions in all. At 6.1 cycles a product and scheduler (620 TFLOP/s of
// mma.sync on 132 SMs) 1,415 cycles; with 4 warps an SM the matrix loads take 1,860 cycles at 128 B a cycle, which is the
// bound; with what does not overlap (packing, waiting at the six dependent phases) about 2,450 expected.
// Copies in: k, q 32 KB, solve, reach 12 KB, v 2 KB a warp, so 52 KB a block of 4 warps and chunk, or 21 B a cycle and SM.
// Shared memory 53 KB a stage (4 warps), 61 KB (8); registers: 64 S + 32 X + 32 Q S + 32 U and fragments, under 255.
//   1 x 32768, 16 / 64 heads: 128 blocks of 4 warps, 512 chunks: 1.25 M cycles, 0.71 ms at 1.755 GHz, + 0.25 prepare.
//   8192 x 4, 16 / 64 heads: 256 blocks of 8 warps, 128 chunks, two rounds, 3,720 cycles by matrix loads: 0.95 M, 0.6 ms + 0.25.
//   1 x 8192, 16 / 16 heads: 32 blocks of 4 warps; 4 segments: 0.10 ms + 0.03 + 0.02 (join).
#pragma once

#include "gated_delta_rule.cuh"

namespace writesae::cuda {

template <class T, int KP, int WARPS, bool FULL>
struct WalkShared {
  static constexpr int C = Operand<T>::CHUNK, IMAGE = Triangle<T, C>::SIZE;
  static constexpr size_t STAGE = (FULL ? 2 : 1) * (KP * C + IMAGE) * sizeof(T) + WARPS * C * 16 * sizeof(T) +
                                  (Factors<C>::HOT * 4 + 127) / 128 * 128;
};

// What a warp's lanes own of [K, columns] states in memory: element (k, v) = (8 n + c + e % 2, g + 8 (e / 2)).
template <int KP, class F>
__device__ __forceinline__ void each_owned(int K, int columns, const F& f) {
  const int g = tile::lane() / 4, c = 2 * (tile::lane() % 4);
#pragma unroll
  for (int n = 0; n < KP / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int k = 8 * n + c + e % 2, v = g + e / 2 * 8;
      if (k < K && v < columns) f(n, e, k, v);
    }
}

// The edits of one (sequence, value head), passed in order of position.
struct EditWalk {
  int64_t n, h, at, position;

  __device__ __forceinline__ EditWalk(const EditList& edits, int64_t sequence, int64_t head, int64_t from)
      : n(sequence), h(head), at(edits.count > 0 ? first_edit(edits, sequence, head, from) : 0) {
    look(edits);
  }
  // The position of edit `at`, or none.
  __device__ __forceinline__ void look(const EditList& edits) {
    const int64_t* x = edits.index + 4 * at;
    position = at < edits.count && x[0] == n && x[2] == h ? x[1] : INT64_MAX;
  }
};

// FULL: outputs and everything asked for. Otherwise only the state at the end of each segment from a zero start (`adds`), and
// the end of a unit start without values (`moves`), for `join`.
template <class T, int KP, int WARPS, bool FULL>
__global__ void __launch_bounds__(32 * WARPS) walk(const __grid_constant__ Problem p) {
  using Op = Operand<T>;
  constexpr int C = Op::CHUNK, STEP = Op::STEP, THREADS = 32 * WARPS, EACH = Tile<T, KP>::EACH;
  constexpr int IMAGE = Triangle<T, C>::SIZE, FACTORS = (Factors<C>::HOT + 31) / 32 * 32, NC = C / 8, NK = KP / 8;
  using F = Factors<C>;
  using E = EditFactors<C>;
  using Slab = Tile<T, 16>;
  struct Stage {
    Tile<T, KP> k, q;
    Triangle<T, C> solve, reach;
    T* v;
    float* factors;
  };
  tile::Shared shared;
  T* const shared_k = shared.template take<T>(p.stages * KP * C);
  T* const shared_solve = shared.template take<T>(p.stages * IMAGE);
  T* const shared_v = shared.template take<T>(p.stages * WARPS * C * 16);
  float* const shared_factors = shared.template take<float>(p.stages * FACTORS);
  T* const shared_q = FULL ? shared.template take<T>(p.stages * KP * C) : nullptr;
  T* const shared_reach = FULL ? shared.template take<T>(p.stages * IMAGE) : nullptr;
  const auto stage = [&](int i) -> Stage {
    return {{shared_k + i * KP * C}, {shared_q + i * KP * C}, {shared_solve + i * IMAGE}, {shared_reach + i * IMAGE},
            shared_v + i * WARPS * C * 16, shared_factors + i * FACTORS};
  };

  // ---- where -------------------------------------------------------------------------------------------------------
  const int warp = tile::warp(), lane = tile::lane(), thread = tile::thread(), g = lane / 4, c = 2 * (lane % 4);
  const int value_tiles = (p.V + 16 * WARPS - 1) / (16 * WARPS);
  const int tiles = value_tiles + (FULL ? 0 : (p.K + 16 * WARPS - 1) / (16 * WARPS));
  int64_t rest_of = tile::block_x();
  const int column_tile = rest_of % tiles;
  rest_of /= tiles;
  const int h = rest_of % p.H;
  rest_of /= p.H;
  const int segment = rest_of % p.segments;
  const int64_t n = rest_of / p.segments;
  const int hk = h / (p.H / p.Hk);
  const Sequence s = sequence<C>(p, n);
  const int64_t chunks = (s.length + C - 1) / C;
  const int64_t begin = static_cast<int64_t>(segment) * p.segment_chunks;
  const int64_t end = chunks - begin < p.segment_chunks ? chunks : begin + p.segment_chunks;
  if (segment > 0 && begin >= chunks) return;
  if (!FULL && end == chunks) return;  // nobody starts where the last segment ends
  const bool moves = !FULL && column_tile >= value_tiles;
  const int column = (column_tile - (moves ? value_tiles : 0)) * 16 * WARPS + 16 * warp;  // of the warp
  const int columns = (moves ? p.K : p.V) - column;                                      // may be <= 0
  const int64_t head = n * p.H + h;

  // ---- the next chunk's copies --------------------------------------------------------------------------------------
  const auto issue = [&](const Stage& to, int64_t chunk) {
    const int64_t first = chunk * C, left = s.length - first, at = (s.first_slot + chunk) * p.H + h;
    const T* from_k = p.k.template at<T>(s.row, s.origin + first, hk);
    const T* from_q = FULL ? p.q.template at<T>(s.row, s.origin + first, hk) : nullptr;
    constexpr int UNITS = KP / EACH;
#pragma unroll
    for (int i = thread; i < C * UNITS; i += THREADS) {
      const int row = i / UNITS, unit = i % UNITS;
      tile::copy_16(to.k.unit(row, unit), from_k + row * p.k.stride[1] + unit * EACH, row < left && unit * EACH < p.k.width);
    }
    const T* images = static_cast<const T*>(p.solve) + at * IMAGE;
#pragma unroll
    for (int i = thread; i < IMAGE / EACH; i += THREADS) tile::copy_16(to.solve.data + i * EACH, images + i * EACH);
    if (!moves) {
      const T* from_v = p.v.template at<T>(s.row, s.origin + first, h) + column;
      const Slab slab = {to.v + warp * C * 16};
      constexpr int SLAB_UNITS = 16 / EACH;
#pragma unroll
      for (int i = lane; i < C * SLAB_UNITS; i += tile::WARP) {
        const int row = i / SLAB_UNITS, unit = i % SLAB_UNITS;
        tile::copy_16(slab.unit(row, unit), from_v + row * p.v.stride[1] + unit * EACH,
                      row < left && column + unit * EACH < p.v.width);
      }
    }
    const float* factors = p.factors + at * F::SIZE;
    for (int i = thread; i < F::HOT / 4; i += THREADS) tile::copy_16(to.factors + 4 * i, factors + 4 * i);
    if constexpr (FULL) {
#pragma unroll
      for (int i = thread; i < C * UNITS; i += THREADS) {
        const int row = i / UNITS, unit = i % UNITS;
        tile::copy_16(to.q.unit(row, unit), from_q + row * p.q.stride[1] + unit * EACH, row < left && unit * EACH < p.q.width);
      }
      images = static_cast<const T*>(p.reach) + at * IMAGE;
#pragma unroll
      for (int i = thread; i < IMAGE / EACH; i += THREADS) tile::copy_16(to.reach.data + i * EACH, images + i * EACH);
    }
    tile::commit_copies();
  };
  if (begin < end) issue(stage(0), begin);

  // ---- the state before the first chunk ------------------------------------------------------------------------------
  float state[NK][4] = {};
  if (moves) {
    each_owned<KP>(p.K, columns, [&](int i, int e, int k, int v) { state[i][e] = k == column + v ? 1.0f : 0.0f; });
  } else if (FULL && (segment > 0 || p.initial_state != nullptr)) {
    const float* from = segment > 0 ? p.adds + (head * p.segments + segment - 1) * p.K * p.V : p.initial_state + head * p.K * p.V;
#if WRITESAE_PLANT == 1  // a wrong carry: segments start from the state one further back
    if (segment > 1) from -= p.K * p.V;
#endif
    each_owned<KP>(p.K, columns, [&](int i, int e, int k, int v) { state[i][e] = from[static_cast<int64_t>(k) * p.V + column + v]; });
  }
  EditWalk edit(p.edits, n, h, begin * C);

  for (int64_t chunk = begin; chunk < end; chunk++) {
    const int half = p.stages == 2 ? (chunk - begin) % 2 : 0;
    const Stage now = stage(half);
    const int64_t first = chunk * C, slot = s.first_slot + chunk;
    const int count = s.length - first < C ? static_cast<int>(s.length - first) : C;
    tile::wait_copies<0>();
#if WRITESAE_PLANT != 2  // a missing barrier
    tile::sync();
#endif
    if (p.stages == 2 && chunk + 1 < end) issue(stage(1 - half), chunk + 1);
    const Slab slab = {now.v + warp * C * 16};
    const bool edited = !moves && edit.position < first + count;
    const int64_t edits_begin = edit.at;
    int64_t edits_end = edit.at;
    int place = -1;
    if (FULL && p.first_place != nullptr) place = p.first_place[slot] - 1;

    // ---- X^T = S^T K^T and Y^T = S^T Q^T ---------------------------------------------------------------------------
    float x[NC][4] = {}, y[NC][4] = {};
    const auto read_state = [&](const Tile<T, KP>& rows, float (&to)[NC][4], int step, const typename Op::A& a) {
#pragma unroll
      for (int j = 0; j < NC; j += 2) {
        typename Op::B b[2];
        Op::load_rows(b, rows, 8 * j, step);
        Op::multiply(to[j], a, b[0]), Op::multiply(to[j + 1], a, b[1]);
      }
    };
#pragma unroll
    for (int step = 0; step < KP; step += STEP) {
      const auto a = Op::accumulators(&state[step / 8]);
      read_state(now.k, x, step, a);
      if constexpr (FULL && KP <= 128) read_state(now.q, y, step, a);
    }

    // ---- V^T - e^G r X^T ---------------------------------------------------------------------------------------------
#pragma unroll
    for (int j = 0; j < NC; j += 2) {
      float v[2][4] = {};
      if (!moves) Op::load_transposed(v, slab, 8 * j);
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          x[j + i][e] = v[i][e] - now.factors[F::READ + 8 * (j + i) + c + e % 2] * x[j + i][e];
    }
    // Adds factor (token) times the value side of every added edit of this chunk: rows of the edit list at `kind`.
    const auto add_edits = [&](float (&to)[NC][4], int kind, float sign) {
      for (int64_t e = edits_begin; e < edits_end; e++) {
        if (p.edits.index[4 * e + 3] == 1) continue;
        const float* right = p.edits.right + e * p.V + column;
        const float* factors = p.edit_factors + e * E::SIZE + kind;
        const float w[2] = {g < columns ? sign * right[g] : 0.0f, g + 8 < columns ? sign * right[g + 8] : 0.0f};
#pragma unroll
        for (int j = 0; j < NC; j++)
#pragma unroll
          for (int i = 0; i < 4; i++) to[j][i] += factors[8 * j + c + i % 2] * w[i / 2];
      }
    };
    if (edited) {
      for (; edit.position < first + count; edits_end = edit.at) edit.at++, edit.look(p.edits);
      add_edits(x, E::RIGHT, -1.0f);
    }

    // ---- U^T = x solve^T -----------------------------------------------------------------------------------------------
    float u[NC][4] = {};
#pragma unroll
    for (int step = 0; step < C; step += STEP) {
      const auto a = Op::accumulators(&x[step / 8]);
#pragma unroll
      for (int j = step / 16 * 2; j < NC; j += 2) {
        typename Op::B b[2];
        Op::load_rows(b, now.solve, 8 * j, step);
        Op::multiply(u[j], a, b[0]), Op::multiply(u[j + 1], a, b[1]);
      }
    }
    if (FULL && p.right != nullptr) {
#pragma unroll
      for (int j = 0; j < NC; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int token = 8 * j + c + e % 2, v = g + e / 2 * 8;
          if (token < count && v < columns)
            p.right[((s.row * p.T + s.origin + first + token) * p.H + h) * p.V + column + v] = u[j][e];
        }
    }

    // ---- O^T = e^G scale / |q| Y^T + U^T reach^T -------------------------------------------------------------------------
    if constexpr (FULL) {
      if constexpr (KP > 128) {
#pragma unroll
        for (int step = 0; step < KP; step += STEP) read_state(now.q, y, step, Op::accumulators(&state[step / 8]));
      }
#pragma unroll
      for (int j = 0; j < NC; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) y[j][e] *= now.factors[F::ASK + 8 * j + c + e % 2];
#pragma unroll
      for (int step = 0; step < C; step += STEP) {
        const auto a = Op::accumulators(&u[step / 8]);
#pragma unroll
        for (int j = step / 16 * 2; j < NC; j += 2) {
          typename Op::B b[2];
          Op::load_rows(b, now.reach, 8 * j, step);
          Op::multiply(y[j], a, b[0]), Op::multiply(y[j + 1], a, b[1]);
        }
      }
      if (edited) add_edits(y, E::OUT, 1.0f);
      // Through the warp's own values, which it has read, so that a token's columns leave together.
      tile::sync_warp();
#pragma unroll
      for (int j = 0; j < NC; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) *slab.at(8 * j + c + e % 2, g + e / 2 * 8) = Op::narrow(y[j][e]);
      tile::sync_warp();
      constexpr int SLAB_UNITS = 16 / EACH;
      const int64_t out = ((s.row * p.T + s.origin + first) * p.H + h) * p.V + column, row_stride = static_cast<int64_t>(p.H) * p.V;
      const bool whole = p.V % EACH == 0 && (sizeof(T) == 2 || p.o_type == Element::f32);
#pragma unroll
      for (int i = lane; i < C * SLAB_UNITS; i += tile::WARP) {
        const int row = i / SLAB_UNITS, unit = i % SLAB_UNITS;
        if (row >= count || unit * EACH >= columns) continue;
        const T* from = slab.unit(row, unit);
        if (whole) {
          *reinterpret_cast<tile::Vec16*>(static_cast<T*>(p.o) + out + row * row_stride + unit * EACH) =
              *reinterpret_cast<const tile::Vec16*>(from);
        } else {
          for (int l = 0; l < EACH && unit * EACH + l < columns; l++)
            write(p.o, p.o_type, out + row * row_stride + unit * EACH + l, tile::load_float(from + l));
        }
      }
    }

    // ---- states asked for --------------------------------------------------------------------------------------------------
    if (FULL && place >= 0) {
      const float* factors = p.factors + (slot * p.H + h) * F::SIZE;
      for (; place >= 0; place = p.next_place[place] - 1) {
        const int token = static_cast<int>(p.places[2 * place + 1] - first);
        const auto since = [&](int j) {
          return tile::exponential((factors[F::WHOLE + token] - factors[F::WHOLE + j]) + (factors[F::REST + token] - factors[F::REST + j]));
        };
        const float decay = tile::exponential(factors[F::WHOLE + token] + factors[F::REST + token]);
        float* to = p.snapshots + (static_cast<int64_t>(place) * p.H + h) * p.K * p.V + column;
        float part[NC][4];
#pragma unroll
        for (int j = 0; j < NC; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int from = 8 * j + c + e % 2;
            part[j][e] = from <= token ? since(from) * factors[F::KEY + from] * u[j][e] : 0.0f;
          }
#pragma unroll
        for (int m = 0; m < NK; m += 2) {
          float shot[2][4];
#pragma unroll
          for (int i = 0; i < 2; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) shot[i][e] = decay * state[m + i][e];
#pragma unroll
          for (int step = 0; step < C; step += STEP) {
            const auto a = Op::accumulators(&part[step / 8]);
            typename Op::B b[2];
            Op::load_columns(b, now.k, step, 8 * m);
            Op::multiply(shot[0], a, b[0]), Op::multiply(shot[1], a, b[1]);
          }
#pragma unroll
          for (int i = 0; i < 2; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
              const int k = 8 * (m + i) + c + e % 2, v = g + e / 2 * 8;
              if (k >= p.K || v >= columns) continue;
              float total = shot[i][e];
              for (int64_t x = edits_begin; x < edits_end; x++) {
                const int at = static_cast<int>(p.edits.index[4 * x + 1] - first);
                if (at > token || p.edits.index[4 * x + 3] == 1) continue;
                total += since(at) * p.edits.left[x * p.K + k] * p.edits.right[x * p.V + column + v];
              }
              to[static_cast<int64_t>(k) * p.V + v] = total;
            }
        }
      }
    }

    // ---- S^T = e^{G_C} S^T + (e^{G_C - G} r U)^T K -----------------------------------------------------------------------------
    const float decay = now.factors[F::DECAY];
#pragma unroll
    for (int m = 0; m < NK; m++)
#pragma unroll
      for (int e = 0; e < 4; e++) state[m][e] *= decay;
#pragma unroll
    for (int j = 0; j < NC; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) u[j][e] *= now.factors[F::WRITE + 8 * j + c + e % 2];
#pragma unroll
    for (int step = 0; step < C; step += STEP) {
      const auto a = Op::accumulators(&u[step / 8]);
#pragma unroll
      for (int m = 0; m < NK; m += 2) {
        typename Op::B b[2];
        Op::load_columns(b, now.k, step, 8 * m);
        Op::multiply(state[m], a, b[0]), Op::multiply(state[m + 1], a, b[1]);
      }
    }
    if (edited) {
      for (int64_t e = edits_begin; e < edits_end; e++) {
        if (p.edits.index[4 * e + 3] == 1) continue;
        const float decayed = p.edit_factors[e * E::SIZE + E::END];
        const float* right = p.edits.right + e * p.V + column;
        const float w[2] = {g < columns ? decayed * right[g] : 0.0f, g + 8 < columns ? decayed * right[g + 8] : 0.0f};
#pragma unroll
        for (int m = 0; m < NK; m++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int k = 8 * m + c + i;
            const float left = k < p.K ? p.edits.left[e * p.K + k] : 0.0f;
            state[m][i] += left * w[0], state[m][2 + i] += left * w[1];
          }
      }
    }
    if (p.stages == 1 && chunk + 1 < end) {
      tile::sync();
      issue(stage(0), chunk + 1);
    }
  }

  // ---- the state at the end -------------------------------------------------------------------------------------------
  if (FULL && end < chunks) return;
  const int width = moves ? p.K : p.V;
  float* to = FULL ? p.final_state + head * p.K * p.V : (moves ? p.moves : p.adds) + (head * p.segments + segment) * p.K * width;
  each_owned<KP>(p.K, columns, [&](int i, int e, int k, int v) {
    // PLANT 3, out of bounds: one row further
    to[(static_cast<int64_t>(k) + (WRITESAE_PLANT == 3)) * width + column + v] = state[i][e];
  });
}

}  // namespace writesae::cuda
