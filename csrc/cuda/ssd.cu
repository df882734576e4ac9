// ssd on CUDA: a scan (scan.cuh) that writes without reading. All of it in one file, compiled in one piece; a rule with more
// builds has a file for each type of computation.
#include "../ssd.h"

#include "scan_backward_chunks.cuh"
#include "scan_call.cuh"
#include "scan_chunks.cuh"
#include "scan_step.cuh"

namespace writesae::cuda::ssd {

struct Rule {
  static constexpr const char* NAME = "ssd";
  static constexpr bool READS = false, CHANNEL = false, LOW_RANK = false, ALL = false;

  // Host: the kernels in one type of computation.
  template <class T>
  static void run_prepare(const Problem& p, tile::Stream stream) {
    launch_prepare<Rule, T>(p, stream);
  }
  template <class T>
  static void run_chunks(const Problem& p, int warps, tile::Stream stream) {
    launch_chunks<Rule, T>(p, warps, stream);
  }
  template <class T>
  static void run_backward(const Backward& b, tile::Stream stream) {
    launch_backward<Rule, T>(b, stream);
  }
};

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
