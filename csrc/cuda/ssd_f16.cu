// ssd computed with f16 operands.
#include "ssd.cuh"
#include "scan_chunks.cuh"

namespace writesae::cuda::ssd {

template <>
void Rule::run_chunks<f16>(const Problem& p, int warps, tile::Stream stream) {
  launch_chunks<Rule, f16>(p, warps, stream);
}

}  // namespace writesae::cuda::ssd
