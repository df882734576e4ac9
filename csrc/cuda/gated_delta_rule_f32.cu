// gated_delta_rule computed with float operands (three-fold tf32).
#include "gated_delta_rule_chunks.cuh"

namespace writesae::cuda::gated_delta_rule {

template void run_prepare<float>(const Problem&, tile::Stream);
template void run_chunks<float>(const Problem&, int, tile::Stream);

}  // namespace writesae::cuda::gated_delta_rule
