// ssd, a scan (scan.h) without an erase: S_t = e^g S_{t-1} + k (beta v)^T, o_t = scale S_t^T q_t. Mamba-2's x is v, dt is beta,
// dt A is g, B is k and C is q.
#pragma once

#include "scan.h"

namespace writesae {

namespace cpu::ssd {

void forward(const ScanParams& p, const Parallel& parallel);
void backward(const ScanBackwardParams& p, const Parallel& parallel);
void step(const ScanStepParams& p, const Parallel& parallel);

}  // namespace cpu::ssd

namespace cuda::ssd {

// All pointers are the device's; launches on `stream` (a cudaStream_t) and returns. `workspace`: so many bytes. K <= 256.
int64_t forward_workspace(const ScanParams& p, Plan plan = {});
void forward(const ScanParams& p, void* workspace, void* stream, Plan plan = {});
int64_t backward_workspace(const ScanBackwardParams& p);
void backward(const ScanBackwardParams& p, void* workspace, void* stream);
void step(const ScanStepParams& p, void* stream);

}  // namespace cuda::ssd

// For scan_operators.h.
struct Ssd {
  static constexpr const char* NAME = "ssd";
  static constexpr bool LOW_RANK = false;
#if WRITESAE_SIDE == 0
  static constexpr bool CHANNEL_GATE = true;
  static constexpr auto forward = cpu::ssd::forward;
  static constexpr auto backward = cpu::ssd::backward;
  static constexpr auto step = cpu::ssd::step;
#else
  static constexpr bool CHANNEL_GATE = false;
  static constexpr auto forward_workspace = cuda::ssd::forward_workspace;
  static constexpr auto forward = cuda::ssd::forward;
  static constexpr auto backward_workspace = cuda::ssd::backward_workspace;
  static constexpr auto backward = cuda::ssd::backward;
  static constexpr auto step = cuda::ssd::step;
#endif
};

}  // namespace writesae
