// dplr without an erase, computed with bf16 operands: forward and backward.
#include "dplr.cuh"
#include "scan_backward_chunks.cuh"
#include "scan_chunks.cuh"

namespace writesae::cuda::dplr {

template <>
void AdditiveRule::run_prepare<bf16>(const ChannelProblem& p, tile::Stream stream) {
  launch_prepare_channels<AdditiveRule, bf16>(p, stream);
}

template <>
void AdditiveRule::run_chunks<bf16>(const ChannelProblem& p, int warps, tile::Stream stream) {
  launch_chunks<AdditiveRule, bf16>(p, warps, stream);
}

template <>
void AdditiveRule::run_backward<bf16>(const ChannelBackward& b, tile::Stream stream) {
  launch_backward<AdditiveRule, bf16>(b, stream);
}

}  // namespace writesae::cuda::dplr
