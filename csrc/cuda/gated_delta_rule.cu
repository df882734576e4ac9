// gated_delta_rule on CUDA, the host's part.
#include "gated_delta_rule.cuh"

#include "scan_call.cuh"
#include "scan_step.cuh"

namespace writesae::cuda::gated_delta_rule {

int64_t forward_workspace(const ScanParams& p, Plan plan) {
  return p.channel_gate ? lay_out<ChannelRule>(p, nullptr, plan).workspace : lay_out<Rule>(p, nullptr, plan).workspace;
}

void forward(const ScanParams& p, void* workspace, void* stream, Plan plan) {
  const auto forward = p.channel_gate ? run_forward<ChannelRule> : run_forward<Rule>;
  forward(p, workspace, static_cast<tile::Stream>(stream), plan);
}

int64_t backward_workspace(const ScanBackwardParams& p) {
  return p.in.channel_gate ? lay_out_backward<ChannelRule>(p, nullptr).workspace
                           : lay_out_backward<Rule>(p, nullptr).workspace;
}

void backward(const ScanBackwardParams& p, void* workspace, void* stream) {
  const auto backward = p.in.channel_gate ? run_scan_backward<ChannelRule> : run_scan_backward<Rule>;
  backward(p, workspace, static_cast<tile::Stream>(stream));
}

void step(const ScanStepParams& p, void* stream) {
  const auto step = p.channel_gate ? run_step<ChannelRule> : run_step<Rule>;
  step(p, static_cast<tile::Stream>(stream));
}

}  // namespace writesae::cuda::gated_delta_rule
