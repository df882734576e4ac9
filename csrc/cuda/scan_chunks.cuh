// A scan: the launches of one type of computation.
#pragma once

#include "scan_join.cuh"
#include "scan_prepare_channels.cuh"
#include "scan_walk.cuh"

namespace writesae::cuda {

// The factors of one added edit, a block each. After the factors of tokens.
template <class T>
__global__ void __launch_bounds__(128) edit_factors(const __grid_constant__ Problem p) {
  constexpr int C = Operand<T>::CHUNK;
  using F = Factors<C>;
  using E = EditFactors<C>;
  const int64_t e = tile::block_x(), *index = p.edits.index + 4 * e;
  const int64_t n = index[0], t = index[1], h = index[2];
  if (!p.edits.kind(e).adds()) return;
  const Sequence s = sequence<C>(p, n);
  const int64_t first = t / C * C, slot = s.first_slot + t / C, hk = h / (p.H / p.Hk);
  const int at = static_cast<int>(t - first), count = s.length - first < C ? static_cast<int>(s.length - first) : C;
  const float* factors = p.factors + (slot * p.H + h) * F::SIZE;
  const float* left = p.edits.left + e * p.K;
  float* to = p.edit_factors + e * E::SIZE;
  const auto since = [&](int j) {
    return tile::exponential((factors[F::WHOLE + j] - factors[F::WHOLE + at]) +
                             (factors[F::REST + j] - factors[F::REST + at]));
  };
  for (int j = tile::warp(); j < C; j += 4) {
    float right = 0, out = 0;
    if (j >= at && j < count) {
      const T* k = p.k.template at<T>(s.row, s.origin + first + j, hk);
      const T* q = p.q.template at<T>(s.row, s.origin + first + j, hk);
      for (int i = tile::lane(); i < p.K; i += tile::WARP)
        right += left[i] * tile::load_float(k + i), out += left[i] * tile::load_float(q + i);
    }
    right = tile::warp_sum(right), out = tile::warp_sum(out);
    if (tile::lane() != 0) continue;
    const float d = j >= at ? since(j) : 0.0f;
    to[E::RIGHT + j] = j > at ? d * factors[F::KEY + j] * right : 0.0f;
    to[E::OUT + j] = j == at && p.edits.kind(e).after() ? 0.0f : d * factors[F::QUERY + j] * out;
    if (j == C - 1) to[E::END] = d;
  }
}

template <class Rule, class T, int KP, int WARPS, bool FULL>
void launch_walk(const Given<Rule>& p, tile::Stream stream) {
  constexpr int COLUMNS = 16 * WARPS;
  const int64_t tiles = (p.V + COLUMNS - 1) / COLUMNS + (FULL || !Rule::READS ? 0 : (p.K + COLUMNS - 1) / COLUMNS);
  const auto blocks = static_cast<unsigned>(tiles * p.H * p.segments * p.N);
  tile::launch(FULL ? "scan walk" : "scan walk of segments", walk<Rule, T, KP, WARPS, FULL>, {blocks, 1, 1}, 32 * WARPS,
               p.stages * WalkShared<Rule, T, KP, WARPS, FULL>::STAGE, stream, p);
}

template <class Rule, int KP>
void launch_join(const Problem& p, int chunk, tile::Stream stream) {
  const auto blocks = [&](int64_t each, int64_t size) {
    return static_cast<unsigned>(p.N * p.H * ((size + each - 1) / each));
  };
  if constexpr (Rule::READS) {
    tile::launch("scan join", join<KP>, {blocks(16 * JOIN_WARPS, p.V), 1, 1}, 32 * JOIN_WARPS, 32 * KP * sizeof(float),
                 stream, p, chunk);
  } else {
    tile::launch("scan carry", carry<128, Rule::CHANNEL>, {blocks(128, static_cast<int64_t>(p.K) * p.V), 1, 1}, 128, 0,
                 stream, p, chunk);
  }
}

template <class Rule, class T, int KP>
void launch_walks(const Given<Rule>& p, int warps, tile::Stream stream) {
  if (p.segments > 1) {
    launch_walk<Rule, T, KP, 4, false>(p, stream);
    launch_join<Rule, KP>(p, Operand<T>::CHUNK, stream);
  }
  if constexpr (Rule::ALL && sizeof(T) == 2 && (KP == 64 || KP == 128)) {
    if (warps == 8) return launch_walk<Rule, T, KP, 8, true>(p, stream);
  }
  launch_walk<Rule, T, KP, 4, true>(p, stream);
}

template <class Rule, class T>
void launch_chunks(const Given<Rule>& p, int warps, tile::Stream stream) {
  if constexpr (Rule::CHANNEL) {
    Rule::template run_prepare<T>(p, stream);
    if (p.edits.count > 0)
      tile::launch("scan edit_rows", edit_rows<Rule, T>, {static_cast<unsigned>(p.edits.count), 1, 1}, 128, 0, stream, p);
    if (p.P > 0)
      tile::launch("scan shot_rows", shot_rows<Rule, T>, {static_cast<unsigned>(p.P * p.H), 1, 1}, 128, 0, stream, p);
  } else {
    launch_prepare<Rule, T>(p, stream);
    if (p.edits.count > 0)
      tile::launch("scan edit_factors", edit_factors<T>, {static_cast<unsigned>(p.edits.count), 1, 1}, 128, 0, stream, p);
  }
  with_padded_keys(p.K, [&](auto keys) { launch_walks<Rule, T, decltype(keys)::value>(p, warps, stream); });
}

}  // namespace writesae::cuda
