// A scan's walk along the chunks of a sequence with the state on chip. See scan.cuh.
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

#include "scan_channels.cuh"

namespace writesae::cuda {

// What a warp's lanes own of states [K, width] in memory, 16 columns from `column`: f(n, e, offset) for their element
// (k, v) = (8 n + c + e % 2, column + g + 8 (e / 2)).
template <int KP, class F>
__device__ __forceinline__ void each_owned(int K, int width, int column, const F& f) {
  const int lane = tile::fresh(tile::lane()), v = column + lane / 4, c = 2 * (lane % 4);
  const int64_t apart = tile::fresh(static_cast<int64_t>(width));
  int64_t at = c * apart + v;
#pragma unroll
  for (int n = 0; n < KP / 8; n++, at += 8 * apart)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (8 * n + c + e % 2 < K && v + e / 2 * 8 < width) f(n, e, at + e % 2 * apart + e / 2 * 8);
}

// S^T += X^T rows, from results X^T [16, COUNT]: COUNT tokens, rows[first ..], x[token / 8]. `down`: lane_place_down(rows).
template <class T, int KP, int COUNT, class Down>
__device__ __forceinline__ void add_tokens(float (&state)[KP / 8][4], const Tile<T, KP>& rows, const Down& down, int first,
                                           const float (*x)[4]) {
  using Op = Operand<T>;
#pragma unroll
  for (int step = 0; step < COUNT; step += Op::STEP) {
    const auto a = Op::accumulators(x + step / 8);
#pragma unroll
    for (int m = 0; m < KP / 8; m += 2) {
      typename Op::B b[2];
      Op::load_columns(b, rows, down, first + step, 8 * m);
      Op::multiply(state[m], a, b[0]), Op::multiply(state[m + 1], a, b[1]);
    }
  }
}

// S^T += factor times what edit e adds, in the warp's value columns from `column`; `left_side`: that of the keys.
template <int KP>
__device__ __forceinline__ void add_edit(float (&state)[KP / 8][4], const Problem& p, int64_t e, const float* left_side,
                                         int column, float factor) {
  const int lane = tile::fresh(tile::lane()), g = lane / 4, c = 2 * (lane % 4), columns = p.V - column;
  const float* right = p.edits.right + e * p.V + column;
  const float w[2] = {g < columns ? factor * right[g] : 0.0f, g + 8 < columns ? factor * right[g + 8] : 0.0f};
#pragma unroll
  for (int m = 0; m < KP / 8; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int k = 8 * m + c + i;
      const float left = k < p.K ? left_side[k] : 0.0f;
      state[m][i] += left * w[0], state[m][2 + i] += left * w[1];
    }
}

// The rows that a walk multiplies states with; keys to write by are in the place of keys to read by where nothing reads.
template <class Rule>
__device__ __forceinline__ const Rows& read_rows(const Given<Rule>& p) {
  if constexpr (Rule::CHANNEL) return Rule::READS ? p.read : p.write;
  return p.k;
}
template <class Rule>
__device__ __forceinline__ const Rows& ask_rows(const Given<Rule>& p) {
  if constexpr (Rule::CHANNEL) return p.ask;
  return p.q;
}

// The edits of one (sequence, value head), passed in order of position.
struct EditWalk {
  int at, position;

  // The position of edit `at`, or none.
  __device__ __forceinline__ void look(const EditList& edits, int n, int h) {
    const int64_t* x = edits.index + 4 * static_cast<int64_t>(at);
    position = at < edits.count && x[0] == n && x[2] == h ? static_cast<int>(x[1]) : INT32_MAX;
  }
};

// FULL: outputs and everything asked for. Otherwise only the state at the end of each segment from a zero start (`adds`), and
// the end of a unit start without values (`moves`; of a rule that does not read only what it decays by), for `join`.
template <class Rule, class T, int KP, int WARPS, bool FULL>
__global__ void __launch_bounds__(32 * WARPS, WARPS == 4 ? 2 : 1) walk(const __grid_constant__ Given<Rule> p) {
  using Op = Operand<T>;
  constexpr int C = Op::CHUNK, STEP = Op::STEP, THREADS = 32 * WARPS, EACH = Tile<T, KP>::EACH;
  constexpr int IMAGE = Triangle<T, C>::SIZE, FACTORS = (Factors<C>::HOT + 31) / 32 * 32, NC = C / 8, NK = KP / 8;
  constexpr int PART = KP > 128 ? (NC >= 8 ? NC / 4 : NC / 2) : NC;  // outputs at a time: a large state leaves few registers
  using F = Factors<C>;
  using E = EditFactors<C>;
  constexpr int VECTORS = FACTORS + (Rule::CHANNEL ? KP : 0);
  struct Stage {
    Tile<T, KP> k, q, write, erase_write;  // keys to read by, queries, keys to write by
    Triangle<T, C> solve, reach, mix, erase_reach;
    Tile<T, 16> v;  // of the warp
    float* factors;
  };
  tile::Shared shared;
  T* const shared_k = shared.template take<T>(p.stages * KP * C);
  T* const shared_solve = Rule::READS ? shared.template take<T>(p.stages * IMAGE) : nullptr;
  T* const shared_v = shared.template take<T>(p.stages * WARPS * C * 16);
  float* const shared_factors = shared.template take<float>(p.stages * VECTORS);
  T* const shared_q = FULL ? shared.template take<T>(p.stages * KP * C) : nullptr;
  T* const shared_reach = FULL ? shared.template take<T>(p.stages * IMAGE) : nullptr;
  T* const shared_write = Rule::CHANNEL && Rule::READS ? shared.template take<T>(p.stages * KP * C) : shared_k;
  T* const shared_erase_write = Rule::LOW_RANK ? shared.template take<T>(p.stages * KP * C) : nullptr;
  T* const shared_mix = Rule::LOW_RANK ? shared.template take<T>(p.stages * IMAGE) : nullptr;
  T* const shared_erase_reach = Rule::LOW_RANK && FULL ? shared.template take<T>(p.stages * IMAGE) : nullptr;
  const auto stage = [&](int i) -> Stage {
    const int at = i * KP * C, image = i * IMAGE;
    return {{shared_k, at},
            {shared_q, at},
            {shared_write, at},
            {shared_erase_write, at},
            {shared_solve, image},
            {shared_reach, image},
            {shared_mix, image},
            {shared_erase_reach, image},
            {shared_v, (i * WARPS + tile::warp()) * C * 16},
            shared_factors + i * VECTORS};
  };

  // ---- where -------------------------------------------------------------------------------------------------------
  const int warp = tile::warp();
  const int value_tiles = (p.V + 16 * WARPS - 1) / (16 * WARPS);
  const int tiles = value_tiles + (FULL || !Rule::READS ? 0 : (p.K + 16 * WARPS - 1) / (16 * WARPS));
  int rest_of = tile::block_x();
  const int column_tile = rest_of % tiles;
  rest_of /= tiles;
  const int h = rest_of % p.H, value_head = h;
  rest_of /= p.H;
  const int segment = rest_of % p.segments, n = rest_of / p.segments, key_head = Rule::CHANNEL ? h : h / (p.H / p.Hk);
  const Sequence s = sequence<C>(p, n);
  const int64_t origin = s.row * p.T + s.origin;  // the sequence's first token, of all tokens
  const int length = static_cast<int>(s.length), chunks = (length + C - 1) / C, begin = segment * p.segment_chunks;
  const int end = chunks - begin < p.segment_chunks ? chunks : begin + p.segment_chunks;
  if (segment > 0 && begin >= chunks) return;
  if (!FULL && end == chunks) return;  // nobody starts where the last segment ends
  const bool moves = !FULL && Rule::READS && column_tile >= value_tiles;
  const int column = (column_tile - (moves ? value_tiles : 0)) * 16 * WARPS + 16 * warp;  // of the warp
  const int columns = (moves ? p.K : p.V) - column;                                       // may be <= 0

  // Beside a large state there are no registers for places that all chunks share: they are made anew.
  const auto again = [](auto x) {
    if constexpr (KP > 128) return tile::fresh(x);
    return x;
  };
  const auto head = [&] { return static_cast<int64_t>(again(n)) * p.H + value_head; };
  const auto slot = [&](int chunk) { return sequence<C>(p, again(n)).first_slot + chunk; };

  // ---- the next chunk's copies --------------------------------------------------------------------------------------
  const auto issue = [&](const Stage& to, int chunk) {
    const int thread = again(tile::thread()), lane = thread % tile::WARP, h = again(value_head), hk = again(key_head);
    const int first = chunk * C, left = length - first;
    const Sequence s = sequence<C>(p, again(n));
    const int64_t at = (s.first_slot + chunk) * p.H + h;
    constexpr int UNITS = KP / EACH, SLAB_UNITS = 16 / EACH, APART = THREADS / UNITS, SLAB_APART = 32 / SLAB_UNITS;
    const auto rows = [&](const Tile<T, KP>& tile, const Rows& from) {
      const int row = thread / UNITS, column = thread % UNITS * EACH;
      const int64_t step = tile::fresh(APART * from.stride[1]);
      const T* x = from.template at<T>(s.row, s.origin + first + row, hk) + column;
#pragma unroll(KP > 128 ? 2 : C / APART)
      for (int i = 0; i < C / APART; i++, x += step)
        tile::copy_16(tile.at(row + i * APART, column), x, row + i * APART < left && column < from.width);
    };
    const auto image = [&](const Triangle<T, C>& to, const void* from) {
      const T* x = static_cast<const T*>(from) + at * IMAGE + thread * EACH;
#pragma unroll
      for (int i = 0; i < IMAGE / EACH; i += THREADS)
        if (i + THREADS <= IMAGE / EACH || i + thread < IMAGE / EACH)
          tile::copy_16(to.data + to.start + (i + thread) * EACH, x + i * EACH);
    };
    rows(to.k, read_rows<Rule>(p));
    if constexpr (Rule::CHANNEL && Rule::READS) rows(to.write, p.write);
    if constexpr (Rule::LOW_RANK) {
      rows(to.erase_write, p.erase_write);
      image(to.mix, p.mix);
    }
    if constexpr (Rule::READS) image(to.solve, p.solve);
    if (!moves) {
      const int row = lane / SLAB_UNITS, unit = lane % SLAB_UNITS * EACH;
      const int64_t step = tile::fresh(SLAB_APART * p.v.stride[1]);
      const T* x = p.v.template at<T>(s.row, s.origin + first + row, h) + column + unit;
#pragma unroll
      for (int i = 0; i < C / SLAB_APART; i++, x += step)
        tile::copy_16(to.v.at(row + i * SLAB_APART, unit), x, row + i * SLAB_APART < left && column + unit < p.v.width);
    }
    const float* factors = p.factors + at * F::SIZE;
    if (thread < F::HOT / 4) tile::copy_16(to.factors + 4 * thread, factors + 4 * thread);
    if constexpr (Rule::CHANNEL) {
      if (thread < KP / 4) tile::copy_16(to.factors + FACTORS + 4 * thread, p.decays + at * KP + 4 * thread);
    }
    if constexpr (FULL) {
      rows(to.q, ask_rows<Rule>(p));
      image(to.reach, p.reach);
      if constexpr (Rule::LOW_RANK) image(to.erase_reach, p.erase_reach);
    }
    tile::commit_copies();
  };
  // The rows of a place that a state is asked for.
  const auto issue_shot = [&](const Tile<T, KP>& to, const void* from, int place) {
    if constexpr (Rule::CHANNEL) {
      const T* x = static_cast<const T*>(from) + (static_cast<int64_t>(place) * p.H + h) * C * p.write.width;
      for (int i = tile::thread(); i < C * (KP / EACH); i += THREADS) {
        const int row = i / (KP / EACH), unit = i % (KP / EACH) * EACH;
        tile::copy_16(to.at(row, unit), x + row * p.write.width + unit, unit < p.write.width);
      }
      tile::commit_copies();
    }
  };
  if (begin < end) issue(stage(0), begin);

  // ---- the state before the first chunk ------------------------------------------------------------------------------
  float state[NK][4] = {};
  if (moves) {
    each_owned<KP>(p.K, p.K, column,
                   [&](int i, int e, int64_t at) { state[i][e] = static_cast<int>(at) % (p.K + 1) == 0 ? 1.0f : 0.0f; });
  } else if (FULL && (segment > 0 || p.initial_state != nullptr)) {
    const float* from =
        segment > 0 ? p.adds + (head() * p.segments + segment - 1) * p.K * p.V : p.initial_state + head() * p.K * p.V;
#if WRITESAE_PLANT == 1  // a wrong carry: segments start from the state one further back
    if (segment > 1) from -= p.K * p.V;
#endif
    each_owned<KP>(p.K, p.V, column, [&](int i, int e, int64_t at) { state[i][e] = from[at]; });
  }
  float passed = 1, channels_passed[(KP + THREADS - 1) / THREADS];  // what the segment decays a state by
  for (float& x : channels_passed) x = 1;
  EditWalk edit = {p.edits.count > 0 ? static_cast<int>(first_edit(p.edits, n, h, begin * C)) : 0, INT32_MAX};
  if (p.edits.count > 0) edit.look(p.edits, n, h);

  for (int chunk = begin; chunk < end; chunk++) {
    const int half = p.stages == 2 ? (chunk - begin) % 2 : 0;
    const Stage now = stage(half);
    const int first = chunk * C, count = length - first < C ? length - first : C;
    tile::wait_copies<0>();
#if WRITESAE_PLANT != 2  // a missing barrier
    tile::sync();
#endif
    if (p.stages == 2 && chunk + 1 < end) issue(stage(1 - half), chunk + 1);
    const int lane = tile::fresh(tile::lane()), g = lane / 4, c = 2 * (lane % 4);
    const int along = Op::lane_place_along(now.k), along_image = Op::lane_place_along(Rule::READS ? now.solve : now.reach);
    const auto down = Op::lane_place_down(now.k);
    const bool edited = !moves && edit.position < first + count;
    const int edits_begin = edit.at;
    int edits_end = edit.at;
    int place = -1;
    if (FULL && p.first_place != nullptr) place = p.first_place[slot(chunk)] - 1;

    // ---- X^T = S^T K^T and Y^T = S^T Q^T ---------------------------------------------------------------------------
    float x[NC][4] = {}, y[PART][4] = {};
    const auto read_state = [&](const Tile<T, KP>& rows, float (*to)[4], int token, int tokens, int step,
                                const typename Op::A& a) {
#pragma unroll
      for (int j = 0; j < tokens / 8; j += 2) {
        typename Op::B b[2];
        Op::load_rows(b, rows, along, token + 8 * j, step);
        Op::multiply(to[j], a, b[0]), Op::multiply(to[j + 1], a, b[1]);
      }
    };
#pragma unroll
    for (int step = 0; step < KP; step += STEP) {
      const auto a = Op::accumulators(&state[step / 8]);
      if constexpr (Rule::READS) read_state(now.k, x, 0, C, step, a);
      if constexpr (FULL && PART == NC) read_state(now.q, y, 0, C, step, a);
    }

    const int along_slab = Op::lane_place_along(now.v);
    // ---- V^T - e^G r X^T, or beta V^T ------------------------------------------------------------------------------------------
    float native[Rule::LOW_RANK ? NC : 1][4];
#pragma unroll
    for (int j = 0; j < NC; j += 2) {
      float v[2][4] = {};
      if (!moves) Op::load_transposed(v, now.v, along_slab, 8 * j);
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float read = now.factors[F::READ + 8 * (j + i) + c + e % 2];
          if constexpr (Rule::LOW_RANK) {
            native[j + i][e] = read * v[i][e];
          } else {
            x[j + i][e] = Rule::READS ? v[i][e] - read * x[j + i][e] : read * v[i][e];
          }
        }
    }
    // Adds factor (token) times the value side of every added edit of this chunk: rows of the edit list at `kind`.
    const auto add_edits = [&](float (*to)[4], int token, int tokens, int kind, float sign) {
      const int lane = tile::fresh(tile::lane()), g = lane / 4, c = 2 * (lane % 4);
#pragma unroll 1
      for (int64_t e = edits_begin; e < edits_end; e++) {
        if (!p.edits.kind(e).adds()) continue;
        const float* right = p.edits.right + e * p.V + column;
        const float* factors = p.edit_factors + e * E::SIZE + kind + token;
        const float w[2] = {g < columns ? sign * right[g] : 0.0f, g + 8 < columns ? sign * right[g + 8] : 0.0f};
#pragma unroll
        for (int j = 0; j < tokens / 8; j++)
#pragma unroll
          for (int i = 0; i < 4; i++) to[j][i] += factors[8 * j + c + i % 2] * w[i / 2];
      }
    };
    if (edited) {
      if (tile::thread() == 0) tile::count("chunks with edits");
      for (; edit.position < first + count; edits_end = edit.at) edit.at++, edit.look(p.edits, n, h);
      if constexpr (Rule::READS) add_edits(x, 0, C, E::RIGHT, Rule::LOW_RANK ? 1.0f : -1.0f);
    }

    // ---- U^T = x solve^T, or R^T ----------------------------------------------------------------------------------------
    float own[NC][4] = {};
    const auto solve = [&](const Triangle<T, C>& image, const float (*from)[4]) {
#pragma unroll
      for (int step = 0; step < C; step += STEP) {
        const auto a = Op::accumulators(&from[step / 8]);
#pragma unroll
        for (int j = step / 16 * 2; j < NC; j += 2) {
          typename Op::B b[2];
          Op::load_rows(b, image, along_image, 8 * j, step);
          Op::multiply(own[j], a, b[0]), Op::multiply(own[j + 1], a, b[1]);
        }
      }
    };
    if constexpr (Rule::READS) solve(now.solve, x);
    if constexpr (Rule::LOW_RANK) solve(now.mix, native);
    float (&u)[NC][4] = *(Rule::READS ? &own : &x);  // R of a low-rank erase
    const auto leave = [&](float* right, const float (*from)[4]) {
      const int64_t apart = tile::fresh(static_cast<int64_t>(p.H) * p.V);
      float* to = right + ((origin + first + c) * p.H + h) * p.V + column + g;
#pragma unroll
      for (int j = 0; j < NC; j++, to += 8 * apart)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (8 * j + c + e % 2 < count && g + e / 2 * 8 < columns) to[e % 2 * apart + e / 2 * 8] = from[j][e];
    };
    if constexpr (Rule::LOW_RANK) {
      if (FULL && p.right != nullptr) leave(p.right, native);
      if (FULL && p.erased != nullptr) leave(p.erased, u);
    } else {
      if (FULL && p.right != nullptr) leave(p.right, u);
    }

    // ---- O^T = e^G scale / |q| Y^T + U^T reach^T -------------------------------------------------------------------------
    if constexpr (FULL) {
      tile::sync_warp();  // outputs go through the warp's own values, which it has read: a token's columns leave together
#pragma unroll
      for (int first_tile = 0; first_tile < NC; first_tile += PART) {
        if constexpr (PART < NC) {
#pragma unroll
          for (int j = 0; j < PART; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) y[j][e] = 0;
#pragma unroll
          for (int step = 0; step < KP; step += STEP) {
            float anew[STEP / 8]
                      [4];  // or the state's operands stay in registers from part to part, and the state is spilled
#pragma unroll
            for (int i = 0; i < STEP / 8; i++)
#pragma unroll
              for (int e = 0; e < 4; e++) anew[i][e] = tile::fresh(state[step / 8 + i][e]);
            read_state(now.q, y, 8 * first_tile, 8 * PART, step, Op::accumulators(anew));
          }
        }
#pragma unroll
        for (int j = 0; j < PART; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) y[j][e] *= now.factors[F::ASK + 8 * (first_tile + j) + c + e % 2];
        const auto reach = [&](const Triangle<T, C>& image, const float (*from)[4]) {
#pragma unroll
          for (int step = 0; step < C; step += STEP) {
            const auto a = Op::accumulators(&from[step / 8]);
#pragma unroll
            for (int j = 0; j < PART; j += 2) {
              if (8 * (first_tile + j) + 16 <= step) continue;
              typename Op::B b[2];
              Op::load_rows(b, image, along_image, 8 * (first_tile + j), step);
              Op::multiply(y[j], a, b[0]), Op::multiply(y[j + 1], a, b[1]);
            }
          }
        };
        if constexpr (Rule::LOW_RANK) {
          reach(now.erase_reach, u);
          reach(now.reach, native);
        } else {
          reach(now.reach, u);
        }
        if (edited) add_edits(y, 8 * first_tile, 8 * PART, E::OUT, 1.0f);
#pragma unroll
        for (int j = 0; j < PART; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) *now.v.at(8 * (first_tile + j) + c + e % 2, g + e / 2 * 8) = Op::narrow(y[j][e]);
      }
      tile::sync_warp();
      constexpr int SLAB_UNITS = 16 / EACH, APART = 32 / SLAB_UNITS;
      const bool whole = p.V % EACH == 0 && (sizeof(T) == 2 || p.o_type == Element::f32);
      const int row = lane / SLAB_UNITS, unit = lane % SLAB_UNITS * EACH;
      const int64_t apart = tile::fresh(static_cast<int64_t>(p.H) * p.V);
      int64_t out = ((origin + first + row) * p.H + h) * p.V + column + unit;
#pragma unroll
      for (int i = 0; i < C / APART; i++, out += APART * apart) {
        if (row + i * APART >= count || unit >= columns) continue;
        const T* from = now.v.at(row + i * APART, unit);
        if (whole) {
          *reinterpret_cast<tile::Vec16*>(static_cast<T*>(p.o) + out) = *reinterpret_cast<const tile::Vec16*>(from);
        } else {
#pragma unroll 1
          for (int l = 0; l < EACH && unit + l < columns; l++) write(p.o, p.o_type, out + l, tile::load_float(from + l));
        }
      }
    }

    // ---- states asked for --------------------------------------------------------------------------------------------------
#pragma unroll 1
    for (; FULL && place >= 0; place = p.next_place[place] - 1) {
      const int lane = tile::fresh(tile::lane()), g = lane / 4, c = 2 * (lane % 4);
      const float* factors = p.factors + (slot(chunk) * p.H + h) * F::SIZE;
      const int token = static_cast<int>(p.places[2 * static_cast<int64_t>(place) + 1]) - first;
      const float whole = factors[F::WHOLE + token], rest = factors[F::REST + token];
      const auto since = [&](int j) {
        if constexpr (Rule::CHANNEL) return 1.0f;
        return tile::exponential((whole - factors[F::WHOLE + j]) + (rest - factors[F::REST + j]));
      };
      // The place's rows, where the keys to read by were, or the queries where those are the keys to write by, which the erase's
      // come to as well.
      const Tile<T, KP>& shot_keys = Rule::CHANNEL && !Rule::READS ? now.q : now.k;
      if constexpr (Rule::CHANNEL) {
        tile::sync();
        issue_shot(shot_keys, p.shot_rows, place);
        if constexpr (Rule::LOW_RANK) issue_shot(now.q, p.erase_shots, place);
        tile::wait_copies<0>();
        tile::sync();
      }
      const int64_t apart = tile::fresh(static_cast<int64_t>(p.V));
      float* const from = p.snapshots + (static_cast<int64_t>(place) * p.H + h) * p.K * apart + column + c * apart + g;
      typename Op::A part[C / STEP], erase_part[Rule::LOW_RANK ? C / STEP : 1];
#pragma unroll
      for (int step = 0; step < C; step += STEP) {
        float scaled[STEP / 8][4], erased[STEP / 8][4];
#pragma unroll
        for (int i = 0; i < STEP / 8; i++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int j = step + 8 * i + c + e % 2;
            if constexpr (Rule::LOW_RANK) {
              scaled[i][e] = j <= token ? factors[F::KEPT + j] * native[step / 8 + i][e] : 0.0f;
              erased[i][e] = j <= token ? u[step / 8 + i][e] : 0.0f;
            } else {
              scaled[i][e] = j <= token ? since(j) * factors[F::KEPT + j] * u[step / 8 + i][e] : 0.0f;
            }
          }
        part[step / STEP] = Op::accumulators(scaled);
        if constexpr (Rule::LOW_RANK) erase_part[step / STEP] = Op::accumulators(erased);
        tile::sync_warp();  // here and below: one round after the other, or their loads take all registers
      }
      const float decay = tile::exponential(whole + rest);
      float* to = from;
#pragma unroll
      for (int m = 0; m < NK; m += 2) {
        tile::sync_warp();
        float shot[2][4];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            if constexpr (Rule::CHANNEL) {
              const int k = 8 * (m + i) + c + e % 2;
              shot[i][e] =
                  k < p.K ? p.shot_decays[(static_cast<int64_t>(place) * p.H + h) * p.K + k] * state[m + i][e] : 0.0f;
            } else {
              shot[i][e] = decay * state[m + i][e];
            }
          }
#pragma unroll
        for (int step = 0; step < C; step += STEP) {
          typename Op::B b[2];
          Op::load_columns(b, shot_keys, down, step, 8 * m);
          Op::multiply(shot[0], part[step / STEP], b[0]), Op::multiply(shot[1], part[step / STEP], b[1]);
          if constexpr (Rule::LOW_RANK) {
            Op::load_columns(b, now.q, down, step, 8 * m);
            Op::multiply(shot[0], erase_part[step / STEP], b[0]), Op::multiply(shot[1], erase_part[step / STEP], b[1]);
          }
        }
#pragma unroll
        for (int i = 0; i < 2; i++, to += 8 * apart)
#pragma unroll
          for (int e = 0; e < 4; e++)
            if (8 * (m + i) + c + e % 2 < p.K && g + e / 2 * 8 < columns) to[e % 2 * apart + e / 2 * 8] = shot[i][e];
      }
#pragma unroll 1
      for (int64_t x = edits_begin; x < edits_end; x++) {  // each lane adds to what it wrote
        const int at = static_cast<int>(p.edits.index[4 * x + 1]) - first;
        if (at > token || !p.edits.kind(x).adds()) continue;
        const float d = since(at);
#pragma unroll 1
        for (int k = c; k < p.K; k += k % 2 == 0 ? 1 : 7) {
          float decayed = d;
          if constexpr (Rule::CHANNEL) decayed = tile::exponential(channel_sum(p, s, first + at + 1, first + token, h, k));
#pragma unroll 1
          for (int v = g; v < 16 && v < columns; v += 8)
            from[(k - c) * apart + v - g] += decayed * p.edits.left[x * p.K + k] * p.edits.right[x * p.V + column + v];
        }
      }
    }

    // ---- S^T = e^{G_C} S^T + (e^{G_C - G} r U)^T K -----------------------------------------------------------------------------
    const float decay = now.factors[F::DECAY];
    if constexpr (!FULL && !Rule::READS) {
      if constexpr (Rule::CHANNEL) {
        for (int i = 0; i < (KP + THREADS - 1) / THREADS; i++)
          if (i * THREADS + tile::thread() < KP) channels_passed[i] *= now.factors[FACTORS + i * THREADS + tile::thread()];
      } else {
        passed *= decay;
      }
    }
#pragma unroll
    for (int m = 0; m < NK; m++)
#pragma unroll
      for (int e = 0; e < 4; e++) state[m][e] *= Rule::CHANNEL ? now.factors[FACTORS + 8 * m + c + e % 2] : decay;
    float (&written)[NC][4] = *[&] {
      if constexpr (Rule::LOW_RANK)
        return &native;
      else
        return &u;
    }();
#pragma unroll
    for (int j = 0; j < NC; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) written[j][e] *= now.factors[F::WRITE + 8 * j + c + e % 2];
    add_tokens<T, KP, C>(state, now.write, down, 0, written);
    if constexpr (Rule::LOW_RANK) add_tokens<T, KP, C>(state, now.erase_write, down, 0, u);
    if (edited) {
#pragma unroll 1
      for (int64_t e = edits_begin; e < edits_end; e++)
        if (p.edits.kind(e).adds()) {
          if constexpr (Rule::CHANNEL) {
            add_edit<KP>(state, p, e, p.edit_rows + e * p.K, column, 1.0f);
          } else {
            add_edit<KP>(state, p, e, p.edits.left + e * p.K, column, p.edit_factors[e * E::SIZE + E::END]);
          }
        }
    }
    if (p.stages == 1 && chunk + 1 < end) {
      tile::sync();
      issue(stage(0), chunk + 1);
    }
  }

  // ---- the first increment that is not finite, which has left its column of the state so: see scan.h --------------------------
  if (FULL && p.first_nonfinite != nullptr && !(finite(state[0][0]) && finite(state[0][2]))) {
    const int lane = tile::fresh(tile::lane()), g = lane / 4, c = 2 * (lane % 4);
    const int last = end * C < length ? end * C : length;
    const Sequence s = sequence<C>(p, again(n));
#pragma unroll 1
    for (int v = g; v < 16 && v < columns; v += 8)
#pragma unroll 1
      for (int t = begin * C + c; t < last; t += t % 2 == 0 ? 1 : 7) {  // what the lane has written itself
        const int64_t at = (s.row * p.T + s.origin + t) * p.H + value_head;
        bool bad = !finite(p.right[at * p.V + column + v]);
        if constexpr (Rule::LOW_RANK) bad = bad || !finite(p.erased[at * p.V + column + v]);
        if (bad) {
          note_nonfinite(p.first_nonfinite + s.row, (s.origin + t) * p.H + value_head);
          break;
        }
      }
  }

  // ---- the state at the end -------------------------------------------------------------------------------------------
  if (FULL && end < chunks) return;
  if constexpr (!FULL && !Rule::READS && Rule::CHANNEL) {
    for (int i = 0; i < (KP + THREADS - 1) / THREADS; i++) {
      const int k = i * THREADS + tile::thread();
      if (column_tile == 0 && k < p.K) p.moves[(head() * p.segments + segment) * p.K + k] = channels_passed[i];
    }
  } else if constexpr (!FULL && !Rule::READS) {
    if (column_tile == 0 && tile::thread() == 0) p.moves[head() * p.segments + segment] = passed;
  }
  const int width = moves ? p.K : p.V;
  float* to =
      FULL ? p.final_state + head() * p.K * p.V : (moves ? p.moves : p.adds) + (head() * p.segments + segment) * p.K * width;
  each_owned<KP>(p.K, width, column, [&](int i, int e, int64_t at) {
    to[at + (WRITESAE_PLANT == 3 ? width : 0)] = state[i][e];  // PLANT 3: out of bounds by a row
  });
}

}  // namespace writesae::cuda
