// Launches of encode_product_hopper.cuh. Compiled for sm_90a only.
#include "encode_product_hopper.cuh"

namespace writesae::cuda {

void encode_product_hopper(const EncodeProductParams& p, bool ping_pong, int cluster, void* stream_) {
  const auto stream = static_cast<tile::Stream>(stream_);
  if (p.F == 0 || p.T == 0) return;
  const int processors = tile::multiprocessors();
  if (cluster == 1) {
    ping_pong ? product::run<1, true>(p, processors, stream) : product::run<1, false>(p, processors, stream);
  } else {
    ping_pong ? product::run<2, true>(p, processors, stream) : product::run<2, false>(p, processors, stream);
  }
}

}  // namespace writesae::cuda
