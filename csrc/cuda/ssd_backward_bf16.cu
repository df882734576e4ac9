// The backward of ssd computed with bf16 operands.
#include "ssd.cuh"
#include "scan_backward_chunks.cuh"

namespace writesae::cuda::ssd {

template <>
void Rule::run_backward<bf16>(const Backward& b, tile::Stream stream) {
  launch_backward<Rule, bf16>(b, stream);
}

}  // namespace writesae::cuda::ssd
