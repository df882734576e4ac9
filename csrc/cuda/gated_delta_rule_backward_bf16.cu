// The backward of gated_delta_rule computed with bf16 operands.
#include "gated_delta_rule.cuh"
#include "scan_backward_chunks.cuh"

namespace writesae::cuda::gated_delta_rule {

template <>
void Rule::run_backward<bf16>(const Backward& b, tile::Stream stream) {
  launch_backward<Rule, bf16>(b, stream);
}

}  // namespace writesae::cuda::gated_delta_rule
