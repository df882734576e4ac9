// dplr with its low-rank erase, computed with float operands (three-fold tf32).
#include "dplr.cuh"
#include "scan_chunks.cuh"
#include "scan_prepare_low_rank.cuh"

namespace writesae::cuda::dplr {

template <>
void LowRankRule::run_prepare<float>(const LowRankProblem& p, tile::Stream stream) {
  launch_prepare_low_rank<LowRankRule, float>(p, stream);
}

template <>
void LowRankRule::run_chunks<float>(const LowRankProblem& p, int warps, tile::Stream stream) {
  launch_chunks<LowRankRule, float>(p, warps, stream);
}

}  // namespace writesae::cuda::dplr
