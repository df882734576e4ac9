// The backward of dplr with its low-rank erase, computed with float operands (three-fold tf32).
#include "dplr.cuh"
#include "scan_backward_chunks.cuh"

namespace writesae::cuda::dplr {

template <>
void LowRankRule::run_backward<float>(const LowRankBackward& b, tile::Stream stream) {
  launch_backward<LowRankRule, float>(b, stream);
}

}  // namespace writesae::cuda::dplr
