// dplr with its low-rank erase, computed with bf16 operands.
#include "dplr.cuh"
#include "scan_chunks.cuh"
#include "scan_prepare_low_rank.cuh"

namespace writesae::cuda::dplr {

template <>
void LowRankRule::run_prepare<bf16>(const LowRankProblem& p, tile::Stream stream) {
  launch_prepare_low_rank<LowRankRule, bf16>(p, stream);
}

template <>
void LowRankRule::run_chunks<bf16>(const LowRankProblem& p, int warps, tile::Stream stream) {
  launch_chunks<LowRankRule, bf16>(p, warps, stream);
}

}  // namespace writesae::cuda::dplr
