// The backward of gated_delta_rule computed with bfloat16 operands.
#include "gated_delta_rule_backward_chunks.cuh"

namespace writesae::cuda {

template void run_backward<bf16>(const Backward&, tile::Stream);

}  // namespace writesae::cuda
