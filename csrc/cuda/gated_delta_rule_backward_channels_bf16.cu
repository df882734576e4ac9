// The backward of gated_delta_rule with a gate of each channel, computed with bf16 operands.
#include "gated_delta_rule.cuh"
#include "scan_backward_chunks.cuh"

namespace writesae::cuda::gated_delta_rule {

template <>
void ChannelRule::run_backward<bf16>(const ChannelBackward& b, tile::Stream stream) {
  launch_backward<ChannelRule, bf16>(b, stream);
}

}  // namespace writesae::cuda::gated_delta_rule
