// dplr without an erase, computed with float operands (three-fold tf32): forward and backward.
#include "dplr.cuh"
#include "scan_backward_chunks.cuh"
#include "scan_chunks.cuh"

namespace writesae::cuda::dplr {

template <>
void AdditiveRule::run_prepare<float>(const ChannelProblem& p, tile::Stream stream) {
  launch_prepare_channels<AdditiveRule, float>(p, stream);
}

template <>
void AdditiveRule::run_chunks<float>(const ChannelProblem& p, int warps, tile::Stream stream) {
  launch_chunks<AdditiveRule, float>(p, warps, stream);
}

template <>
void AdditiveRule::run_backward<float>(const ChannelBackward& b, tile::Stream stream) {
  launch_backward<AdditiveRule, float>(b, stream);
}

}  // namespace writesae::cuda::dplr
