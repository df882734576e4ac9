// gated_delta_rule on CUDA. Its scan is that of scan.cuh, with
//     solve = (I + A)^-1 diag(beta),    A_ji = beta_j D_ji (r_j k_j) . (r_i k_i)  for i < j
// and r_j = 1 / |k_j| (1 without normalisation), which `prepare` makes. A deleted or replaced native write is beta_j = 0:
// nothing erased, nothing written; one removed after the read is a column of A and of reach that ends on the diagonal, and no
// part of S.
#pragma once

#include "../gated_delta_rule.h"
#include "scan.cuh"

namespace writesae::cuda::gated_delta_rule {

// Host: prepare and walk in one type of computation (gated_delta_rule_<type>.cu).
template <class T>
void run_prepare(const Problem& p, tile::Stream stream);
template <class T>
void run_chunks(const Problem& p, int warps, tile::Stream stream);

}  // namespace writesae::cuda::gated_delta_rule
