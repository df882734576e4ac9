// dplr (diagonal plus low rank), a scan (scan.h) with a gate a channel and a low-rank erase, or none: S_t = Diag(e^g) S_{t-1} +
// b (a^T S_{t-1}) + k (beta v)^T, o_t = scale S_t^T q_t. RWKV-7 and Comba have a and b; GLA has neither.
#pragma once

#include "scan.h"

namespace writesae {

namespace cpu::dplr {

void forward(const ScanParams& p, const Parallel& parallel);
void backward(const ScanBackwardParams& p, const Parallel& parallel);
void step(const ScanStepParams& p, const Parallel& parallel);

}  // namespace cpu::dplr

namespace cuda::dplr {

// All pointers are the device's; launches on `stream` (a cudaStream_t) and returns. `workspace`: so many bytes. K <= 256.
int64_t forward_workspace(const ScanParams& p, Plan plan = {});
void forward(const ScanParams& p, void* workspace, void* stream, Plan plan = {});
int64_t backward_workspace(const ScanBackwardParams& p);
void backward(const ScanBackwardParams& p, void* workspace, void* stream);
void step(const ScanStepParams& p, void* stream);

}  // namespace cuda::dplr

// For scan_operators.h.
struct Dplr {
  static constexpr const char* NAME = "dplr";
  static constexpr bool LOW_RANK = true;
  static constexpr bool CHANNEL_GATE = true;
#if WRITESAE_SIDE == 0
  static constexpr auto forward = cpu::dplr::forward;
  static constexpr auto backward = cpu::dplr::backward;
  static constexpr auto step = cpu::dplr::step;
#else
  static constexpr auto forward_workspace = cuda::dplr::forward_workspace;
  static constexpr auto forward = cuda::dplr::forward;
  static constexpr auto backward_workspace = cuda::dplr::backward_workspace;
  static constexpr auto backward = cuda::dplr::backward;
  static constexpr auto step = cuda::dplr::step;
#endif
};

}  // namespace writesae
