// The backward of gated_delta_rule computed with float operands (three-fold tf32).
#include "gated_delta_rule_backward_chunks.cuh"

namespace writesae::cuda::gated_delta_rule {

template void run_backward<float>(const Backward&, tile::Stream);

}  // namespace writesae::cuda::gated_delta_rule
