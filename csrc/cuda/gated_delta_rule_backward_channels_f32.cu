// The backward of gated_delta_rule with a gate of each channel, computed with float operands (three-fold tf32).
#include "gated_delta_rule.cuh"
#include "scan_backward_chunks.cuh"

namespace writesae::cuda::gated_delta_rule {

template <>
void ChannelRule::run_backward<float>(const ChannelBackward& b, tile::Stream stream) {
  launch_backward<ChannelRule, float>(b, stream);
}

}  // namespace writesae::cuda::gated_delta_rule
