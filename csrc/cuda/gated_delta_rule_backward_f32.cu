// The backward of gated_delta_rule computed with float operands (three-fold tf32).
#include "gated_delta_rule.cuh"
#include "scan_backward_chunks.cuh"

namespace writesae::cuda::gated_delta_rule {

template <>
void Rule::run_backward<float>(const Backward& b, tile::Stream stream) {
  launch_backward<Rule, float>(b, stream);
}

}  // namespace writesae::cuda::gated_delta_rule
