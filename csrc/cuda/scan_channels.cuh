// A scan whose gate is of each key channel: gates, and the rows of edits and of states asked for. See ChannelProblem in scan.cuh.
#pragma once

#include "scan.cuh"

namespace writesae::cuda {

// The gate of a channel. e^-150 is 0 in float, and a bound keeps sums finite. NaN passes.
__device__ __forceinline__ float channel_gate(const Problem& p, const Sequence& s, int token, int h, int k) {
  const float g = read(p.g, s.row, s.origin + token, h, k);
  return g < -150.0f ? -150.0f : g;
}

// The sum of a channel's gates of tokens first..last.
__device__ __forceinline__ float channel_sum(const Problem& p, const Sequence& s, int first, int last, int h, int k) {
  double sum = 0;
#pragma unroll 1
  for (int t = first; t <= last; t++) sum += channel_gate(p, s, t, h, k);
  return static_cast<float>(sum);
}

// What `edit_factors` is to a gate of each head: the factors of one added edit, and its row at the chunk's end. A block each.
template <class Rule, class T>
__global__ void __launch_bounds__(128) edit_rows(const __grid_constant__ Given<Rule> p) {
  constexpr int C = Operand<T>::CHUNK, EACH = 256 / tile::WARP;
  using F = Factors<C>;
  using E = EditFactors<C>;
  const int64_t e = tile::block_x(), *index = p.edits.index + 4 * e;
  const int64_t n = index[0], t = index[1];
  const int h = static_cast<int>(index[2]), hk = h / (p.H / p.Hk), lane = tile::lane();
  if (!p.edits.kind(e).adds()) return;
  const Sequence s = sequence<C>(p, n);
  const int first = static_cast<int>(t / C * C), at = static_cast<int>(t - first);
  const int count = s.length - first < C ? static_cast<int>(s.length - first) : C;
  const float* factors = p.factors + ((s.first_slot + t / C) * p.H + h) * F::SIZE;
  float* to = p.edit_factors + e * E::SIZE;
  double sums[EACH] = {};
  float left[EACH] = {};
  for (int i = 0; i < EACH; i++)
    if (i * tile::WARP + lane < p.K) left[i] = p.edits.left[e * p.K + i * tile::WARP + lane];
  for (int j = 0; j < C; j++) {
    const bool seen = j >= at && j < count;
    double before[EACH] = {};  // a low-rank erase reads the state before the token's gate
    if constexpr (Rule::LOW_RANK) {
      for (int i = 0; i < EACH; i++) before[i] = sums[i];
    }
    for (int i = 0; i < EACH; i++)
      if (seen && j > at && i * tile::WARP + lane < p.K) sums[i] += channel_gate(p, s, first + j, h, i * tile::WARP + lane);
    if (j % 4 != tile::warp()) continue;
    float right = 0, out = 0;
    const T* k = p.k.template at<T>(s.row, s.origin + first + j, hk);
    const T* q = p.q.template at<T>(s.row, s.origin + first + j, hk);
    for (int i = 0; i < EACH; i++) {
      const int c = i * tile::WARP + lane;
      if (!seen || c >= p.K) continue;
      const float decayed = left[i] * tile::exponential(static_cast<float>(sums[i]));
      if constexpr (Rule::LOW_RANK) {
        right += left[i] * tile::exponential(static_cast<float>(before[i])) *
                 tile::load_float(p.a.template at<T>(s.row, s.origin + first + j, h) + c);
      } else {
        right += decayed * tile::load_float(k + c);
      }
      out += decayed * tile::load_float(q + c);
    }
    right = tile::warp_sum(right), out = tile::warp_sum(out);
    if (lane != 0) continue;
    to[E::RIGHT + j] = j > at ? (Rule::LOW_RANK ? 1.0f : factors[F::KEY + j]) * right : 0.0f;
    to[E::OUT + j] = j == at && p.edits.kind(e).after() ? 0.0f : factors[F::QUERY + j] * out;
  }
  if (tile::warp() != 0) return;
  for (int i = 0; i < EACH; i++)
    if (i * tile::WARP + lane < p.K)
      p.edit_rows[e * p.K + i * tile::WARP + lane] = left[i] * tile::exponential(static_cast<float>(sums[i]));
}

// The rows of one place that a state is asked for, a block per (place, value head), a thread per channel.
template <class Rule, class T>
__global__ void __launch_bounds__(128) shot_rows(const __grid_constant__ Given<Rule> p) {
  constexpr int C = Operand<T>::CHUNK;
  using F = Factors<C>;
  const int64_t place = tile::block_x() / p.H, n = p.places[2 * place], t = p.places[2 * place + 1];
  const int h = tile::block_x() % p.H, hk = h / (p.H / p.Hk);
  const Sequence s = sequence<C>(p, n);
  const int first = static_cast<int>(t / C * C), token = static_cast<int>(t - first);
  const float* factors = p.factors + ((s.first_slot + t / C) * p.H + h) * F::SIZE;
  const int64_t to = (place * p.H + h) * C * p.write.width;
  for (int k = tile::thread(); k < p.write.width; k += 128) {
    double sum = 0;
#pragma unroll 1
    for (int j = C - 1; j >= 0; j--) {
      float x = 0, low = 0;
      if (j <= token && k < p.K) {
        const float until = tile::exponential(static_cast<float>(sum));
        x = until * factors[F::KEY + j] * tile::load_float(p.k.template at<T>(s.row, s.origin + first + j, hk) + k);
        if constexpr (Rule::LOW_RANK) low = until * tile::load_float(p.b.template at<T>(s.row, s.origin + first + j, h) + k);
        sum += channel_gate(p, s, first + j, h, k);
      }
      tile::store_float(static_cast<T*>(p.shot_rows) + to + j * p.write.width + k, x);
      if constexpr (Rule::LOW_RANK) tile::store_float(static_cast<T*>(p.erase_shots) + to + j * p.write.width + k, low);
    }
    if (k < p.K) p.shot_decays[(place * p.H + h) * p.K + k] = tile::exponential(static_cast<float>(sum));
  }
}

}  // namespace writesae::cuda
