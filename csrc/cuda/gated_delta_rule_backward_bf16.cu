// The backward of gated_delta_rule computed with bfloat16 operands.
#include "gated_delta_rule_backward_chunks.cuh"

namespace writesae::cuda::gated_delta_rule {

template void run_backward<bf16>(const Backward&, tile::Stream);

}  // namespace writesae::cuda::gated_delta_rule
