// The backward of a scan, the two walks along the chunks of a sequence: `starts` forward, which leaves the state
// before every chunk, and `reverse` backward, which leaves the adjoint of the state after every chunk and dY. See
// scan_backward.cuh.
//
// As in the forward's walk a warp owns 16 value columns and keeps everything transposed: S^T and D^T [16, K] in its
// registers as results of 16 x 8 tiles, and results of one product are the left operand of the next. Increments are known,
// so that `starts` has one product a chunk. A state leaves through the warp's own shared memory, in rows of K.
//
// Products (16 x 8 x 16) of `reverse`, bf16, K = 128, a warp and chunk of 64 tokens: 64 K D + 20 reach + 20 N + 64 Q + 64 K, as
// the forward's. Shared memory of a block: 102 KB with the states' ways out (K = 128, bf16), so two fit an SM of sm_90.
#pragma once

#include "scan_backward.cuh"
#include "scan_walk.cuh"

namespace writesae::cuda {

// Where a walk's block and warp are.
struct Lane {
  int n, h, hk, column, columns;  // column: of the warp; columns: from there on
  int64_t head;
  __device__ __forceinline__ explicit Lane(const Problem& p) {
    const int tiles = (p.V + 16 * BACK_WARPS - 1) / (16 * BACK_WARPS);
    int rest = tile::block_x();
    column = (rest % tiles * BACK_WARPS + tile::warp()) * 16;
    rest /= tiles;
    h = rest % p.H, n = rest / p.H, hk = h / (p.H / p.Hk);
    columns = p.V - column, head = static_cast<int64_t>(n) * p.H + h;
  }
};

// Rows of keys or queries of a chunk, and its factors, on the way to shared memory.
template <class T, int KP>
__device__ __forceinline__ void issue_rows(const Tile<T, KP>& to, const Rows& from, int64_t row, int64_t token, int head,
                                           int count) {
  constexpr int EACH = Tile<T, KP>::EACH, UNITS = KP / EACH;
  const T* x = from.template at<T>(row, token, head);
#pragma unroll 4
  for (int i = tile::thread(); i < Operand<T>::CHUNK * UNITS; i += 32 * BACK_WARPS) {
    const int j = i / UNITS, unit = i % UNITS * EACH;
    tile::copy_16(to.at(j, unit), x + j * from.stride[1] + unit, j < count && unit < from.width);
  }
}

template <int C>
__device__ __forceinline__ void issue_factors(float* to, const Problem& p, int64_t slot, int h) {
  const float* from = p.factors + (slot * p.H + h) * Factors<C>::SIZE;
  for (int i = 4 * tile::thread(); i < Factors<C>::SIZE; i += 4 * 32 * BACK_WARPS) tile::copy_16(to + i, from + i);
}

// e^{G_C} of each channel.
template <int KP>
__device__ __forceinline__ void issue_decays(float* to, const ChannelBackward& b, int64_t slot, int h) {
  for (int i = 4 * tile::thread(); i < KP; i += 4 * 32 * BACK_WARPS)
    tile::copy_16(to + i, b.decays + (slot * b.p.H + h) * KP + i);
}

// The warp's columns of a state, transposed, to [V, width] in memory.
template <class T, int KP>
__device__ __forceinline__ void leave_state(const float (&state)[KP / 8][4], const Tile<T, KP>& slab, T* to, int width,
                                            int column, int V) {
  constexpr int EACH = Tile<T, KP>::EACH, UNITS = KP / EACH;
  const int lane = tile::fresh(tile::lane()), g = lane / 4, c = 2 * (lane % 4);
  tile::sync_warp();
#pragma unroll
  for (int m = 0; m < KP / 8; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) store_pair(slab.at(g + 8 * i, 8 * m + c), state[m][2 * i], state[m][2 * i + 1]);
  tile::sync_warp();
#pragma unroll 4
  for (int i = lane; i < 16 * UNITS; i += tile::WARP) {
    const int v = column + i / UNITS, unit = i % UNITS * EACH;
    if (v < V && unit < width)
      *reinterpret_cast<tile::Vec16*>(to + static_cast<int64_t>(v) * width + unit) =
          *reinterpret_cast<const tile::Vec16*>(slab.at(i / UNITS, unit));
  }
}

template <class Rule, class T, int KP>
__global__ void __launch_bounds__(32 * BACK_WARPS, KP <= 64 ? (Rule::LOW_RANK ? 3 : 4) : 1)
    starts(const __grid_constant__ GivenBack<Rule> b) {
  using Op = Operand<T>;
  constexpr int C = Op::CHUNK, NK = KP / 8;
  using F = Factors<C>;
  const Problem& p = b.p;
  tile::Shared shared;
  const Tile<T, KP> k = {shared.template take<T>(KP * C)};
  const Tile<T, KP> slab = {shared.template take<T>(BACK_WARPS * 16 * KP), tile::warp() * 16 * KP};
  float* const factors = shared.template take<float>(F::SIZE);
  float* const decays = Rule::CHANNEL ? shared.template take<float>(KP) : nullptr;
  const Tile<T, KP> erase_write = {Rule::LOW_RANK ? shared.template take<T>(KP * C) : nullptr};
  const Lane at(p);
  const Span span = span_of<C>(b, at.n);

  float state[NK][4] = {};
  if (p.initial_state != nullptr) {
    const float* from = p.initial_state + at.head * p.K * p.V;
    each_owned<KP>(p.K, p.V, at.column, [&](int i, int e, int64_t x) { state[i][e] = from[x]; });
  }
  for (int chunk = 0; chunk < span.chunks; chunk++) {
    const Cut cut = cut_of<C>(b, span, chunk);
    const int64_t slot = span.first_slot + chunk, token = span.s.origin + cut.first;
    const bool last = chunk + 1 == span.chunks;
    tile::sync();
    if (!last) {
      if constexpr (Rule::CHANNEL) {
        issue_rows<T, KP>(k, b.write, span.s.row, token, at.h, cut.count);
        issue_decays<KP>(decays, b, slot, at.h);
      } else {
        issue_rows<T, KP>(k, p.k, span.s.row, token, at.hk, cut.count);
      }
      if constexpr (Rule::LOW_RANK) issue_rows<T, KP>(erase_write, b.erase_write, span.s.row, token, at.h, cut.count);
      issue_factors<C>(factors, p, slot, at.h);
      tile::commit_copies();
    }
    leave_state<T, KP>(state, slab, static_cast<T*>(b.starts) + (slot * p.H + at.h) * p.V * b.key_width, b.key_width,
                       at.column, p.V);
    if (last) break;
    const int lane = tile::fresh(tile::lane()), g = lane / 4, c = 2 * (lane % 4);
    float u[C / 8][4];
    const auto load = [&](const View& from) {
#pragma unroll
      for (int j = 0; j < C / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int i = 8 * j + c + e % 2, v = g + e / 2 * 8;
          u[j][e] = i < cut.count && v < at.columns ? read(from, span.s.row, token + i, at.h, at.column + v) : 0.0f;
        }
    };
    load(b.right);
    tile::wait_copies<0>();
    tile::sync();
    const float decay = factors[F::DECAY];
#pragma unroll
    for (int m = 0; m < NK; m++)
#pragma unroll
      for (int e = 0; e < 4; e++) state[m][e] *= Rule::CHANNEL ? decays[8 * m + c + e % 2] : decay;
    const auto down = Op::lane_place_down(k);
#pragma unroll
    for (int j = 0; j < C / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) u[j][e] *= factors[F::WRITE + 8 * j + c + e % 2];
    add_tokens<T, KP, C>(state, k, down, 0, u);
    if constexpr (Rule::LOW_RANK) {
      load(b.erased);
      add_tokens<T, KP, C>(state, erase_write, down, 0, u);
    }
    const EditRange range = edits_at(p.edits, at.n, at.h, cut.first + cut.count - 1);
#pragma unroll 1
    for (int64_t e = range.begin; e < range.end; e++)
      if (p.edits.kind(e).adds()) add_edit<KP>(state, p, e, p.edits.left + e * p.K, at.column, 1.0f);
  }
}

template <class Rule, class T, int KP>
__global__ void __launch_bounds__(32 * BACK_WARPS,
                                  KP <= 64 ? ((Rule::READS && !Rule::CHANNEL) || (sizeof(T) == 2 && !Rule::LOW_RANK) ? 3 : 2)
                                           : 1) reverse(const __grid_constant__ GivenBack<Rule> b) {
  using Op = Operand<T>;
  constexpr int C = Op::CHUNK, STEP = Op::STEP, NK = KP / 8, NC = C / 8, EACH = Tile<T, KP>::EACH;
  constexpr int IMAGE = Triangle<T, C>::SIZE, SLAB_UNITS = 16 / EACH;
  using F = Factors<C>;
  const Problem& p = b.p;
  tile::Shared shared;
  const Tile<T, KP> k = {shared.template take<T>(KP * C)}, q = {shared.template take<T>(KP * C)};
  const Triangle<T, C> inverse = {Rule::READS ? shared.template take<T>(IMAGE) : nullptr};
  const Triangle<T, C> reach = {shared.template take<T>(IMAGE)};
  const Tile<T, 16> rows = {shared.template take<T>(BACK_WARPS * C * 16), tile::warp() * C * 16};  // of dO, then of dY
  const Tile<T, KP> slab = {shared.template take<T>(BACK_WARPS * 16 * KP), tile::warp() * 16 * KP};
  float* const factors = shared.template take<float>(F::SIZE);
  float* const decays = Rule::CHANNEL ? shared.template take<float>(KP) : nullptr;
  const Tile<T, KP> erase_write = {Rule::LOW_RANK ? shared.template take<T>(KP * C) : nullptr};
  const Triangle<T, C> found = {Rule::LOW_RANK ? shared.template take<T>(IMAGE) : nullptr};
  const Triangle<T, C> erase_reach = {Rule::LOW_RANK ? shared.template take<T>(IMAGE) : nullptr};
  // Of a gate of each channel: its keys to read by, over the slabs once states are out; k are those to write by.
  const Tile<T, KP> keys = {Rule::CHANNEL ? slab.data : k.data};
  const Lane at(p);
  const Span span = span_of<C>(b, at.n);

  float state[NK][4] = {};  // D^T
  if (b.d_final_state != nullptr) {
    const float* from = b.d_final_state + at.head * p.K * p.V;
    each_owned<KP>(p.K, p.V, at.column, [&](int i, int e, int64_t x) { state[i][e] = from[x]; });
  }
  for (int chunk = span.chunks - 1; chunk >= 0; chunk--) {
    const Cut cut = cut_of<C>(b, span, chunk);
    const int64_t slot = span.first_slot + chunk, token = span.s.origin + cut.first;
    tile::sync();
    if constexpr (Rule::CHANNEL) {
      issue_rows<T, KP>(k, b.write, span.s.row, token, at.h, cut.count);
      issue_rows<T, KP>(q, b.ask, span.s.row, token, at.h, cut.count);
      issue_decays<KP>(decays, b, slot, at.h);
    } else {
      issue_rows<T, KP>(k, p.k, span.s.row, token, at.hk, cut.count);
      issue_rows<T, KP>(q, p.q, span.s.row, token, at.hk, cut.count);
    }
    issue_factors<C>(factors, p, slot, at.h);
    const auto image = [&](const Triangle<T, C>& to, const void* from) {
      const T* x = static_cast<const T*>(from) + (slot * p.H + at.h) * IMAGE;
#pragma unroll 4
      for (int i = tile::thread() * EACH; i < IMAGE; i += 32 * BACK_WARPS * EACH) tile::copy_16(to.data + i, x + i);
    };
    if constexpr (Rule::READS) image(inverse, p.solve);
    image(reach, p.reach);
    if constexpr (Rule::LOW_RANK) {
      issue_rows<T, KP>(erase_write, b.erase_write, span.s.row, token, at.h, cut.count);
      image(found, b.found), image(erase_reach, b.erase_reach);
    }
    {
      const T* x = b.d_o.template at<T>(span.s.row, token, at.h) + at.column;
#pragma unroll 4
      for (int i = tile::lane(); i < C * SLAB_UNITS; i += tile::WARP) {
        const int j = i / SLAB_UNITS, unit = i % SLAB_UNITS * EACH;
        tile::copy_16(rows.at(j, unit), x + j * b.d_o.stride[1] + unit, j < cut.count && at.column + unit < b.d_o.width);
      }
    }
    tile::commit_copies();

    // ---- what snapshots add, and the adjoint as it stands ---------------------------------------------------------------
#pragma unroll 1
    for (int shot = b.first_shot == nullptr ? 0 : b.first_shot[slot]; shot > 0; shot = b.next_shot[shot - 1]) {
      const float* from = b.d_snapshots + ((shot - 1) * static_cast<int64_t>(p.H) + at.h) * p.K * p.V;
      each_owned<KP>(p.K, p.V, at.column, [&](int i, int e, int64_t x) { state[i][e] += from[x]; });
    }
    leave_state<T, KP>(state, slab, static_cast<T*>(b.ends) + (slot * p.H + at.h) * p.V * b.key_width, b.key_width,
                       at.column, p.V);
    tile::wait_copies<0>();
#if WRITESAE_PLANT != 4  // a missing barrier
    tile::sync();
#endif
    if constexpr (Rule::CHANNEL && Rule::READS) {
      issue_rows<T, KP>(keys, b.read, span.s.row, token, at.h, cut.count);
      tile::commit_copies();
    }
    const int lane = tile::fresh(tile::lane()), g = lane / 4, c = 2 * (lane % 4);
    const int along = Op::lane_place_along(k), along_rows = Op::lane_place_along(rows);
    const auto down = Op::lane_place_down(k), down_image = Op::lane_place_down(Rule::READS ? inverse : reach);

    // ---- R^T = dR^T + e^{G_C - G} r D^T K^T + dO^T reach ------------------------------------------------------------------
    float r[NC][4] = {}, native[Rule::LOW_RANK ? NC : 1][4];  // of a low-rank erase r is dR, and this dU
    const auto from_adjoint = [&](float (*to)[4], const Tile<T, KP>& rows) {
#pragma unroll
      for (int step = 0; step < KP; step += STEP) {
        const auto a = Op::accumulators(&state[step / 8]);
#pragma unroll
        for (int j = 0; j < NC; j += 2) {
          typename Op::B x[2];
          Op::load_rows(x, rows, along, 8 * j, step);
          Op::multiply(to[j], a, x[0]), Op::multiply(to[j + 1], a, x[1]);
        }
      }
    };
    if constexpr (Rule::LOW_RANK) {
      from_adjoint(r, erase_write);
#pragma unroll
      for (int j = 0; j < NC; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) native[j][e] = 0;
      from_adjoint(native, k);
    } else {
      from_adjoint(r, k);
    }
    float (*const increments)[4] = Rule::LOW_RANK ? native : r;
#pragma unroll
    for (int j = 0; j < NC; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) increments[j][e] *= factors[F::WRITE + 8 * j + c + e % 2];
#pragma unroll
    for (int j = 0; j < C; j += 16) {
      float o[2][4];
      tile::sync_warp();
      Op::load_transposed(o, rows, along_rows, j);
#pragma unroll
      for (int step = 0; step < 16; step += STEP) {
        const auto a = Op::accumulators(&o[step / 8]);
#pragma unroll
        for (int i = 0; i < j / 8 + 2; i += 2) {
          typename Op::B x[2];
          Op::load_columns(x, reach, down_image, j + step, 8 * i);
          Op::multiply(increments[i], a, x[0]), Op::multiply(increments[i + 1], a, x[1]);
          if constexpr (Rule::LOW_RANK) {
            Op::load_columns(x, erase_reach, down_image, j + step, 8 * i);
            Op::multiply(r[i], a, x[0]), Op::multiply(r[i + 1], a, x[1]);
          }
        }
      }
    }
    const auto add_given = [&](float (*to)[4], const View& given) {
#pragma unroll
      for (int j = 0; j < NC; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int i = 8 * j + c + e % 2, v = g + e / 2 * 8;
          if (i < cut.count && v < at.columns) to[j][e] += read(given, span.s.row, token + i, at.h, at.column + v);
        }
    };
    if (b.d_right.data != nullptr) add_given(increments, b.d_right);
    if constexpr (Rule::LOW_RANK) {
      if (b.d_erased.data != nullptr) add_given(r, b.d_erased);
    }

    // ---- D^T <- e^{G_C} D^T + (e^G scale / |q| dO)^T Q -------------------------------------------------------------------------
    const float decay = factors[F::DECAY];
#pragma unroll
    for (int m = 0; m < NK; m++)
#pragma unroll
      for (int e = 0; e < 4; e++) state[m][e] *= Rule::CHANNEL ? decays[8 * m + c + e % 2] : decay;
    const auto add_rows = [&](const Tile<T, KP>& from, int token, const float (*x)[4]) {
      tile::sync_warp();  // 16 tokens after the others: or all loads come first, and fill the registers
      add_tokens<T, KP, 16>(state, from, down, token, x);
    };
#pragma unroll
    for (int j = 0; j < C; j += 16) {
      float o[2][4];
      Op::load_transposed(o, rows, along_rows, j);
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) o[i][e] *= factors[F::ASK + j + 8 * i + c + e % 2];
      add_rows(q, j, o);
    }

    // ---- dY^T = R^T N, and out ----------------------------------------------------------------------------------------------
    float own[NC][4] = {};
    const auto transposed = [&](float (*to)[4], const float (*from)[4], const Triangle<T, C>& image) {
#pragma unroll
      for (int step = 0; step < C; step += STEP) {
        const auto a = Op::accumulators(&from[step / 8]);
#pragma unroll
        for (int i = 0; i < step / 16 * 2 + 2; i += 2) {
          typename Op::B x[2];
          Op::load_columns(x, image, down_image, step, 8 * i);
          Op::multiply(to[i], a, x[0]), Op::multiply(to[i + 1], a, x[1]);
        }
      }
    };
    if constexpr (Rule::READS) transposed(own, r, inverse);
    float (&y)[NC][4] = *(Rule::READS ? &own : &r);
    const auto leave = [&](void* values, const float (*from)[4]) {
      tile::sync_warp();
#pragma unroll
      for (int j = 0; j < NC; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) *rows.at(8 * j + c + e % 2, g + e / 2 * 8) = Op::narrow(from[j][e]);
      tile::sync_warp();
      T* to = static_cast<T*>(values) + ((span.s.row * p.T + token) * p.H + at.h) * b.value_width + at.column;
#pragma unroll 4
      for (int i = lane; i < C * SLAB_UNITS; i += tile::WARP) {
        const int j = i / SLAB_UNITS, unit = i % SLAB_UNITS * EACH;
        if (j < cut.count && at.column + unit < b.value_width)
          *reinterpret_cast<tile::Vec16*>(to + static_cast<int64_t>(j) * p.H * b.value_width + unit) =
              *reinterpret_cast<const tile::Vec16*>(rows.at(j, unit));
      }
    };
    leave(b.d_y, y);
    if constexpr (Rule::LOW_RANK) {
      transposed(native, y, found);
      leave(b.d_u, native);
    }

    // ---- D^T <- D^T - (e^G r beta dY)^T K ---------------------------------------------------------------------------------------
    if constexpr (Rule::READS) {
#pragma unroll
      for (int j = 0; j < NC; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int i = 8 * j + c + e % 2;
          if constexpr (!Rule::LOW_RANK) y[j][e] *= -factors[F::READ + i] * factors[F::BETA + i];
        }
      if constexpr (Rule::CHANNEL) {
        tile::wait_copies<0>();
        tile::sync();
      }
#pragma unroll
      for (int j = 0; j < C; j += 16) add_rows(keys, j, &y[j / 8]);
    }
  }
  float* to = b.d_initial_state + at.head * p.K * p.V;
  each_owned<KP>(p.K, p.V, at.column, [&](int i, int e, int64_t x) { to[x] = state[i][e]; });
}

}  // namespace writesae::cuda
