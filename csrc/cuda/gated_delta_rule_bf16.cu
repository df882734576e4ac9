// gated_delta_rule computed with bf16 operands.
#include "gated_delta_rule_chunks.cuh"

namespace writesae::cuda {

template void run_prepare<bf16>(const Problem&, tile::Stream);
template void run_chunks<bf16>(const Problem&, int, tile::Stream);
template size_t walk_shared<bf16>(int64_t, int, int);

}  // namespace writesae::cuda
