// The backward of a scan, the kernel after the walks: every gradient of a chunk but the state's, all chunks at once. See
// scan_backward.cuh.
//
// A block takes (chunk, key head, KT of the keys' columns), a warp 16 tokens. For each value head of the group in turn it goes
// along the value columns VT at a time
//     X += dO S0^T,  Y += dY S0^T,  Z += U D^T,  e += dO U^T,  f += dY U^T
// and makes gradients of those at the end; those of queries and keys are added to what the heads before left. Everything but
// dV is a sum over the keys' columns, so blocks of one head share nothing: each leaves its columns of dQ and dK, and its part
// of dg and dbeta for `finish` to add.
//
// Products (16 x 8 x 16), bf16, K = V = 128, a block, chunk of 64 tokens and value head: 256 each of X, Y and Z, 320 of e and f,
// 80 of the chunk's scores, 280 inside the chunk; two blocks a head: 2,900, 12 MFLOP. Shared memory 63 KB, so three blocks an SM
// of sm_90 by shared memory, two by registers (255 of 128 threads).
#pragma once

#include "scan_backward.cuh"
#include "scan_prepare.cuh"

namespace writesae::cuda {

template <class T, int KT>
struct GradientsShared {
  static constexpr int C = Operand<T>::CHUNK, VT = 64;
  static constexpr int VALUES = C * VT, STATES = VT * KT, IMAGE = C * C;  // elements of tiles
  static constexpr int VECTORS = 10;                                      // floats a token
  // dO, dY, U, S0^T and D^T; later two images and the sums between tokens, in their place.
  static constexpr size_t STAGE = (3 * VALUES + 2 * STATES) * sizeof(T);
  static constexpr size_t AFTER = 2 * IMAGE * sizeof(T) + C * Padded<C>::STRIDE * 4;
  static constexpr size_t WORK = STAGE > AFTER ? STAGE : AFTER;
  static constexpr size_t BYTES = 2 * C * KT * sizeof(T) + WORK + VECTORS * C * 4 + 128;
};

// The sum over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
  x += tile::shuffle_xor(x, 1);
  return x + tile::shuffle_xor(x, 2);
}

// Along the value columns, VT at a time: what it sums, and in the first keys' columns dV, and dY . V in `value`. ERASE: of the
// increments of an erase, `right`, which have no values, and without what the state before has to do with it. `work` is
// STAGE bytes of shared memory, beta and value [C] of it. on_states(thread): for every VT columns, while S0^T lies in `work`
// at 3 VALUES and D^T at STATES more.
template <class Rule, class T, int KT, bool ERASE, class OnStates>
__device__ __forceinline__ void sum_values(const GivenBack<Rule>& b, const View& right, int64_t row, int64_t token,
                                           int64_t slot, int h, int column, int count, int warp, T* work, const float* beta,
                                           float* value, float (&x)[KT / 8][4], float (&y)[KT / 8][4], float (&z)[KT / 8][4],
                                           float (&e)[Operand<T>::CHUNK / 8][4], float (&f)[Operand<T>::CHUNK / 8][4],
                                           const OnStates& on_states) {
  using Op = Operand<T>;
  using Size = GradientsShared<T, KT>;
  constexpr int C = Op::CHUNK, STEP = Op::STEP, THREADS = 2 * C, WARPS = C / 16, VT = Size::VT, NK = KT / 8;
  constexpr int EACH = Tile<T, KT>::EACH;
  const Problem& p = b.p;
  const Tile<T, VT> d_o = {work}, d_y = {work + Size::VALUES}, u = {work + 2 * Size::VALUES};
  const Tile<T, KT> start = {work + 3 * Size::VALUES}, end = {work + 3 * Size::VALUES + Size::STATES};
  const auto down_values = Op::lane_place_down(d_o), down_states = Op::lane_place_down(start);
  const int along_values = Op::lane_place_along(u);
#pragma unroll 1
  for (int v = 0; v < p.V; v += VT) {
    tile::sync();                                    // the last round's tiles have been read
    const int thread = tile::fresh(tile::thread());  // made anew: the products below need every register
    const int64_t first_row = tile::fresh(row) * p.T + token;
    const int64_t state_at = (slot * p.H + tile::fresh(h)) * p.V;
    constexpr int VALUE_UNITS = VT / EACH, KEY_UNITS = KT / EACH;
#pragma unroll 4
    for (int i = thread; i < VT * KEY_UNITS; i += THREADS) {
      const int j = i / KEY_UNITS, unit = i % KEY_UNITS * EACH;
      const bool real = v + j < p.V && column + unit < b.key_width;
      const int64_t from = (state_at + v + j) * b.key_width + column + unit;
      tile::copy_16(start.at(j, unit), static_cast<const T*>(b.starts) + from, real);
      tile::copy_16(end.at(j, unit), static_cast<const T*>(b.ends) + from, real);
    }
#pragma unroll 4
    for (int i = thread; i < C * VALUE_UNITS; i += THREADS) {
      const int j = i / VALUE_UNITS, unit = i % VALUE_UNITS * EACH;
      const T* from = static_cast<const T*>(b.d_y) + ((first_row + j) * p.H + h) * b.value_width + v + unit;
      tile::copy_16(d_y.at(j, unit), from, j < count && v + unit < b.value_width);
      tile::copy_16(d_o.at(j, unit), b.d_o.template at<T>(row, token + j, h) + v + unit,
                    j < count && v + unit < b.d_o.width);
    }
    tile::commit_copies();
#pragma unroll 4
    for (int i = thread; i < C * VT; i += THREADS) {
      const int j = i / VT, l = i % VT;
      *u.at(j, l) = Op::narrow(j < count && v + l < p.V ? read(right, row, token + j, h, v + l) : 0.0f);
    }
    tile::wait_copies<0>();
    tile::sync();

#pragma unroll 1
    for (int step = 0; step < VT; step += STEP) {
      const auto left_o = Op::load_left(d_o, down_values, 16 * warp, step);
      const auto left_y = Op::load_left(d_y, down_values, 16 * warp, step);
      const auto left_u = Op::load_left(u, down_values, 16 * warp, step);
      typename Op::B r[2];
#pragma unroll
      for (int m = 0; m < NK; m += 2) {
        Op::load_columns(r, start, down_states, step, 8 * m);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          if constexpr (!ERASE) Op::multiply(x[m + i], left_o, r[i]);
          if constexpr (!ERASE && Rule::READS) Op::multiply(y[m + i], left_y, r[i]);
        }
        Op::load_columns(r, end, down_states, step, 8 * m);
#pragma unroll
        for (int i = 0; i < 2; i++) Op::multiply(z[m + i], left_u, r[i]);
      }
#pragma unroll
      for (int j = 0; j < WARPS; j++) {
        if (j > warp) continue;
        Op::load_rows(r, u, along_values, 16 * j, step);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          Op::multiply(e[2 * j + i], left_o, r[i]);
          if constexpr (Rule::READS) Op::multiply(f[2 * j + i], left_y, r[i]);
        }
      }
    }
    on_states(thread);
    if (!ERASE && column == 0) {
#pragma unroll 1
      for (int i = thread; i < C * VALUE_UNITS; i += THREADS) {
        const int j = i / VALUE_UNITS, unit = i % VALUE_UNITS * EACH;
        const T *from = p.v.template at<T>(row, token + j, h) + v + unit, *d = d_y.at(j, unit);
        const int64_t to = ((first_row + j) * p.H + h) * p.V + v + unit;
        if constexpr (Rule::LOW_RANK)
          d = static_cast<const T*>(b.d_u) + ((first_row + j) * p.H + h) * b.value_width + v + unit;
        float sum = 0;
#pragma unroll 4
        for (int l = 0; l < EACH; l++) {
          if (j >= count || v + unit + l >= p.V) continue;
          const float dy = tile::load_float(d + l);
          sum += dy * tile::load_float(from + l);
          write(b.d_v, b.v_type, to + l, beta[j] * dy);
        }
#pragma unroll
        for (int step = 1; step < VALUE_UNITS; step *= 2) sum += tile::shuffle_xor(sum, step);
        if (unit == 0) value[j] += sum;  // the same thread for every v
      }
    }
  }
}

// Of float operands and no reads the compiler would rather spill than take registers from other blocks: told not to.
template <class Rule, class T, int KT>
__global__ void __launch_bounds__(2 * Operand<T>::CHUNK, !Rule::READS && sizeof(T) == 4 ? 1 : 0)
    gradients(const __grid_constant__ Backward b) {
  using Op = Operand<T>;
  using Size = GradientsShared<T, KT>;
  constexpr int C = Op::CHUNK, STEP = Op::STEP, THREADS = 2 * C, WARPS = C / 16, VT = Size::VT, NK = KT / 8, NC = C / 8;
  constexpr int EACH = Tile<T, KT>::EACH;
  using F = Factors<C>;
  const Problem& p = b.p;
  tile::Shared shared;
  const Tile<T, KT> k = {shared.template take<T>(C * KT)}, q = {shared.template take<T>(C * KT)};
  T* const work = shared.template take<T>(Size::WORK / sizeof(T));
  const Tile<T, KT> start = {work + 3 * Size::VALUES}, end = {work + 3 * Size::VALUES + Size::STATES};
  const Tile<T, C> to_keys = {work}, between_keys = {work + Size::IMAGE};  // of (e o D)^T and -(F + F^T)
  const Padded<C> within = {reinterpret_cast<float*>(work + 2 * Size::IMAGE)};
  float* const vectors = shared.template take<float>(Size::VECTORS * C);
  float *const key = vectors, *const query = key + C, *const beta = query + C, *const whole = beta + C;
  float *const rest = whole + C, *const since = rest + C, *const until = since + C, *const value = until + C;
  float *const on_start = value + C, *const on_end = on_start + C;
  float* const warps = shared.template take<float>(WARPS);

  const int tiles = (p.K + KT - 1) / KT, key_tile = tile::block_x() % tiles, column = key_tile * KT;
  const int hk = tile::block_x() / tiles % p.Hk, group = p.H / p.Hk;
  const int64_t slot = tile::block_x() / tiles / p.Hk;
  const Chunk at = chunk_at<C>(p, slot);
  const int count = at.count;
  if (count <= 0) return;
  const int64_t row = at.s.row, token = at.s.origin + at.first, first_row = row * p.T + token;

  // ---- keys and queries ---------------------------------------------------------------------------------------------------
#pragma unroll 4
  for (int i = tile::thread(); i < C * (KT / EACH); i += THREADS) {
    const int j = i / (KT / EACH), unit = i % (KT / EACH) * EACH;
    const bool real = j < count && column + unit < p.k.width, asked = j < count && column + unit < p.q.width;
    tile::copy_16(k.at(j, unit), p.k.template at<T>(row, token + j, hk) + column + unit, real);
    tile::copy_16(q.at(j, unit), p.q.template at<T>(row, token + j, hk) + column + unit, asked);
  }
#pragma unroll 1
  for (int h = hk * group; h < (hk + 1) * group; h++) {
    tile::sync();  // the head before is done with everything
    // Or places of loads are made once for all heads, and kept in registers that are needed.
    const int thread = tile::fresh(tile::thread()), warp = thread / tile::WARP, lane = thread % tile::WARP;
    const int g = lane / 4, c = 2 * (lane % 4);
    {
      const float* factors = p.factors + (slot * p.H + h) * F::SIZE;
      if (thread < C) {
        const float w = factors[F::WHOLE + thread], s = factors[F::REST + thread];
        key[thread] = factors[F::KEY + thread], query[thread] = factors[F::QUERY + thread];
        beta[thread] = factors[F::BETA + thread], whole[thread] = w, rest[thread] = s;
        since[thread] = decay_between(w, s, 0, 0);
        // A native write that is removed after its read reaches nothing after the chunk, which it ends.
        const float end = decay_between(factors[F::WHOLE + C - 1], factors[F::REST + C - 1], w, s);
        until[thread] = factors[F::KEPT + thread] == 0 ? 0.0f : end;
        value[thread] = 0;
      }
    }

    // ---- along the value columns --------------------------------------------------------------------------------------------
    float x[NK][4] = {}, y[NK][4] = {}, z[NK][4] = {}, e[NC][4] = {}, f[NC][4] = {}, overlap = 0;
    const auto overlap_states = [&](int thread) {
#pragma unroll 2
      for (int i = thread; i < VT * (KT / EACH); i += THREADS) {
        const T *s = start.at(i / (KT / EACH), i % (KT / EACH) * EACH), *d = end.at(i / (KT / EACH), i % (KT / EACH) * EACH);
#pragma unroll
        for (int l = 0; l < EACH; l++) overlap += tile::load_float(s + l) * tile::load_float(d + l);
      }
    };
    sum_values<Rule, T, KT, false>(b, b.right, row, token, slot, h, column, count, warp, work, beta, value, x, y, z, e, f,
                                   overlap_states);
    overlap = tile::warp_sum(overlap);
    tile::sync();  // the tiles are read, and images may lie there
    if (lane == 0) warps[warp] = overlap;

    // ---- what tokens have to do with the state before and the adjoint after ---------------------------------------------------
    float d_beta[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int j = 16 * warp + g + 8 * i;
      float qx = 0, ky = 0, kz = 0;
#pragma unroll
      for (int m = 0; m < NK; m++)
#pragma unroll
        for (int l = 0; l < 2; l++) {
          const float k_here = tile::load_float(k.at(j, 8 * m + c + l)), q_here = tile::load_float(q.at(j, 8 * m + c + l));
          qx += q_here * x[m][2 * i + l];
          if constexpr (Rule::READS) ky += k_here * y[m][2 * i + l];
          kz += k_here * z[m][2 * i + l];
        }
      d_beta[i] = Rule::READS ? -since[j] * key[j] * ky : 0.0f;  // of this lane's columns
      qx = query[j] * row_sum(qx);
      if constexpr (Rule::READS) ky = key[j] * row_sum(ky);
      kz = key[j] * row_sum(kz);
      if (c == 0) on_start[j] = since[j] * (Rule::READS ? qx - beta[j] * ky : qx), on_end[j] = until[j] * kz;
#pragma unroll
      for (int m = 0; m < NK; m++)
#pragma unroll
        for (int l = 0; l < 2; l++) {
          x[m][2 * i + l] *= since[j];
          const float end = until[j] * z[m][2 * i + l];
          z[m][2 * i + l] = Rule::READS ? end - since[j] * beta[j] * y[m][2 * i + l] : end;
        }
    }

    // ---- pairs of tokens: dQ is done, images for dK, sums for dg -----------------------------------------------------------------
    const auto down_k = Op::lane_place_down(k);
    const int along_k = Op::lane_place_along(k);
    float carried[2] = {};  // of a row, over the columns before
#pragma unroll
    for (int j = 0; j < WARPS; j++) {
      if (j > warp) continue;
      float kk[2][4] = {}, qk[2][4] = {};
#pragma unroll
      for (int step = 0; step < KT; step += STEP) {
        const auto left_k = Op::load_left(k, down_k, 16 * warp, step), left_q = Op::load_left(q, down_k, 16 * warp, step);
        typename Op::B r[2];
        Op::load_rows(r, k, along_k, 16 * j, step);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          if constexpr (Rule::READS) Op::multiply(kk[i], left_k, r[i]);
          Op::multiply(qk[i], left_q, r[i]);
        }
      }
      float scores[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int l = 0; l < 2; l++) {
          const int to = 16 * warp + g + 8 * l;
          float pair[2];
#pragma unroll
          for (int n = 0; n < 2; n++) {
            const int from = 16 * j + 8 * i + c + n, at = 2 * l + n;
            const float decay = from <= to ? decay_between(whole[to], rest[to], whole[from], rest[from]) : 0.0f;
            const float asked = from <= to ? decay * e[2 * j + i][at] : 0.0f;
            const float read = Rule::READS && from < to ? decay * f[2 * j + i][at] : 0.0f;
            const float reading = Rule::READS ? read * key[to] * key[from] * kk[i][at] : 0.0f;
            if constexpr (Rule::READS) d_beta[l] -= reading;
            const float asking = asked * query[to] * key[from] * qk[i][at];
            pair[n] = from < to ? (Rule::READS ? asking - beta[to] * reading : asking) : 0.0f;
            scores[i][at] = asked * key[from];
            *to_keys.at(from, to) = Op::narrow(asked * query[to]);
            if constexpr (Rule::READS) {
              if (from <= to) *between_keys.at(to, from) = Op::narrow(-beta[to] * read * key[from]);
              if (from < to) *between_keys.at(from, to) = Op::narrow(-beta[to] * read * key[to]);
            }
          }
          // within_jl = the sum over i < l.
          float sum = pair[0] + pair[1];
#pragma unroll
          for (int step = 1; step < 4; step *= 2) {
            const float other = tile::shuffle_up(sum, step);
            if (lane % 4 >= step) sum += other;
          }
          const float before = carried[l] + sum - (pair[0] + pair[1]);
          carried[l] += tile::shuffle(sum, lane | 3);
          *within.at(to, 16 * j + 8 * i + c) = before, *within.at(to, 16 * j + 8 * i + c + 1) = before + pair[0];
        }
#pragma unroll
      for (int step = 0; step < 16; step += STEP) {
        const auto left = Op::accumulators(&scores[step / 8]);
#pragma unroll
        for (int m = 0; m < NK; m += 2) {
          typename Op::B r[2];
          Op::load_columns(r, k, down_k, 16 * j + step, 8 * m);
          Op::multiply(x[m], left, r[0]), Op::multiply(x[m + 1], left, r[1]);
        }
      }
    }
    // What the last token asks of the edits made there.
    const EditRange range = edits_at(p.edits, at.n, h, at.first + count - 1);
#pragma unroll 1
    for (int64_t i = range.begin; i < range.end; i++) {
      if (!p.edits.kind(i).adds() || p.edits.kind(i).after() || (count - 1) / 16 != warp) continue;
      float asked = 0;
      for (int v = lane; v < b.d_o.width && v < p.V; v += tile::WARP)
        asked += p.edits.right[i * p.V + v] * tile::load_float(b.d_o.template at<T>(row, token + count - 1, h) + v);
      asked = tile::warp_sum(asked);
#pragma unroll
      for (int m = 0; m < NK; m++)
#pragma unroll
        for (int l = 0; l < 4; l++) {
          const int k_at = column + 8 * m + c + l % 2;
          if (16 * warp + g + l / 2 * 8 == count - 1 && k_at < p.K) x[m][l] += asked * p.edits.left[i * p.K + k_at];
        }
    }
    const auto leave = [&](const float (&from)[NK][4], int which) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int j = 16 * warp + g + 8 * i;
        if (j >= count) continue;
        float* to = b.parts + (((first_row + j) * p.Hk + hk) * 2 + which) * p.K + column + c;
#pragma unroll
        for (int m = 0; m < NK; m++)
#pragma unroll
          for (int l = 0; l < 2; l++)
            if (column + 8 * m + c + l < p.K)
              to[8 * m + l] = h == hk * group ? from[m][2 * i + l] : to[8 * m + l] + from[m][2 * i + l];
      }
    };
    leave(x, 0);
    float* const scalars = b.scalars + key_tile;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int j = 16 * warp + g + 8 * i;
      const float sum = row_sum(d_beta[i]) + value[j];
      if (c != 0 || j >= count) continue;
      const int64_t to = (first_row + j) * p.H + h;
      scalars[(2 * to + 1) * tiles] = p.removed != nullptr && p.removed[to] != 0 ? 0.0f : sum;
    }
    tile::sync();

    // ---- dK ------------------------------------------------------------------------------------------------------------------
    const auto down_image = Op::lane_place_down(to_keys);
#pragma unroll 1
    for (int step = 0; step < C; step += STEP) {
      typename Op::B r[2];
      if (step / 16 >= warp) {
        const auto left = Op::load_left(to_keys, down_image, 16 * warp, step);
#pragma unroll
        for (int m = 0; m < NK; m += 2) {
          Op::load_columns(r, q, down_k, step, 8 * m);
          Op::multiply(z[m], left, r[0]), Op::multiply(z[m + 1], left, r[1]);
        }
      }
      if constexpr (Rule::READS) {
        const auto left = Op::load_left(between_keys, down_image, 16 * warp, step);
#pragma unroll
        for (int m = 0; m < NK; m += 2) {
          Op::load_columns(r, k, down_k, step, 8 * m);
          Op::multiply(z[m], left, r[0]), Op::multiply(z[m + 1], left, r[1]);
        }
      }
    }
    leave(z, 1);

    // ---- dg ------------------------------------------------------------------------------------------------------------------
    if (thread < count) {
      float sum = 0;
      for (int w = 0; w < WARPS; w++) sum += warps[w];
      sum *= since[C - 1];
      for (int j = 0; j < thread; j++) sum += on_end[j];
      for (int j = thread; j < count; j++) sum += on_start[j] + *within.at(j, thread);
      scalars[((first_row + thread) * p.H + h) * 2 * tiles] = sum;
    }
  }
}

}  // namespace writesae::cuda
