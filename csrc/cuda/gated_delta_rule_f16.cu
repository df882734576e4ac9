// gated_delta_rule computed with f16 operands.
#include "gated_delta_rule_chunks.cuh"

namespace writesae::cuda::gated_delta_rule {

template void run_chunks<f16>(const Problem&, int, tile::Stream);

}  // namespace writesae::cuda::gated_delta_rule
