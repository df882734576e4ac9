// gated_delta_rule with a gate of each channel, computed with bf16 operands.
#include "gated_delta_rule.cuh"
#include "scan_chunks.cuh"

namespace writesae::cuda::gated_delta_rule {

template <>
void ChannelRule::run_prepare<bf16>(const ChannelProblem& p, tile::Stream stream) {
  launch_prepare_channels<ChannelRule, bf16>(p, stream);
}

template <>
void ChannelRule::run_chunks<bf16>(const ChannelProblem& p, int warps, tile::Stream stream) {
  launch_chunks<ChannelRule, bf16>(p, warps, stream);
}

}  // namespace writesae::cuda::gated_delta_rule
