// gated_delta_rule computed with float operands (three-fold tf32).
#include "gated_delta_rule.cuh"
#include "scan_chunks.cuh"

namespace writesae::cuda::gated_delta_rule {

template <>
void Rule::run_prepare<float>(const Problem& p, tile::Stream stream) {
  launch_prepare<Rule, float>(p, stream);
}

template <>
void Rule::run_chunks<float>(const Problem& p, int warps, tile::Stream stream) {
  launch_chunks<Rule, float>(p, warps, stream);
}

}  // namespace writesae::cuda::gated_delta_rule
