// gated_delta_rule computed with float operands (three-fold tf32).
#include "gated_delta_rule_chunks.cuh"

namespace writesae::cuda {

template void run_prepare<float>(const Problem&, tile::Stream);
template void run_chunks<float>(const Problem&, int, tile::Stream);
template size_t walk_shared<float>(int64_t, int, int);

}  // namespace writesae::cuda
