// gated_delta_rule with a gate of each channel, computed with float operands (three-fold tf32).
#include "gated_delta_rule.cuh"
#include "scan_chunks.cuh"

namespace writesae::cuda::gated_delta_rule {

template <>
void ChannelRule::run_prepare<float>(const ChannelProblem& p, tile::Stream stream) {
  launch_prepare_channels<ChannelRule, float>(p, stream);
}

template <>
void ChannelRule::run_chunks<float>(const ChannelProblem& p, int warps, tile::Stream stream) {
  launch_chunks<ChannelRule, float>(p, warps, stream);
}

}  // namespace writesae::cuda::gated_delta_rule
