// dplr on CUDA, the host's part.
#include "dplr.cuh"

#include "scan_call.cuh"
#include "scan_step.cuh"

namespace writesae::cuda::dplr {

int64_t forward_workspace(const ScanParams& p, Plan plan) {
  return p.a.data != nullptr ? lay_out<LowRankRule>(p, nullptr, plan).workspace
                             : lay_out<AdditiveRule>(p, nullptr, plan).workspace;
}

void forward(const ScanParams& p, void* workspace, void* stream, Plan plan) {
  const auto forward = p.a.data != nullptr ? run_forward<LowRankRule> : run_forward<AdditiveRule>;
  forward(p, workspace, static_cast<tile::Stream>(stream), plan);
}

int64_t backward_workspace(const ScanBackwardParams& p) {
  return p.in.a.data != nullptr ? lay_out_backward<LowRankRule>(p, nullptr).workspace
                                : lay_out_backward<AdditiveRule>(p, nullptr).workspace;
}

void backward(const ScanBackwardParams& p, void* workspace, void* stream) {
  const auto backward = p.in.a.data != nullptr ? run_scan_backward<LowRankRule> : run_scan_backward<AdditiveRule>;
  backward(p, workspace, static_cast<tile::Stream>(stream));
}

void step(const ScanStepParams& p, void* stream) {
  const auto step = p.a.data != nullptr ? run_step<LowRankRule> : run_step<AdditiveRule>;
  step(p, static_cast<tile::Stream>(stream));
}

}  // namespace writesae::cuda::dplr
