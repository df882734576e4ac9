// ssd computed with float operands (three-fold tf32).
#include "ssd.cuh"
#include "scan_backward_chunks.cuh"
#include "scan_chunks.cuh"

namespace writesae::cuda::ssd {

template <>
void Rule::run_prepare<float>(const Problem& p, tile::Stream stream) {
  launch_prepare<Rule, float>(p, stream);
}

template <>
void Rule::run_chunks<float>(const Problem& p, int warps, tile::Stream stream) {
  launch_chunks<Rule, float>(p, warps, stream);
}

template <>
void Rule::run_backward<float>(const Backward& b, tile::Stream stream) {
  launch_backward<Rule, float>(b, stream);
}

}  // namespace writesae::cuda::ssd
