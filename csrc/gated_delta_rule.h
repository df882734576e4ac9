// gated_delta_rule, a scan (scan.h) of the delta rule: S_t = e^g (I - beta k k^T) S_{t-1} + beta k v^T, o_t = scale S_t^T q_t.
#pragma once

#include "scan.h"

namespace writesae {

namespace cpu::gated_delta_rule {

void forward(const ScanParams& p, const Parallel& parallel);
void backward(const ScanBackwardParams& p, const Parallel& parallel);
void step(const ScanStepParams& p, const Parallel& parallel);

}  // namespace cpu::gated_delta_rule

namespace cuda::gated_delta_rule {

// All pointers are the device's, and nothing is read back: launches on `stream` (a cudaStream_t) and returns. `workspace`
// has so many bytes, 256-byte aligned. K <= 256.
int64_t forward_workspace(const ScanParams& p, Plan plan = {});
void forward(const ScanParams& p, void* workspace, void* stream, Plan plan = {});
int64_t backward_workspace(const ScanBackwardParams& p);
void backward(const ScanBackwardParams& p, void* workspace, void* stream);
void step(const ScanStepParams& p, void* stream);

}  // namespace cuda::gated_delta_rule

// For scan_operators.h.
struct GatedDeltaRule {
  static constexpr const char* NAME = "gated_delta_rule";
  static constexpr bool LOW_RANK = false;
  static constexpr bool CHANNEL_GATE = true;
#if WRITESAE_SIDE == 0
  static constexpr auto forward = cpu::gated_delta_rule::forward;
  static constexpr auto backward = cpu::gated_delta_rule::backward;
  static constexpr auto step = cpu::gated_delta_rule::step;
#else
  static constexpr auto forward_workspace = cuda::gated_delta_rule::forward_workspace;
  static constexpr auto forward = cuda::gated_delta_rule::forward;
  static constexpr auto backward_workspace = cuda::gated_delta_rule::backward_workspace;
  static constexpr auto backward = cuda::gated_delta_rule::backward;
  static constexpr auto step = cuda::gated_delta_rule::step;
#endif
};
}  // namespace writesae
