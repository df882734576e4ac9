// gated_delta_rule computed with f16 operands.
#include "gated_delta_rule.cuh"
#include "scan_chunks.cuh"

namespace writesae::cuda::gated_delta_rule {

template <>
void Rule::run_chunks<f16>(const Problem& p, int warps, tile::Stream stream) {
  launch_chunks<Rule, f16>(p, warps, stream);
}

}  // namespace writesae::cuda::gated_delta_rule
