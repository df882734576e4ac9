// ssd on CUDA, the host's part.
#include "ssd.cuh"

#include "scan_call.cuh"
#include "scan_step.cuh"

namespace writesae::cuda::ssd {

int64_t forward_workspace(const ScanParams& p, Plan plan) { return lay_out<Rule>(p, nullptr, plan).workspace; }

void forward(const ScanParams& p, void* workspace, void* stream, Plan plan) {
  run_forward<Rule>(p, workspace, static_cast<tile::Stream>(stream), plan);
}

int64_t backward_workspace(const ScanBackwardParams& p) { return lay_out_backward<Rule>(p, nullptr).workspace; }

void backward(const ScanBackwardParams& p, void* workspace, void* stream) {
  run_scan_backward<Rule>(p, workspace, static_cast<tile::Stream>(stream));
}

void step(const ScanStepParams& p, void* stream) { run_step<Rule>(p, static_cast<tile::Stream>(stream)); }

}  // namespace writesae::cuda::ssd
