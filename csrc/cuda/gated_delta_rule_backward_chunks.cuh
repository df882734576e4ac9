// The backward of gated_delta_rule: the launches of one type of computation, for its translation unit.
#pragma once

#include "gated_delta_rule_backward_chunk.cuh"
#include "scan_backward_chunks.cuh"

namespace writesae::cuda::gated_delta_rule {

template <class T, int KT>
void launch_gradients(const Backward& b, tile::Stream stream) {
  const auto blocks = static_cast<unsigned>(b.p.slots * b.p.Hk * key_tiles(b.p.K));
  tile::launch("gated_delta_rule_backward gradients", gradients<T, KT>, {blocks, 1, 1}, 2 * Operand<T>::CHUNK,
               GradientsShared<T, KT>::BYTES, stream, b);
}

template <class T>
void run_backward(const Backward& b, tile::Stream stream) {
  run_prepare<T>(b.p, stream);
  run_backward_walks<T>(b, stream);
  if (key_tile(b.p.K) == 32) {
    launch_gradients<T, 32>(b, stream);
  } else {
    launch_gradients<T, 64>(b, stream);
  }
  run_edit_gradients<T>(b, stream);
}

}  // namespace writesae::cuda::gated_delta_rule
