// gated_delta_rule computed with f16 operands.
#include "gated_delta_rule_chunks.cuh"

namespace writesae::cuda {

template void run_chunks<f16>(const Problem&, int, tile::Stream);
template size_t walk_shared<f16>(int64_t, int, int);

}  // namespace writesae::cuda
