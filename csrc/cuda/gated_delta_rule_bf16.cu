// gated_delta_rule computed with bf16 operands.
#include "gated_delta_rule.cuh"
#include "scan_chunks.cuh"

namespace writesae::cuda::gated_delta_rule {

template <>
void Rule::run_prepare<bf16>(const Problem& p, tile::Stream stream) {
  launch_prepare<Rule, bf16>(p, stream);
}

template <>
void Rule::run_chunks<bf16>(const Problem& p, int warps, tile::Stream stream) {
  launch_chunks<Rule, bf16>(p, warps, stream);
}

}  // namespace writesae::cuda::gated_delta_rule
