// A scan whose gate is of each key channel, first kernel: everything of a chunk that does not need the state, what `prepare` is to
// a gate of each head. See ChannelProblem in scan.cuh.
//
// One block per (chunk, value head), a warp per 16 tokens, 32 channels at a time, a lane each. A decay between two tokens is e to
// the sum of the gates between them, never a quotient of decays. Tokens of different 16s meet at the start of the later 16:
//     A_ji = sum_c (k_jc e^{G_jc - G_0c}) (k_ic e^{G_0c - G_ic}),
// two exponents of at most 0, in three-fold tf32. Those of one 16 meet pair by pair: a lane adds up gates from token j down, and
// the 32 sums of a row (16 of keys, 16 of queries) are added over the lanes at once, 31 shuffles.
//
// Arithmetic at C = 64, K = 128: a warp 16 K / 32 x 2 x 16 exponentials and as many shuffles on the diagonal, 16 K / 8 products a
// pair of 16s; 48 KB of rows and 14 KB of images and factors written. 61 KB shared: 3 blocks an SM of sm_90.
#pragma once

#include "scan_channels.cuh"
#include "scan_prepare.cuh"

namespace writesae::cuda {

template <class Rule, class T>
struct ChannelShared {
  static constexpr int C = Operand<T>::CHUNK, WIDTH = tile::WARP, WARPS = C / 16;
  static constexpr int IMAGE = Triangle<T, C>::SIZE;
  static constexpr int PIECE = WIDTH * C > IMAGE ? WIDTH * C : IMAGE;  // of k or q, and then of an image: elements
  static constexpr int SUMS = C * Padded<WIDTH>::STRIDE;
  static constexpr size_t BYTES = 2 * PIECE * sizeof(T) + 3 * SUMS * 4 + (Rule::READS ? C * Padded<C>::STRIDE * 4 : 0) +
                                  3 * C * 4 + tile::shared_piece(WARPS * WIDTH * 4);
};

// x[l], summed over the warp, in lane l. By recursion: a loop over STEP would put x into memory.
template <int STEP = tile::WARP / 2>
__device__ __forceinline__ float sum_by_lane(float (&x)[2 * STEP], int lane) {
  const bool high = (lane & STEP) != 0;
  float half[STEP];
#pragma unroll
  for (int i = 0; i < STEP; i++) {
    const float mine = high ? x[i + STEP] : x[i], theirs = high ? x[i] : x[i + STEP];
    half[i] = mine + tile::shuffle_xor(theirs, STEP);
  }
  if constexpr (STEP == 1) {
    return half[0];
  } else {
    return sum_by_lane<STEP / 2>(half, lane);
  }
}

// solve = (I + A)^-1 diag(beta), without beta where it is plain; a warp per 16 rows of A, which is lost. As in `prepare`, which has it and `drop_gone` in place: of
// a function it made spills.
template <class T, int C>
__device__ __forceinline__ void solve_triangle(const Triangle<T, C>& solve, const Padded<C>& a, const float* beta,
                                               bool plain, int warp, int lane) {
  using Op = Operand<T>;
  using Op32 = Operand<float>;
  constexpr int WARPS = C / 16;
  const int g = lane / 4, c = 2 * (lane % 4);
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
        *solve.at(row + 8 * i + c + e % 2, column) = Op::narrow(plain ? t[m][i][e] : t[m][i][e] * beta[column]);
      }
  }
}

// A write that is removed after its read is seen by no token but its own: columns of A and reach end on the diagonal, in the
// warp's rows, and the state gets nothing of it.
template <class Rule, class T, int C>
__device__ __forceinline__ void drop_gone(const Problem& p, const Padded<C>& a, const Triangle<T, C>& reach, int64_t slot,
                                          int h, int warp, int lane) {
  using F = Factors<C>;
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
      *reach.at(row, column) = Operand<T>::narrow(0.0f);
    }
  }
  tile::sync_warp();
}

template <class Rule, class T>
__global__ void __launch_bounds__(2 * Operand<T>::CHUNK, 2)
    prepare_channels(const __grid_constant__ ChannelProblem p, int decay_width) {
  static_assert(Rule::CHANNEL && !Rule::LOW_RANK);
  using Op32 = Operand<float>;
  using Size = ChannelShared<Rule, T>;
  constexpr int C = Size::C, WARPS = Size::WARPS, WIDTH = Size::WIDTH, THREADS = 32 * WARPS, EACH = Tile<T, WIDTH>::EACH;
  using F = Factors<C>;
  tile::Shared shared;
  const Tile<T, WIDTH> k = {shared.template take<T>(Size::PIECE)}, q = {shared.template take<T>(Size::PIECE)};
  const Triangle<T, C> solve = {k.data}, reach = {q.data};  // after the last channels
  // Sums of gates within a 16: of the tokens up to this one, and of those after it. And of pairs: 16 of keys, 16 of queries.
  const Padded<WIDTH> before = {shared.template take<float>(Size::SUMS)}, after = {shared.template take<float>(Size::SUMS)};
  const Padded<WIDTH> pairs = {shared.template take<float>(Size::SUMS)};
  const Padded<C> a = {Rule::READS ? shared.template take<float>(C * Padded<C>::STRIDE) : nullptr};
  float* const key = shared.template take<float>(C);    // r_j
  float* const query = shared.template take<float>(C);  // scale / |q_j|
  float* const beta = shared.template take<float>(C);
  float* const totals = shared.template take<float>(WARPS * WIDTH);  // of gates, by 16 and channel

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
    beta[j] = removed ? 0.0f : read(p.beta, s.row, token + j, h);
    float* to = p.factors + (slot * p.H + h) * F::SIZE + j;  // decays and r_j are in the rows
    to[F::READ] = Rule::READS ? 1.0f : beta[j];
    to[F::ASK] = to[F::WRITE] = to[F::KEPT] = 1.0f, to[F::WHOLE] = to[F::REST] = 0.0f;
    to[F::KEY] = key[j], to[F::QUERY] = query[j], to[F::BETA] = beta[j];
  }
  if (thread < 4) p.factors[(slot * p.H + h) * F::SIZE + F::DECAY + thread] = 0.0f;
  for (int i = lane; i < 16 * WIDTH; i += tile::WARP) *pairs.at(top + i / WIDTH, i % WIDTH) = 0.0f;
  tile::sync_warp();

  float kk[WARPS][2][4] = {}, qk[WARPS][2][4] = {};
#pragma unroll 1
  for (int column = 0; column < decay_width; column += WIDTH) {
    // ---- keys, queries and sums of gates --------------------------------------------------------------------------------
    tile::sync();  // the channels before are done with
    for (int i = thread; i < C * (WIDTH / EACH); i += THREADS) {
      const int row = i / (WIDTH / EACH), unit = i % (WIDTH / EACH) * EACH;
      const T* from_k = p.k.template at<T>(s.row, token + row, hk) + column + unit;
      const T* from_q = p.q.template at<T>(s.row, token + row, hk) + column + unit;
      tile::copy_16(k.at(row, unit), from_k, row < count && column + unit < p.k.width);
      tile::copy_16(q.at(row, unit), from_q, row < count && column + unit < p.q.width);
    }
    tile::commit_copies();
    const int channel = column + lane;
    float gates[16];
#pragma unroll
    for (int i = 0; i < 16; i++)
      gates[i] = top + i < count && channel < p.K ? channel_gate(p, s, first + top + i, h, channel) : 0.0f;
    double sum = 0;
#pragma unroll
    for (int i = 0; i < 16; i++) *before.at(top + i, lane) = static_cast<float>(sum += gates[i]);
    totals[warp * WIDTH + lane] = static_cast<float>(sum);
    sum = 0;
#pragma unroll
    for (int i = 15; i >= 0; i--) *after.at(top + i, lane) = static_cast<float>(sum), sum += gates[i];
    tile::wait_copies<0>();
    tile::sync();

    // ---- rows -------------------------------------------------------------------------------------------------------------
    double earlier = 0, later = 0;
    for (int w = 0; w < WARPS; w++) (w < warp ? earlier : later) += w == warp ? 0.0f : totals[w * WIDTH + lane];
    if (warp == 0 && channel < decay_width)
      p.decays[(slot * p.H + h) * decay_width + channel] =
          channel < p.K ? tile::exponential(static_cast<float>(later + totals[lane])) : 0.0f;
    for (int j = top; j < top + 16 && j < count && channel < p.read.width; j++) {
      const int64_t to = ((s.row * p.T + token + j) * p.H + h) * p.read.width + channel;
      const float since = tile::exponential(static_cast<float>(earlier + *before.at(j, lane)));
      const float until = tile::exponential(static_cast<float>(later + *after.at(j, lane)));
      const float own = key[j] * tile::load_float(k.at(j, lane));
      const auto leave = [&](const Rows& rows, float x) {
        tile::store_float(const_cast<T*>(static_cast<const T*>(rows.data)) + to, x);
      };
      if constexpr (Rule::READS) leave(p.read, since * own);
      leave(p.ask, since * query[j] * tile::load_float(q.at(j, lane)));
      leave(p.write, until * own);
      if (p.left != nullptr && h % (p.H / p.Hk) == 0 && channel < p.K)
        p.left[((s.row * p.T + token + j) * p.Hk + hk) * p.K + channel] = own;
    }

    // ---- pairs of tokens of one 16 ------------------------------------------------------------------------------------------
#pragma unroll 1
    for (int j = 0; j < 16; j++) {
      const float own = tile::load_float(k.at(top + j, lane)), asked = tile::load_float(q.at(top + j, lane));
      float x[tile::WARP], between = 0;
#pragma unroll
      for (int i = 15; i >= 0; i--) {
        x[i] = x[16 + i] = 0;
        if (i > j) continue;
        const float decayed = tile::exponential(between) * tile::load_float(k.at(top + i, lane));
        x[i] = own * decayed, x[16 + i] = asked * decayed;
        between += gates[i];
      }
      *pairs.at(top + j, lane) += sum_by_lane(x, lane);
    }

    // ---- of different 16s -----------------------------------------------------------------------------------------------------
#pragma unroll 1
    for (int step = 0; step < WIDTH; step += Op32::STEP) {
      Op32::A left_k, left_q;
#pragma unroll
      for (int i = 0; i < 4; i++) {  // rows g and g + 8, columns c and then c + 1
        const int row = top + g + i % 2 * 8, x = step + c + i / 2;
        const float since = tile::exponential(*before.at(row, x));
        left_k.x[i] = since * tile::load_float(k.at(row, x)), left_q.x[i] = since * tile::load_float(q.at(row, x));
      }
      float between[2] = {};
#pragma unroll
      for (int w = WARPS - 1; w >= 0; w--) {
        if (w >= warp) continue;
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int row = 16 * w + 8 * i + g, x = step + c;
          Op32::B right;
#pragma unroll
          for (int l = 0; l < 2; l++)
            right.x[l] = tile::exponential(*after.at(row, x + l) + between[l]) * tile::load_float(k.at(row, x + l));
          if constexpr (Rule::READS) Op32::multiply(kk[w][i], left_k, right);
          Op32::multiply(qk[w][i], left_q, right);
        }
#pragma unroll
        for (int l = 0; l < 2; l++) between[l] += totals[w * WIDTH + step + c + l];
      }
    }
  }
  tile::sync();  // k and q are done with, and images may lie there

  // ---- A and reach, and the solution ----------------------------------------------------------------------------------------
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    if (w >= warp) continue;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int row = top + g + e / 2 * 8, column = 16 * w + 8 * i + c + e % 2;
        if constexpr (Rule::READS) *a.at(row, column) = beta[row] * key[row] * key[column] * kk[w][i][e];
        *reach.at(row, column) = Operand<T>::narrow(query[row] * key[column] * qk[w][i][e]);
      }
  }
  for (int i = lane; i < 256; i += tile::WARP) {
    const int j = top + i / 16, l = top + i % 16;
    if constexpr (Rule::READS) *a.at(j, l) = l < j ? beta[j] * key[j] * key[l] * *pairs.at(j, i % 16) : 0.0f;
    *reach.at(j, l) = Operand<T>::narrow(l <= j ? query[j] * key[l] * *pairs.at(j, 16 + i % 16) : 0.0f);
  }
  tile::sync_warp();
  if (p.gone != nullptr) drop_gone<Rule, T, C>(p, a, reach, slot, h, warp, lane);
  if constexpr (Rule::READS) solve_triangle<T, C>(solve, a, beta, p.plain, warp, lane);
  tile::sync();
  const auto leave = [&](const Triangle<T, C>& from, void* images) {
    const auto* x = reinterpret_cast<const tile::Vec16*>(from.data);
    auto* to = reinterpret_cast<tile::Vec16*>(static_cast<T*>(images) + (slot * p.H + h) * Size::IMAGE);
    for (int i = thread; i < Size::IMAGE / EACH; i += THREADS) to[i] = x[i];
  };
  if constexpr (Rule::READS) leave(solve, p.solve);
  leave(reach, p.reach);
}

// Host: the launch.
template <class Rule, class T>
void launch_prepare_channels(const ChannelProblem& p, tile::Stream stream) {
  tile::launch("scan prepare_channels", prepare_channels<Rule, T>, {static_cast<unsigned>(p.slots * p.H), 1, 1},
               2 * Operand<T>::CHUNK, ChannelShared<Rule, T>::BYTES, stream, p, padded_keys(p.K));
}

}  // namespace writesae::cuda
