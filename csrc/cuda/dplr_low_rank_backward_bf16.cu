// The backward of dplr with its low-rank erase, computed with bf16 operands.
#include "dplr.cuh"
#include "scan_backward_chunks.cuh"

namespace writesae::cuda::dplr {

template <>
void LowRankRule::run_backward<bf16>(const LowRankBackward& b, tile::Stream stream) {
  launch_backward<LowRankRule, bf16>(b, stream);
}

}  // namespace writesae::cuda::dplr
