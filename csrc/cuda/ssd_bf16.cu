// ssd computed with bf16 operands.
#include "ssd.cuh"
#include "scan_backward_chunks.cuh"
#include "scan_chunks.cuh"

namespace writesae::cuda::ssd {

template <>
void Rule::run_prepare<bf16>(const Problem& p, tile::Stream stream) {
  launch_prepare<Rule, bf16>(p, stream);
}

template <>
void Rule::run_chunks<bf16>(const Problem& p, int warps, tile::Stream stream) {
  launch_chunks<Rule, bf16>(p, warps, stream);
}

template <>
void Rule::run_backward<bf16>(const Backward& b, tile::Stream stream) {
  launch_backward<Rule, bf16>(b, stream);
}

}  // namespace writesae::cuda::ssd
