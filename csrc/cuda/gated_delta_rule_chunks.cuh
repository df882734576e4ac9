// gated_delta_rule: the launches of one type of computation, for its translation unit.
#pragma once

#include "gated_delta_rule_prepare.cuh"
#include "scan_chunks.cuh"

namespace writesae::cuda::gated_delta_rule {

template <class T, int KP>
void launch_prepare(const Problem& p, tile::Stream stream) {
  tile::launch("gated_delta_rule prepare", prepare<T, KP>, {static_cast<unsigned>(p.slots * p.Hk), 1, 1},
               2 * Operand<T>::CHUNK, PrepareShared<T, KP>::BYTES, stream, p);
}

template <class T>
void run_prepare(const Problem& p, tile::Stream stream) {
  with_padded_keys(p.K, [&](auto keys) { launch_prepare<T, decltype(keys)::value>(p, stream); });
}

template <class T, int KP>
void run_keys(const Problem& p, int warps, tile::Stream stream) {
  launch_prepare<T, KP>(p, stream);
  run_walks<T, KP>(p, warps, stream);
}

template <class T>
void run_chunks(const Problem& p, int warps, tile::Stream stream) {
  with_padded_keys(p.K, [&](auto keys) { run_keys<T, decltype(keys)::value>(p, warps, stream); });
}

}  // namespace writesae::cuda::gated_delta_rule
