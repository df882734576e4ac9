// The backward of a scan whose gate is of each key channel, the kernel after the walks: what scan_gradients.cuh is to a gate of
// each head. Sums along the value columns are the same; between tokens a gate is a row of K numbers.
//
// Tokens go in sixteens, as in scan_prepare_channels.cuh, a warp each. With T_w the gates of sixteen w, E_j those of a token's own
// sixteen up to it and L_i those after it (products of gates, vectors of K), what token j has of everything before its
// sixteen is one row, made by going along the sixteens before it as a state would:
//     X_j <- dO_j S0^T,    X_j <- T_w o X_j + sum over i of w: e_ji (L_i o k_i)      for w before j's,    then E_j o X_j
// and the same for Y with f in e's place, and backward for what token i has of everything after its sixteen:
//     Z_i <- U_i D^T,      Z_i <- T_w o Z_i + sum over j of w: e_ji (E_j o q_j) - beta_j f_ji (E_j o k_j),    then L_i o Z_i
// Sums over tokens are matrix products of rows that hold E and L already. Tokens of one sixteen meet pair by pair, a lane a
// channel with the sixteen in its registers, where gates multiply from token to token and nothing is exponentiated.
//
// A low-rank erase has a in the place of the key that reads: Y is of a, with the gates before its own token, and nothing of it is
// multiplied by -beta. Rows are written by k and by b, so the kernel runs twice; the second time (ERASE) b and R are in the place
// of k and the native increments, the state before is left out, and what it finds is added to what the first run left.
//
// dg_l sums, of each channel, all that decays through token l: pairs of its own sixteen; rows of its sixteen with what came
// before it, or goes beyond it; and what passes its whole sixteen: from the state or an earlier sixteen to a later one or the
// adjoint. Only such terms, so that a strong gate keeps its own precision.
//
// Arithmetic beside the sums along value columns, bf16, a block, chunk of 64 tokens and KT = 64: 96 products (16 x 8 x 16) of X and
// Y and 96 of Z; and 8 times (a warp and 32 channels) about 2.5 k instructions for the pairs. Shared memory 86 KB, so two blocks
// an SM of sm_90, as by registers.
#pragma once

#include "scan_gradients.cuh"
#include "scan_prepare_channels.cuh"

namespace writesae::cuda {

template <class T, int KT>
struct ChannelGradientsShared {
  static constexpr int C = Operand<T>::CHUNK, WARPS = C / 16, ROWS = C * KT, IMAGE = C * C;
  // What sum_values has; later two images (then Z in their place), X and Y, and e and f of each sixteen.
  static constexpr size_t IMAGES = 2 * IMAGE * sizeof(T) > ROWS * 4 ? 2 * IMAGE * sizeof(T) : ROWS * 4;
  static constexpr size_t AFTER = IMAGES + 2 * ROWS * 4 + 2 * C * 16 * 4;
  static constexpr size_t STAGE = GradientsShared<T, KT>::STAGE, WORK = STAGE > AFTER ? STAGE : AFTER;
  static constexpr int VECTORS = 2 * C + (WARPS * WARPS + 2 * WARPS) * KT + 2 * C;  // floats
  static constexpr size_t BYTES = 3 * ROWS * sizeof(T) + WORK + VECTORS * 4;
};

// The sum over the rows of a warp's 16, of what lanes hold of two.
__device__ __forceinline__ float column_sum(float x) {
#pragma unroll
  for (int step = 4; step < tile::WARP; step *= 2) x += tile::shuffle_xor(x, step);
  return x;
}

// x[l], summed over the warp, in lanes l and 16 + l.
__device__ __forceinline__ float sum_of_16(float (&x)[16], int lane) {
#pragma unroll
  for (int i = 0; i < 16; i++) x[i] += tile::shuffle_xor(x[i], 16);
  return sum_by_lane<8>(x, lane);
}

template <class Rule, class T, int KT, bool ERASE>
__global__ void __launch_bounds__(2 * Operand<T>::CHUNK) gradients_channels(const __grid_constant__ GivenBack<Rule> b) {
  constexpr bool DELTA = Rule::READS && !Rule::LOW_RANK;
  using Op = Operand<T>;
  using Size = ChannelGradientsShared<T, KT>;
  constexpr int C = Op::CHUNK, STEP = Op::STEP, THREADS = 2 * C, WARPS = C / 16, NK = KT / 8, NC = C / 8;
  using F = Factors<C>;
  const Problem& p = b.p;
  tile::Shared shared;
  // L o k, E o k (or a) and E o q.
  const Tile<T, KT> later = {shared.template take<T>(Size::ROWS)}, keys = {shared.template take<T>(Size::ROWS)};
  const Tile<T, KT> queries = {shared.template take<T>(Size::ROWS)};
  T* const work = shared.template take<T>(Size::WORK / sizeof(T));
  const Tile<T, KT> start = {work + 3 * GradientsShared<T, KT>::VALUES}, end = {start.data + GradientsShared<T, KT>::STATES};
  const Tile<T, C> to_keys = {work}, between_keys = {work + Size::IMAGE};  // of e and -beta f, transposed
  float* const after_images = reinterpret_cast<float*>(work + Size::IMAGES / sizeof(T));
  const Tile<float, KT> x_out = {after_images}, y_out = {after_images + Size::ROWS};
  const Tile<float, KT> z_out = {reinterpret_cast<float*>(work)};
  float* const diagonal = after_images + 2 * Size::ROWS;  // [e, f][sixteen][i][j]
  float* const beta = shared.template take<float>(C);
  float* const value = shared.template take<float>(C);
  float* const totals = shared.template take<float>(WARPS * KT);  // T_w
  float* const onward = shared.template take<float>(WARPS * KT);  // of a sixteen, with the adjoint: sum of (L o k) Z
  float* const through = shared.template take<float>(WARPS * WARPS * KT);  // of sixteen j, with all before sixteen i
  float* const overlaps = shared.template take<float>(2 * C);              // [THREADS]  of S0 and D, by channel

  const int tiles = (p.K + KT - 1) / KT, key_tile = tile::block_x() % tiles, column = key_tile * KT;
  const int hk = tile::block_x() / tiles % p.Hk, group = p.H / p.Hk;
  const int64_t slot = tile::block_x() / tiles / p.Hk;
  const Chunk at = chunk_at<C>(p, slot);
  const int count = at.count;
  if (count <= 0) return;
  const int64_t row = at.s.row, token = at.s.origin + at.first, first_row = row * p.T + token;

#pragma unroll 1
  for (int h = hk * group; h < (hk + 1) * group; h++) {
    tile::sync();  // the head before is done with everything
    const int thread = tile::fresh(tile::thread()), warp = thread / tile::WARP, lane = thread % tile::WARP;
    const int g = lane / 4, c = 2 * (lane % 4), top = 16 * warp;
    const float* const factors = p.factors + (slot * p.H + h) * F::SIZE;
    if (thread < C) beta[thread] = factors[F::BETA + thread], value[thread] = 0;

    // ---- a channel of a sixteen: its gates, keys and queries --------------------------------------------------------------
    const auto gate_of = [&](int j, int channel) {
      return j < count && channel < p.K ? tile::exponential(channel_gate(p, at.s, at.first + j, h, channel)) : 1.0f;
    };
    const auto key_of = [&](int j, int channel) {
      if (j >= count || channel >= p.K) return 0.0f;
      if constexpr (ERASE) return tile::load_float(b.b.template at<T>(row, token + j, h) + channel);
      return factors[F::KEY + j] * tile::load_float(p.k.template at<T>(row, token + j, hk) + channel);
    };
    const auto reader_of = [&](int j, int channel) {
      if constexpr (Rule::LOW_RANK) {
        if (j < count && channel < p.K) return tile::load_float(b.a.template at<T>(row, token + j, h) + channel);
      }
      return 0.0f;
    };
    const auto query_of = [&](int j, int channel) {
      if (j >= count || channel >= p.K) return 0.0f;
      return factors[F::QUERY + j] * tile::load_float(p.q.template at<T>(row, token + j, hk) + channel);
    };
#pragma unroll 1
    for (int part = 0; part < KT; part += tile::WARP) {
      const int here = part + lane, channel = column + here;
      float gate[16], k[16], product = 1;
#pragma unroll
      for (int i = 0; i < 16; i++) gate[i] = gate_of(top + i, channel), k[i] = key_of(top + i, channel);
#pragma unroll
      for (int i = 0; i < 16; i++) {
        if constexpr (Rule::LOW_RANK) *keys.at(top + i, here) = Op::narrow(product * reader_of(top + i, channel));
        product *= gate[i];
        if constexpr (DELTA) *keys.at(top + i, here) = Op::narrow(product * k[i]);
        *queries.at(top + i, here) = Op::narrow(product * query_of(top + i, channel));
      }
      totals[warp * KT + here] = product;
      product = 1;
#pragma unroll
      for (int i = 15; i >= 0; i--) *later.at(top + i, here) = Op::narrow(product * k[i]), product *= gate[i];
    }

    const auto increments = [&]() -> const View& {
      if constexpr (ERASE) {
        return b.erased;
      } else {
        return b.right;
      }
    };
    // ---- along the value columns --------------------------------------------------------------------------------------------
    float x[NK][4] = {}, y[NK][4] = {}, z[NK][4] = {}, e[NC][4] = {}, f[NC][4] = {}, overlap = 0;
    const auto overlap_states = [&](int thread) {
      if constexpr (ERASE) return;
#pragma unroll 4
      for (int v = thread / KT; v < GradientsShared<T, KT>::VT; v += THREADS / KT)
        overlap += tile::load_float(start.at(v, thread % KT)) * tile::load_float(end.at(v, thread % KT));
    };
    sum_values<Rule, T, KT, ERASE>(b, increments(), row, token, slot, h, column, count, warp, work, beta, value, x, y, z, e,
                                   f, overlap_states);
    overlaps[thread] = overlap;
    tile::sync();  // the tiles are read, and images may lie there

    // ---- from before the own sixteen to it: X and Y -----------------------------------------------------------------------
    const auto down_rows = Op::lane_place_down(later);
    const auto decay = [&](float (&rows)[NK][4], int sixteen) {
#pragma unroll
      for (int m = 0; m < NK; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) rows[m][i] *= totals[sixteen * KT + 8 * m + c + i % 2];
    };
    const float strength[2] = {Rule::LOW_RANK ? 1.0f : -beta[top + g], Rule::LOW_RANK ? 1.0f : -beta[top + g + 8]};
#pragma unroll
    for (int j = 0; j < WARPS; j++) {
      if (j > warp) continue;
      float* const to_diagonal = diagonal + warp * 256;
      if (j == warp) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int l = 0; l < 4; l++) {
            const int to = (8 * i + c + l % 2) * 16 + g + l / 2 * 8;
            to_diagonal[to] = e[2 * j + i][l];
            if constexpr (Rule::READS) to_diagonal[16 * C + to] = f[2 * j + i][l];
          }
        continue;
      }
#pragma unroll
      for (int m = 0; m < NK; m++)
#pragma unroll
        for (int l = 0; l < 2; l++) {
          const int here = 8 * m + c + l;
          float sum = 0;
#pragma unroll
          for (int i = 0; i < 2; i++) {
            sum += tile::load_float(queries.at(top + g + 8 * i, here)) * x[m][2 * i + l];
            if constexpr (Rule::READS)
              sum += strength[i] * tile::load_float(keys.at(top + g + 8 * i, here)) * y[m][2 * i + l];
          }
          sum = column_sum(sum);
          if (g == 0) through[(warp * WARPS + j) * KT + here] = sum;
        }
      decay(x, j);
      if constexpr (Rule::READS) decay(y, j);
#pragma unroll
      for (int step = 0; step < 16; step += STEP) {
        const auto left_e = Op::accumulators(&e[2 * j + step / 8]), left_f = Op::accumulators(&f[2 * j + step / 8]);
#pragma unroll
        for (int m = 0; m < NK; m += 2) {
          typename Op::B r[2];
          Op::load_columns(r, later, down_rows, 16 * j + step, 8 * m);
#pragma unroll
          for (int i = 0; i < 2; i++) {
            Op::multiply(x[m + i], left_e, r[i]);
            if constexpr (Rule::READS) Op::multiply(y[m + i], left_f, r[i]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int l = 0; l < 4; l++) {
          const int from = 16 * j + 8 * i + c + l % 2, to = top + g + l / 2 * 8;
          *to_keys.at(from, to) = Op::narrow(e[2 * j + i][l]);
          if constexpr (Rule::READS) *between_keys.at(from, to) = Op::narrow(strength[l / 2] * f[2 * j + i][l]);
        }
    }
    const auto leave = [&](const Tile<float, KT>& to, const float (&from)[NK][4]) {
#pragma unroll
      for (int m = 0; m < NK; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) store_pair(to.at(top + g + 8 * i, 8 * m + c), from[m][2 * i], from[m][2 * i + 1]);
    };
    leave(x_out, x);
    if constexpr (Rule::READS) leave(y_out, y);

    // ---- from the own sixteen to after it: Z ---------------------------------------------------------------------------------
#pragma unroll
    for (int i = 0; i < 2; i++) {
      // A native write that is removed after its read reaches nothing after the chunk, which it ends.
      const bool kept = ERASE || factors[F::KEPT + top + g + 8 * i] != 0;
#pragma unroll
      for (int m = 0; m < NK; m++)
#pragma unroll
        for (int l = 0; l < 2; l++) z[m][2 * i + l] = kept ? z[m][2 * i + l] : 0.0f;
    }
#pragma unroll
    for (int m = 0; m < NK; m++)
#pragma unroll
      for (int l = 0; l < 2; l++) {
        const int here = 8 * m + c + l;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 2; i++) sum += tile::load_float(later.at(top + g + 8 * i, here)) * z[m][2 * i + l];
        sum = column_sum(sum);
        if (g == 0) onward[warp * KT + here] = sum;
      }
    tile::sync();
    const auto down_image = Op::lane_place_down(to_keys);
#pragma unroll 1
    for (int j = WARPS - 1; j > warp; j--) {
      decay(z, j);
#pragma unroll
      for (int step = 0; step < 16; step += STEP) {
        typename Op::B r[2];
        const auto left_e = Op::load_left(to_keys, down_image, top, 16 * j + step);
#pragma unroll
        for (int m = 0; m < NK; m += 2) {
          Op::load_columns(r, queries, down_rows, 16 * j + step, 8 * m);
          Op::multiply(z[m], left_e, r[0]), Op::multiply(z[m + 1], left_e, r[1]);
        }
        if constexpr (Rule::READS) {
          const auto left_f = Op::load_left(between_keys, down_image, top, 16 * j + step);
#pragma unroll
          for (int m = 0; m < NK; m += 2) {
            Op::load_columns(r, keys, down_rows, 16 * j + step, 8 * m);
            Op::multiply(z[m], left_f, r[0]), Op::multiply(z[m + 1], left_f, r[1]);
          }
        }
      }
    }
    tile::sync();  // images are read, and Z may lie there
    leave(z_out, z);
    tile::sync_warp();

    // ---- pairs of one sixteen, and out ------------------------------------------------------------------------------------
    const EditRange range = edits_at(p.edits, at.n, h, at.first + count - 1);
    float d_beta = 0;
#pragma unroll 1
    for (int part = 0; part < KT; part += tile::WARP) {
      const int here = part + lane, channel = column + here;
      float gate[16], k[16], q[16], a[Rule::LOW_RANK ? 16 : 1], dq[16], dy[16], dk[16], dg[16], faded[16];
      // What passes the whole sixteen: from the state to the adjoint, from an earlier one to it, from before to a later one.
      float passing = 0;
      for (int i = 0; i < THREADS / KT; i++) passing += overlaps[i * KT + here];
      const auto passed = [&](float x, int first, int last) {
        for (int w = first; w <= last; w++) x *= totals[w * KT + here];
        return x;
      };
      passing = passed(passing, 0, WARPS - 1);
      for (int i = 0; i < warp; i++) passing += passed(onward[i * KT + here], i + 1, WARPS - 1);
      for (int j = warp + 1; j < WARPS; j++) passing += passed(through[(j * WARPS + warp) * KT + here], warp, j - 1);

#pragma unroll
      for (int i = 0; i < 16; i++)
        gate[i] = gate_of(top + i, channel), k[i] = key_of(top + i, channel), q[i] = query_of(top + i, channel);
      if constexpr (Rule::LOW_RANK) {
#pragma unroll
        for (int i = 0; i < 16; i++) a[i] = reader_of(top + i, channel);
      }
      float product = 1, sum = passing;
#pragma unroll
      for (int j = 0; j < 16; j++) {
        dy[j] = Rule::READS ? product * *y_out.at(top + j, here) : 0.0f;
        product *= gate[j];
        dq[j] = product * *x_out.at(top + j, here);
        if constexpr (DELTA) dy[j] *= gate[j];
      }
#pragma unroll
      for (int l = 15; l >= 0; l--) {
        sum += q[l] * dq[l];
        if constexpr (DELTA) sum -= beta[top + l] * k[l] * dy[l];
        dg[l] = sum;
        if constexpr (Rule::LOW_RANK) sum += a[l] * dy[l];
      }
      product = 1;
#pragma unroll
      for (int j = 15; j >= 0; j--) dk[j] = product * *z_out.at(top + j, here), product *= gate[j];
      sum = 0;
#pragma unroll
      for (int l = 0; l < 16; l++) dg[l] += sum, sum += k[l] * dk[l];
#pragma unroll
      for (int i = 0; i < 16; i++) {
        tile::sync_warp();  // one round after the other: or all loads come first, and fill the registers
        float of_e[16], of_f[16];
        const float* const from = diagonal + warp * 256 + i * 16;
#pragma unroll
        for (int j = i / 4 * 4; j < 16; j += 4) {
          const auto x = *reinterpret_cast<const tile::Vec16*>(from + j);
          const auto y = *reinterpret_cast<const tile::Vec16*>(from + (Rule::READS ? 16 * C : 0) + j);
#pragma unroll
          for (int l = 0; l < 4; l++) of_e[j + l] = tile::bits_to_float(x.x[l]), of_f[j + l] = tile::bits_to_float(y.x[l]);
        }
        dq[i] += of_e[i] * k[i];
        faded[i] = k[i];
#pragma unroll
        for (int j = i + 1; j < 16; j++) {
          if constexpr (Rule::LOW_RANK) dy[j] += of_f[j] * faded[j - 1];
          faded[j] = faded[j - 1] * gate[j];
          dq[j] += of_e[j] * faded[j];
          if constexpr (DELTA) dy[j] += of_f[j] * faded[j];
        }
        float rest = 0;
#pragma unroll
        for (int l = 15; l > i; l--) {
          rest += of_e[l] * q[l];
          if constexpr (DELTA) rest -= beta[top + l] * of_f[l] * k[l];
          rest *= gate[l];
          dg[l] += faded[l - 1] * rest;
          if constexpr (Rule::LOW_RANK) rest += of_f[l] * a[l];
        }
        dk[i] += of_e[i] * q[i] + rest;
      }
      // What the last token asks of the edits made there.
#pragma unroll 1
      for (int64_t i = range.begin; i < range.end && !ERASE; i++) {
        if (!p.edits.kind(i).adds() || p.edits.kind(i).after() || (count - 1) / 16 != warp) continue;
        float asked = 0;
        for (int v = lane; v < b.d_o.width && v < p.V; v += tile::WARP)
          asked += p.edits.right[i * p.V + v] * tile::load_float(b.d_o.template at<T>(row, token + count - 1, h) + v);
        asked = tile::warp_sum(asked) * (channel < p.K ? p.edits.left[i * p.K + channel] : 0.0f);
#pragma unroll
        for (int j = 0; j < 16; j++) dq[j] += top + j == count - 1 ? asked : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < 16; j++) {
        if constexpr (DELTA) dk[j] -= beta[top + j] * dy[j], dy[j] *= -k[j];
        if (top + j >= count || channel >= p.K) continue;
        float* const to = b.parts + ((first_row + j + top) * p.Hk + hk) * 2 * p.K + channel;
        const int64_t own = ((first_row + j + top) * p.H + h) * p.K + channel;
        const bool first = h == hk * group;
        if constexpr (ERASE) {
          to[0] += dq[j];
          write(b.d_a, b.a_type, own, b.a_parts[own] + dy[j]), write(b.d_b, b.b_type, own, dk[j]);
          write(b.d_g, b.g_type, own, b.g_parts[own] + dg[j]);
        } else {
          to[0] = first ? dq[j] : to[0] + dq[j];
          to[p.K] = first ? dk[j] : to[p.K] + dk[j];
          if constexpr (Rule::LOW_RANK) {
            b.a_parts[own] = dy[j], b.g_parts[own] = dg[j];
          } else {
            write(b.d_g, b.g_type, own, dg[j]);
          }
        }
      }
      if constexpr (DELTA) d_beta += sum_of_16(dy, lane);
    }
    if constexpr (ERASE) continue;
    const int j = top + lane;
    if (lane >= 16 || j >= count) continue;
    const int64_t to = (first_row + j) * p.H + h;
    b.scalars[(2 * to + 1) * tiles + key_tile] = p.removed != nullptr && p.removed[to] != 0 ? 0.0f : d_beta + value[j];
  }
}

}  // namespace writesae::cuda
