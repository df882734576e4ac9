// The backward of a scan: the launches of one type of computation.
#pragma once

#include "scan_backward_walk.cuh"
#include "scan_gradients.cuh"
#include "scan_gradients_channels.cuh"

namespace writesae::cuda {

// The gradients of one edit's sides, a block each. After `reverse`.
template <class T>
__global__ void __launch_bounds__(128) edit_gradients(const __grid_constant__ Backward b) {
  constexpr int C = Operand<T>::CHUNK;
  using F = Factors<C>;
  const Problem& p = b.p;
  const int64_t edit = tile::block_x(), *index = p.edits.index + 4 * edit;
  const int64_t n = index[0], t = index[1], h = index[2], hk = h / (p.H / p.Hk);
  const bool none = !p.edits.kind(edit).adds(), unread = none || p.edits.kind(edit).after();
  const float *left = p.edits.left + edit * p.K, *right = p.edits.right + edit * p.V;
  float *d_left = b.d_edit_left + edit * p.K, *d_right = b.d_edit_right + edit * p.V;
  const int64_t slot = none ? 0 : slot_ending<C>(b, n, t);
  const Sequence s = sequence<C>(p, n);
  const T* d_o = b.d_o.template at<T>(s.row, s.origin + t, h);
  const T* q = p.q.template at<T>(s.row, s.origin + t, hk);
  const T* end = static_cast<const T*>(b.ends) + (slot * p.H + h) * p.V * b.key_width;
  // How the last query reads the edit: along its left side, and along its right.
  float along_left = 0, along_right = 0;
  for (int k = tile::lane(); k < p.K && !unread; k += tile::WARP) along_left += left[k] * tile::load_float(q + k);
  for (int v = tile::lane(); v < p.V && v < b.d_o.width && !unread; v += tile::WARP)
    along_right += right[v] * tile::load_float(d_o + v);
  const float query = unread ? 0.0f : p.factors[(slot * p.H + h) * F::SIZE + F::QUERY + p.cuts[slot].count - 1];
  along_left = query * tile::warp_sum(along_left), along_right = query * tile::warp_sum(along_right);
  for (int k = tile::thread(); k < p.K; k += 128) {
    float sum = unread ? 0.0f : along_right * tile::load_float(q + k);
    for (int v = 0; v < p.V && !none; v++)
      sum += right[v] * tile::load_float(end + static_cast<int64_t>(v) * b.key_width + k);
    d_left[k] = sum;
  }
  for (int v = tile::warp(); v < p.V; v += 4) {
    float sum = 0;
    for (int k = tile::lane(); k < p.K && !none; k += tile::WARP)
      sum += left[k] * tile::load_float(end + static_cast<int64_t>(v) * b.key_width + k);
    sum = tile::warp_sum(sum);
    if (tile::lane() == 0) d_right[v] = sum + (unread || v >= b.d_o.width ? 0.0f : along_left * tile::load_float(d_o + v));
  }
}

template <class Rule, class T, int KP>
void launch_backward_walks(const GivenBack<Rule>& b, tile::Stream stream) {
  const int64_t tiles = (b.p.V + 16 * BACK_WARPS - 1) / (16 * BACK_WARPS);
  const auto blocks = static_cast<unsigned>(tiles * b.p.H * b.p.N);
  tile::launch("scan_backward starts", starts<Rule, T, KP>, {blocks, 1, 1}, 32 * BACK_WARPS,
               StartsShared<Rule, T, KP>::BYTES, stream, b);
  tile::launch("scan_backward reverse", reverse<Rule, T, KP>, {blocks, 1, 1}, 32 * BACK_WARPS,
               ReverseShared<Rule, T, KP>::BYTES, stream, b);
}

template <class Rule, class T, int KT>
void launch_gradients(const GivenBack<Rule>& b, tile::Stream stream) {
  const auto blocks = static_cast<unsigned>(b.p.slots * b.p.Hk * key_tiles(b.p.K));
  if constexpr (Rule::CHANNEL) {
    tile::launch("scan_backward gradients_channels", gradients_channels<Rule, T, KT, false>, {blocks, 1, 1},
                 2 * Operand<T>::CHUNK, ChannelGradientsShared<T, KT>::BYTES, stream, b);
    if constexpr (Rule::LOW_RANK)
      tile::launch("scan_backward gradients_channels of b", gradients_channels<Rule, T, KT, true>, {blocks, 1, 1},
                   2 * Operand<T>::CHUNK, ChannelGradientsShared<T, KT>::BYTES, stream, b);
  } else {
    tile::launch("scan_backward gradients", gradients<Rule, T, KT>, {blocks, 1, 1}, 2 * Operand<T>::CHUNK,
                 GradientsShared<T, KT>::BYTES, stream, b);
  }
}

template <class Rule, class T>
void launch_backward(const GivenBack<Rule>& b, tile::Stream stream) {
  if constexpr (Rule::CHANNEL) {
    Given<Rule> p = {};
    static_cast<Problem&>(p) = b.p;
    p.read = b.read, p.ask = b.ask, p.write = b.write, p.decays = b.decays;
    if constexpr (Rule::LOW_RANK)
      p.a = b.a, p.b = b.b, p.erase_write = b.erase_write, p.mix = b.found, p.erase_reach = b.erase_reach;
    Rule::template run_prepare<T>(p, stream);
  } else {
    Rule::template run_prepare<T>(b.p, stream);
  }
  with_padded_keys(b.p.K, [&](auto keys) { launch_backward_walks<Rule, T, decltype(keys)::value>(b, stream); });
  if (key_tile(b.p.K) == 32) {
    launch_gradients<Rule, T, 32>(b, stream);
  } else {
    launch_gradients<Rule, T, 64>(b, stream);
  }
  if (b.p.edits.count > 0)
    tile::launch("scan_backward edit_gradients", edit_gradients<T>, {static_cast<unsigned>(b.p.edits.count), 1, 1}, 128, 0,
                 stream, static_cast<const Backward&>(b));
}

}  // namespace writesae::cuda
