// A scan with a low-rank erase, first kernel: what `prepare_channels` (scan_prepare_channels.cuh) is to a rule of one write. See
// LowRankProblem in scan.cuh.
//
// One block per (chunk, value head), in two rounds over the channels: what a and q find of b, then what they find of k. Pairs of
// tokens are gone through as there; a stands one token earlier, at the gates before its own. Then `solve` is the inverse of a
// unit triangle, and `mix` the solution of the same triangle for what a finds of k, block column by block column.
//
// Arithmetic: twice that of prepare_channels, and 192 tf32 products for `mix`. 95 KB shared at C = 64: 2 blocks an SM of sm_90.
#pragma once

#include "scan_prepare_channels.cuh"

namespace writesae::cuda {

template <class T>
struct LowRankShared {
  static constexpr int C = Operand<T>::CHUNK, WIDTH = tile::WARP, WARPS = C / 16;
  static constexpr int IMAGE = Triangle<T, C>::SIZE;
  static constexpr int PIECE = WIDTH * C > IMAGE ? WIDTH * C : IMAGE;  // of rows, and then of an image: elements
  static constexpr int SUMS = C * Padded<WIDTH>::STRIDE, SQUARE = C * Padded<C>::STRIDE;
  static constexpr size_t BYTES =
      3 * PIECE * sizeof(T) + 4 * SUMS * 4 + 2 * SQUARE * 4 + 2 * C * 4 + tile::shared_piece(WARPS * WIDTH * 4);
};

// (I + A)^-1 right, a warp per 16 of its columns; of A the diagonal blocks are inverted already.
template <class T, int C>
__device__ __forceinline__ void solve_for(const Triangle<T, C>& to, const Padded<C>& a, const Padded<C>& right, int warp,
                                          int lane) {
  using Op = Operand<T>;
  using Op32 = Operand<float>;
  constexpr int WARPS = C / 16;
  const int g = lane / 4, c = 2 * (lane % 4), along_a = a.place(g, c);
  float t[WARPS][2][4];  // block column `warp`, transposed: t[m] is block row warp + m
#pragma unroll
  for (int m = 0; m < WARPS; m++) {
    if (warp + m >= WARPS) continue;
    const int row = 16 * (warp + m);
    float sum[2][4];
    Op32::B b[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) t[m][i][e] = 0, sum[i][e] = -*right.at(row + 8 * i + c + e % 2, 16 * warp + g + e / 2 * 8);
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
      for (int e = 0; e < 4; e++) sum[i][e] = -sum[i][e];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      Op32::load_rows(b, a, along_a, row, row + 8 * i);
      const auto left = Op32::accumulators(&sum[i]);
      Op32::multiply(t[m][0], left, b[0]), Op32::multiply(t[m][1], left, b[1]);
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) *to.at(row + 8 * i + c + e % 2, 16 * warp + g + e / 2 * 8) = Op::narrow(t[m][i][e]);
  }
}

template <class Rule, class T>
__global__ void __launch_bounds__(2 * Operand<T>::CHUNK, 2)
    prepare_low_rank(const __grid_constant__ LowRankProblem p, int decay_width) {
  static_assert(Rule::LOW_RANK);
  using Op32 = Operand<float>;
  using Size = LowRankShared<T>;
  constexpr int C = Size::C, WARPS = Size::WARPS, WIDTH = Size::WIDTH, THREADS = 32 * WARPS, EACH = Tile<T, WIDTH>::EACH;
  using F = Factors<C>;
  tile::Shared shared;
  const Tile<T, WIDTH> reads = {shared.template take<T>(Size::PIECE)}, q = {shared.template take<T>(Size::PIECE)};
  const Tile<T, WIDTH> writes = {shared.template take<T>(Size::PIECE)};  // b, and then k
  const Triangle<T, C> solve = {reads.data}, reach = {q.data};           // after the last channels
  // Sums of gates within a 16: of the tokens up to this one, and of those after it. And of pairs: 16 of a, 16 of queries.
  const Padded<WIDTH> before = {shared.template take<float>(Size::SUMS)}, after = {shared.template take<float>(Size::SUMS)};
  const Padded<WIDTH> pairs = {shared.template take<float>(Size::SUMS)};
  const Padded<WIDTH> gates = {shared.template take<float>(Size::SUMS)};  // in registers they would be spilled
  const Padded<C> square = {shared.template take<float>(Size::SQUARE)};   // -A
  const Padded<C> right = {shared.template take<float>(Size::SQUARE)};    // what a finds of k
  float* const key = shared.template take<float>(C);                      // r_j
  float* const query = shared.template take<float>(C);                    // scale / |q_j|
  float* const totals = shared.template take<float>(WARPS * WIDTH);       // of gates, by 16 and channel

  const int warp = tile::warp(), lane = tile::lane(), thread = tile::thread(), g = lane / 4, c = 2 * (lane % 4);
  const int h = tile::block_x() % p.H, hk = h / (p.H / p.Hk);
  const int64_t slot = tile::block_x() / p.H;
  const Chunk at = chunk_at<C>(p, slot);
  const Sequence& s = at.s;
  const int first = at.first, count = at.count, top = 16 * warp;  // the warp's first token
  if (count <= 0) return;
  const int64_t token = s.origin + first;

  // ---- factors of tokens ------------------------------------------------------------------------------------------------
  for (int j = top; j < top + 16; j++) {
    float squares_k = 0, squares_q = 0;
    for (int i = lane; i < p.K && j < count; i += tile::WARP) {
      const float x = tile::load_float(p.k.template at<T>(s.row, token + j, hk) + i);
      const float y = tile::load_float(p.q.template at<T>(s.row, token + j, hk) + i);
      squares_k += x * x, squares_q += y * y;
    }
    squares_k = tile::warp_sum(squares_k), squares_q = tile::warp_sum(squares_q);
    if (lane != 0) continue;
    const bool removed = j >= count || (p.removed != nullptr && p.removed[(s.row * p.T + token + j) * p.H + h] != 0);
    key[j] = p.normalise ? tile::reciprocal_root(squares_k + 1e-6f) : 1.0f;
    query[j] = p.scale * (p.normalise ? tile::reciprocal_root(squares_q + 1e-6f) : 1.0f);
    const float beta = removed ? 0.0f : read(p.beta, s.row, token + j, h);
    float* to = p.factors + (slot * p.H + h) * F::SIZE + j;  // decays and r_j are in the rows
    to[F::READ] = to[F::BETA] = beta, to[F::ASK] = to[F::WRITE] = to[F::KEPT] = 1.0f, to[F::WHOLE] = to[F::REST] = 0.0f;
    to[F::KEY] = key[j], to[F::QUERY] = query[j];
  }
  if (thread < 4) p.factors[(slot * p.H + h) * F::SIZE + F::DECAY + thread] = 0.0f;

  const auto leave = [&](const Triangle<T, C>& from, void* images) {
    const auto* x = reinterpret_cast<const tile::Vec16*>(from.data);
    auto* to = reinterpret_cast<tile::Vec16*>(static_cast<T*>(images) + (slot * p.H + h) * Size::IMAGE);
    for (int i = thread; i < Size::IMAGE / EACH; i += THREADS) to[i] = x[i];
  };
#pragma unroll 1
  for (int round = 0; round < 2; round++) {
    const bool erase = round == 0;
    const Rows& of = erase ? p.b : p.k;
    const int head = erase ? h : hk;
    for (int i = lane; i < 16 * WIDTH; i += tile::WARP) *pairs.at(top + i / WIDTH, i % WIDTH) = 0.0f;
    tile::sync_warp();
    float aw[WARPS][2][4] = {}, qw[WARPS][2][4] = {};
#pragma unroll 1
    for (int column = 0; column < decay_width; column += WIDTH) {
      // ---- rows as they are, and sums of gates ----------------------------------------------------------------------------
      tile::sync();  // the channels before, and the images of the round before, are done with
      for (int i = thread; i < C * (WIDTH / EACH); i += THREADS) {
        const int row = i / (WIDTH / EACH), unit = i % (WIDTH / EACH) * EACH;
        const auto load = [&](const Tile<T, WIDTH>& to, const Rows& from, int head) {
          tile::copy_16(to.at(row, unit), from.template at<T>(s.row, token + row, head) + column + unit,
                        row < count && column + unit < from.width);
        };
        load(reads, p.a, h), load(q, p.q, hk), load(writes, of, head);
      }
      tile::commit_copies();
      const int channel = column + lane;
#pragma unroll 4
      for (int i = top; i < top + 16; i++)
        *gates.at(i, lane) = i < count && channel < p.K ? channel_gate(p, s, first + i, h, channel) : 0.0f;
      double sum = 0;
#pragma unroll
      for (int i = 0; i < 16; i++) *before.at(top + i, lane) = static_cast<float>(sum += *gates.at(top + i, lane));
      totals[warp * WIDTH + lane] = static_cast<float>(sum);
      sum = 0;
#pragma unroll
      for (int i = 15; i >= 0; i--) *after.at(top + i, lane) = static_cast<float>(sum), sum += *gates.at(top + i, lane);
      tile::wait_copies<0>();
      tile::sync();

      // ---- rows for the walk ----------------------------------------------------------------------------------------------
      double earlier = 0, later = 0;
      for (int w = 0; w < WARPS; w++) (w < warp ? earlier : later) += w == warp ? 0.0f : totals[w * WIDTH + lane];
      if (erase && warp == 0 && channel < decay_width)
        p.decays[(slot * p.H + h) * decay_width + channel] =
            channel < p.K ? tile::exponential(static_cast<float>(later + totals[lane])) : 0.0f;
      for (int j = top; j < top + 16 && j < count && channel < p.write.width; j++) {
        const int64_t to = ((s.row * p.T + token + j) * p.H + h) * p.write.width + channel;
        const auto leave = [&](const Rows& rows, float x) {
          tile::store_float(const_cast<T*>(static_cast<const T*>(rows.data)) + to, x);
        };
        const float until = tile::exponential(static_cast<float>(later + *after.at(j, lane)));
        const float own = tile::load_float(writes.at(j, lane)) * (erase ? 1.0f : key[j]);
        leave(erase ? p.erase_write : p.write, until * own);
        if (erase) {
          const float until_read = j == top ? 0.0f : *before.at(j - 1, lane);
          leave(p.read, tile::exponential(static_cast<float>(earlier + until_read)) * tile::load_float(reads.at(j, lane)));
          leave(p.ask, tile::exponential(static_cast<float>(earlier + *before.at(j, lane))) * query[j] *
                           tile::load_float(q.at(j, lane)));
        } else if (p.left != nullptr && h % (p.H / p.Hk) == 0 && channel < p.K) {
          p.left[((s.row * p.T + token + j) * p.Hk + hk) * p.K + channel] = own;
        }
      }

      // ---- pairs of tokens of one 16 ----------------------------------------------------------------------------------------
#pragma unroll 1
      for (int j = 0; j < 16; j++) {
        const float reading = tile::load_float(reads.at(top + j, lane)), asked = tile::load_float(q.at(top + j, lane));
        const float gate = *gates.at(top + j, lane);
        float x[tile::WARP], between = 0;  // between: of the tokens after i and before j
#pragma unroll
        for (int i = 15; i >= 0; i--) {
          x[i] = x[16 + i] = 0;
          if (i > j) continue;
          const float own = tile::load_float(writes.at(top + i, lane));
          if (i == j) {
            x[16 + i] = asked * own;
            continue;
          }
          x[i] = reading * tile::exponential(between) * own;
          x[16 + i] = asked * tile::exponential(between + gate) * own;
          between += *gates.at(top + i, lane);
        }
        *pairs.at(top + j, lane) += sum_by_lane(x, lane);
      }

      // ---- of different 16s ---------------------------------------------------------------------------------------------------
#pragma unroll 1
      for (int step = 0; step < WIDTH; step += Op32::STEP) {
        Op32::A left_a, left_q;
#pragma unroll
        for (int i = 0; i < 4; i++) {  // rows g and g + 8, columns c and then c + 1
          const int row = top + g + i % 2 * 8, x = step + c + i / 2;
          const float until_read = row == top ? 0.0f : *before.at(row - 1, x);
          left_a.x[i] = tile::exponential(until_read) * tile::load_float(reads.at(row, x));
          left_q.x[i] = tile::exponential(*before.at(row, x)) * tile::load_float(q.at(row, x));
        }
        float between[2] = {};
#pragma unroll
        for (int w = WARPS - 1; w >= 0; w--) {
          if (w >= warp) continue;
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int row = 16 * w + 8 * i + g, x = step + c;
            Op32::B other;
#pragma unroll
            for (int l = 0; l < 2; l++)
              other.x[l] = tile::exponential(*after.at(row, x + l) + between[l]) * tile::load_float(writes.at(row, x + l));
            Op32::multiply(aw[w][i], left_a, other), Op32::multiply(qw[w][i], left_q, other);
          }
#pragma unroll
          for (int l = 0; l < 2; l++) between[l] += totals[w * WIDTH + step + c + l];
        }
      }
    }
    tile::sync();  // rows are done with, and images may lie there

    // ---- A and the erase's reach; what a finds of k, and reach ------------------------------------------------------------------
    const Padded<C> to = {erase ? square.data : right.data};
    const auto strength = [&](int j) { return erase ? 1.0f : key[j]; };
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      if (w >= warp) continue;
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int row = top + g + e / 2 * 8, column = 16 * w + 8 * i + c + e % 2;
          *to.at(row, column) = (erase ? -1.0f : key[column]) * aw[w][i][e];
          *reach.at(row, column) = Operand<T>::narrow(query[row] * strength(column) * qw[w][i][e]);
        }
    }
    for (int i = lane; i < 256; i += tile::WARP) {
      const int j = top + i / 16, l = top + i % 16;
      *to.at(j, l) = l < j ? (erase ? -1.0f : key[l]) * *pairs.at(j, i % 16) : 0.0f;
      *reach.at(j, l) = Operand<T>::narrow(l <= j ? query[j] * strength(l) * *pairs.at(j, 16 + i % 16) : 0.0f);
    }
    tile::sync_warp();
    if (!erase && p.gone != nullptr) drop_gone<Rule, T, C>(p, right, reach, slot, h, warp, lane);
    tile::sync();
    leave(reach, erase ? p.erase_reach : p.reach);
  }
  solve_triangle<T, C>(solve, square, query, true, warp, lane);
  tile::sync();
  leave(solve, p.solve);
  tile::sync();
  if (p.plain) {
    for (int j = top; j < top + 16; j++)
      for (int i = lane; i < top + 16; i += tile::WARP) *solve.at(j, i) = Operand<T>::narrow(*right.at(j, i));
  } else {
    solve_for<T, C>(solve, square, right, warp, lane);
  }
  tile::sync();
  leave(solve, p.mix);
}

// Host: the launch.
template <class Rule, class T>
void launch_prepare_low_rank(const LowRankProblem& p, tile::Stream stream) {
  tile::launch("scan prepare_low_rank", prepare_low_rank<Rule, T>, {static_cast<unsigned>(p.slots * p.H), 1, 1},
               2 * Operand<T>::CHUNK, LowRankShared<T>::BYTES, stream, p, padded_keys(p.K));
}

}  // namespace writesae::cuda
