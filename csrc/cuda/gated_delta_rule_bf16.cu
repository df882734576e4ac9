// gated_delta_rule computed with bf16 operands.
#include "gated_delta_rule_chunks.cuh"

namespace writesae::cuda::gated_delta_rule {

template void run_prepare<bf16>(const Problem&, tile::Stream);
template void run_chunks<bf16>(const Problem&, int, tile::Stream);

}  // namespace writesae::cuda::gated_delta_rule
