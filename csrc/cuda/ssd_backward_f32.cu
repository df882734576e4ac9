// The backward of ssd computed with float operands (three-fold tf32).
#include "ssd.cuh"
#include "scan_backward_chunks.cuh"

namespace writesae::cuda::ssd {

template <>
void Rule::run_backward<float>(const Backward& b, tile::Stream stream) {
  launch_backward<Rule, float>(b, stream);
}

}  // namespace writesae::cuda::ssd
