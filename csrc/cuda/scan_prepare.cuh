// A scan, first kernel: everything of a chunk that does not need the state. See scan.cuh.
//
// One block per (chunk, key head), a warp per 16 tokens, then one round per value head of the group. K K^T and Q K^T (lower
// blocks) stay in registers for all value heads. The triangular inverse goes by blocks of 16: forward substitution on the
// diagonal (a lane per column, exact order), then block columns by products in three-fold tf32, each warp its own column:
//     T_ij = -T_ii sum_{j <= k < i} A_ik T_kj,  computed transposed so that every result is a left operand in place.
//
// Arithmetic at C = 64, K = 128, bf16, a (chunk, value head) in groups of 4 (alone): 80 (320) bf16 products of 4 kFLOP, 192
// tf32 products of 2 kFLOP; 8 KB (32 KB) of q and k read, 14 KB of images and factors written; about 1.2 k instructions a
// warp. 1 x 32768 with 16 / 64 heads is 32,768 of them: 0.72 GB, 0.22 ms at an H100's 3.35 TB/s, and by instructions (4 warps,
// 248 chunks an SM, one a cycle and scheduler) 0.17 ms. 3 blocks of 128 threads an SM by registers (168), 55 KB shared each.
#pragma once

#include "scan.cuh"

namespace writesae::cuda {

template <class Rule, class T, int KP>
struct PrepareShared {
  static constexpr int C = Operand<T>::CHUNK, WARPS = C / 16;
  static constexpr int IMAGE = Triangle<T, C>::SIZE;
  static constexpr int PIECE = KP * C > IMAGE ? KP * C : IMAGE;  // of k or q, and then of an image: elements
  static constexpr size_t BYTES =
      2 * PIECE * sizeof(T) + (Rule::READS ? C * Padded<C>::STRIDE * 4 : 0) + 2 * C * 4 + WARPS * 3 * C * 4;
};

// One value head's gates in a lane's registers: C / 32 neighbouring tokens a lane.
template <int C>
struct Gates {
  static constexpr int EACH = C / tile::WARP;
  float g[EACH], beta[EACH];

  __device__ __forceinline__ void load(const Problem& p, const Sequence& s, int64_t first, int64_t end, int64_t h) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int64_t at = first + tile::lane() * EACH + i;
      g[i] = beta[i] = 0;
      if (at >= end || h >= p.H) continue;
      const int64_t t = s.origin + at;
      g[i] = read(p.g, s.row, t, h);
      // e^-150 is 0 in float, and a bound keeps sums finite. NaN passes.
      g[i] = g[i] < -150.0f ? -150.0f : g[i];
      const bool removed = p.removed != nullptr && p.removed[(s.row * p.T + t) * p.H + h] != 0;
      beta[i] = removed ? 0.0f : read(p.beta, s.row, t, h);
    }
  }

  // Into shared memory and back, each lane its own: [2][C].
  __device__ __forceinline__ void put(float* to) const {
#pragma unroll
    for (int i = 0; i < EACH; i++) to[tile::lane() * EACH + i] = beta[i], to[C + tile::lane() * EACH + i] = g[i];
  }
  __device__ __forceinline__ void take(const float* from) {
#pragma unroll
    for (int i = 0; i < EACH; i++) beta[i] = from[tile::lane() * EACH + i], g[i] = from[C + tile::lane() * EACH + i];
  }

  // The log-decay from the chunk's start, as a whole number and a rest.
  __device__ __forceinline__ void sum(float* whole, float* rest) const {
    double total = 0, mine[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) mine[i] = total += static_cast<double>(g[i]);
    double before = total;
#pragma unroll
    for (int step = 1; step < tile::WARP; step *= 2) {
      const double other = tile::shuffle_up(before, step);
      if (tile::lane() >= step) before += other;
    }
    before -= total;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const double G = before + mine[i];
      const float w = tile::round_to_whole(static_cast<float>(G));
      whole[i] = w, rest[i] = static_cast<float>(G - static_cast<double>(w));
    }
  }
};

__device__ __forceinline__ float decay_between(float whole_to, float rest_to, float whole_from, float rest_from) {
  return tile::exponential((whole_to - whole_from) + (rest_to - rest_from));
}

// Inverts the 16 x 16 unit lower triangle I + A at (at, at) of m, in place, its zeros above the diagonal included.
// Lanes 16.. repeat what lanes 0..15 do, so that all can meet.
template <class Matrix>
__device__ __forceinline__ void invert_diagonal(const Matrix& m, int at, int lane) {
  const int column = lane % 16;
  float x[16];
#pragma unroll
  for (int i = 0; i < 16; i++) {
    float sum = i == column ? 1.0f : 0.0f;
#pragma unroll
    for (int j = 0; j < i; j += 4) {
      const auto row = *reinterpret_cast<const tile::Vec16*>(m.at(at + i, at + j));
#pragma unroll
      for (int l = 0; l < 4 && j + l < i; l++) sum -= tile::bits_to_float(row.x[l]) * x[j + l];
    }
    x[i] = sum;
    if (i % 4 == 3) tile::sync_warp();  // or all loads come first, and fill the registers
  }
  if (lane < 16) {
#pragma unroll
    for (int i = 0; i < 16; i++) *m.at(at + i, at + column) = x[i];
  }
  tile::sync_warp();
}

template <class Rule, class T, int KP>
__global__ void __launch_bounds__(2 * Operand<T>::CHUNK, KP <= 128 ? 3 : 2) prepare(const __grid_constant__ Problem p) {
  using Op = Operand<T>;
  using Op32 = Operand<float>;
  constexpr int C = Op::CHUNK, WARPS = C / 16, THREADS = 32 * WARPS, EACH = Tile<T, KP>::EACH;
  using Size = PrepareShared<Rule, T, KP>;
  using F = Factors<C>;
  tile::Shared shared;
  const Tile<T, KP> k = {shared.template take<T>(Size::PIECE)}, q = {shared.template take<T>(Size::PIECE)};
  const Triangle<T, C> solve = {k.data}, reach = {q.data};  // once the products are in registers
  const Padded<C> a = {Rule::READS ? shared.template take<float>(C * Padded<C>::STRIDE) : nullptr};
  float* key = shared.template take<float>(C);    // r_j
  float* query = shared.template take<float>(C);  // scale / |q_j|
  float* gates = shared.template take<float>(WARPS * 3 * C);

  const int warp = tile::warp(), lane = tile::lane(), thread = tile::thread(), g = lane / 4, c = 2 * (lane % 4);
  const int hk = tile::block_x() % p.Hk, group = p.H / p.Hk;
  const int64_t slot = tile::block_x() / p.Hk;
  const Chunk at = chunk_at<C>(p, slot);
  const Sequence& s = at.s;
  const int first = at.first, count = at.count;
  if (count <= 0) return;

  const T* from_k = p.k.template at<T>(s.row, s.origin + first, hk);
  const T* from_q = p.q.template at<T>(s.row, s.origin + first, hk);
#pragma unroll 4
  for (int i = thread; i < C * (KP / EACH); i += THREADS) {
    const int row = i / (KP / EACH), unit = i % (KP / EACH);
    tile::copy_16(k.at(row, unit * EACH), from_k + row * p.k.stride[1] + unit * EACH,
                  row < count && unit * EACH < p.k.width);
    tile::copy_16(q.at(row, unit * EACH), from_q + row * p.q.stride[1] + unit * EACH,
                  row < count && unit * EACH < p.q.width);
  }
  tile::commit_copies();
  Gates<C> mine;
  mine.load(p, s, first, first + count, warp < group ? hk * group + warp : p.H);
  mine.put(gates + warp * 3 * C);  // the products need the registers
  tile::wait_copies<0>();
  tile::sync();

  const auto down = Op::lane_place_down(k);
  const int along = Op::lane_place_along(k);
  float kk[C / 8][4] = {}, qk[C / 8][4] = {}, squares_k[2] = {}, squares_q[2] = {};
#pragma unroll
  for (int step = 0; step < KP; step += Op::STEP) {
    const auto left_k = Op::load_left(k, down, 16 * warp, step), left_q = Op::load_left(q, down, 16 * warp, step);
    Op::add_squares(squares_k, left_k), Op::add_squares(squares_q, left_q);
#pragma unroll
    for (int j = 0; j < WARPS; j++) {
      if (j > warp) continue;
      typename Op::B b[2];
      Op::load_rows(b, k, along, 16 * j, step);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if constexpr (Rule::READS) Op::multiply(kk[2 * j + i], left_k, b[i]);
        Op::multiply(qk[2 * j + i], left_q, b[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    for (int step = 1; step < 4; step *= 2) {
      squares_k[i] += tile::shuffle_xor(squares_k[i], step);
      squares_q[i] += tile::shuffle_xor(squares_q[i], step);
    }
    if (c == 0) {
      key[16 * warp + 8 * i + g] = p.normalise ? tile::reciprocal_root(squares_k[i] + 1e-6f) : 1.0f;
      query[16 * warp + 8 * i + g] = p.scale * (p.normalise ? tile::reciprocal_root(squares_q[i] + 1e-6f) : 1.0f);
    }
  }
  tile::sync();
  if (p.left != nullptr)
    for (int row = warp; row < count; row += WARPS)
      for (int i = lane; i < p.K; i += tile::WARP)
        p.left[((s.row * p.T + s.origin + first + row) * p.Hk + hk) * p.K + i] = key[row] * tile::load_float(k.at(row, i));

  for (int batch = 0; batch < group; batch += WARPS) {
    // Gates: a warp per value head.
    if (batch == 0) {
      mine.take(gates + warp * 3 * C);
    } else {
      mine.load(p, chunk_at<C>(p, tile::fresh(slot)).s, first, first + count,
                batch + warp < group ? hk * group + batch + warp : p.H);
    }
    {
      constexpr int EACH_GATE = Gates<C>::EACH;
      float whole[EACH_GATE], rest[EACH_GATE];
      mine.sum(whole, rest);
      const float whole_end = tile::shuffle(whole[EACH_GATE - 1], 31), rest_end = tile::shuffle(rest[EACH_GATE - 1], 31);
      float* to = p.factors + (slot * p.H + hk * group + batch + warp) * F::SIZE;
#pragma unroll
      for (int i = 0; i < EACH_GATE; i++) {
        const int j = lane * EACH_GATE + i;
        float* at = gates + warp * 3 * C + j;
        at[0] = mine.beta[i], at[C] = whole[i], at[2 * C] = rest[i];
        if (batch + warp >= group) continue;
        const float since = decay_between(whole[i], rest[i], 0, 0);
        to[F::READ + j] = Rule::READS ? since * key[j] : mine.beta[i];
        to[F::ASK + j] = since * query[j];
        to[F::WRITE + j] = decay_between(whole_end, rest_end, whole[i], rest[i]) * key[j], to[F::KEPT + j] = key[j];
        to[F::WHOLE + j] = whole[i], to[F::REST + j] = rest[i], to[F::KEY + j] = key[j], to[F::QUERY + j] = query[j];
        to[F::BETA + j] = mine.beta[i];
      }
      if (batch + warp < group && lane < 4)
        to[F::DECAY + lane] = lane == 0 ? decay_between(whole_end, rest_end, 0, 0) : 0.0f;
    }
    for (int member = 0; member < WARPS && batch + member < group; member++) {
      const int h = hk * group + batch + member;
      tile::sync();  // the gates are there, and the last member's images are out
      const int warp = tile::fresh(tile::warp()), lane = tile::fresh(tile::lane()), g = lane / 4, c = 2 * (lane % 4);
      const float *beta = gates + member * 3 * C, *whole = beta + C, *rest = whole + C;
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        tile::sync_warp();  // one half of the rows after the other: fewer registers
        const int row = 16 * warp + g + 4 * e;
        const float in = beta[row] * key[row], out = query[row], whole_row = whole[row], rest_row = rest[row];
#pragma unroll
        for (int j = 0; j < C / 8; j++) {
          if (j / 2 > warp) continue;
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int column = 8 * j + c + i;
            const float d =
                column <= row ? key[column] * decay_between(whole_row, rest_row, whole[column], rest[column]) : 0.0f;
            if constexpr (Rule::READS) *a.at(row, column) = column < row ? in * d * kk[j][e + i] : 0.0f;
            *reach.at(row, column) = Op::narrow(column <= row ? out * d * qk[j][e + i] : 0.0f);
          }
        }
      }
      tile::sync_warp();
      if (p.gone != nullptr) {  // no token but its own sees such a write; places made anew, or they stay in registers
        const int64_t slot_here = tile::fresh(slot);
        const Chunk here = chunk_at<C>(p, slot_here);
        const uint8_t* gone = p.gone + ((here.s.row * p.T + here.s.origin + here.first) * p.H + h);
        float* factors = p.factors + (slot_here * p.H + h) * F::SIZE;
        const int end = 16 * warp + 16;
#pragma unroll 1
        for (int column = lane; column < end && column < here.count; column += tile::WARP) {
          if (gone[static_cast<int64_t>(column) * p.H] == 0) continue;
          factors[F::WRITE + column] = factors[F::KEPT + column] = 0;
#pragma unroll 1
          for (int row = column + 1 > end - 16 ? column + 1 : end - 16; row < end; row++) {
            if constexpr (Rule::READS) *a.at(row, column) = 0;
            *reach.at(row, column) = Op::narrow(0.0f);
          }
        }
        tile::sync_warp();
      }
      if constexpr (Rule::READS) {
        invert_diagonal(a, 16 * warp, lane);
        tile::sync();
        const int along_a = a.place(g, c);
        // Block column `warp` of the inverse, transposed: t[m] is block row warp + m.
        float t[WARPS][2][4];
#pragma unroll
        for (int m = 0; m < WARPS; m++) {
          if (warp + m >= WARPS) continue;
          const int row = 16 * (warp + m);
          if (m == 0) {
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
              for (int e = 0; e < 4; e++) t[0][i][e] = *a.at(row + 8 * i + c + e % 2, row + g + e / 2 * 8);
          } else {
            float sum[2][4] = {};
            Op32::B b[2];
#pragma unroll
            for (int l = 0; l < m; l++)
#pragma unroll
              for (int i = 0; i < 2; i++) {
                Op32::load_rows(b, a, along_a, row, 16 * (warp + l) + 8 * i);
                const auto left = Op32::accumulators(&t[l][i]);
                Op32::multiply(sum[0], left, b[0]), Op32::multiply(sum[1], left, b[1]);
              }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
              for (int e = 0; e < 4; e++) t[m][i][e] = 0, sum[i][e] = -sum[i][e];
#pragma unroll
            for (int i = 0; i < 2; i++) {
              Op32::load_rows(b, a, along_a, row, row + 8 * i);
              const auto left = Op32::accumulators(&sum[i]);
              Op32::multiply(t[m][0], left, b[0]), Op32::multiply(t[m][1], left, b[1]);
            }
          }
#pragma unroll
          for (int i = 0; i < 2; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
              const int column = 16 * warp + g + e / 2 * 8;
              *solve.at(row + 8 * i + c + e % 2, column) = Op::narrow(p.plain ? t[m][i][e] : t[m][i][e] * beta[column]);
            }
        }
      }
      tile::sync();
      const auto leave = [&](const Triangle<T, C>& from, void* images) {
        const auto* x = reinterpret_cast<const tile::Vec16*>(from.data);
        auto* to = reinterpret_cast<tile::Vec16*>(static_cast<T*>(images) + (slot * p.H + h) * Size::IMAGE);
        for (int i = thread; i < Size::IMAGE / EACH; i += THREADS) to[i] = x[i];
      };
      if constexpr (Rule::READS) leave(solve, p.solve);
      leave(reach, p.reach);
    }
    tile::sync();  // before the next gates
  }
}

// Host: the launch, by key size.
template <class Rule, class T>
void launch_prepare(const Problem& p, tile::Stream stream) {
  with_padded_keys(p.K, [&](auto keys) {
    constexpr int KP = decltype(keys)::value;
    tile::launch("scan prepare", prepare<Rule, T, KP>, {static_cast<unsigned>(p.slots * p.Hk), 1, 1}, 2 * Operand<T>::CHUNK,
                 PrepareShared<Rule, T, KP>::BYTES, stream, p);
  });
}

}  // namespace writesae::cuda
