// The backward of gated_delta_rule on CUDA. Letters as in scan.cuh; S0 the state before a chunk,
// D the adjoint of the state after it, N = (I + A)^-1, U the increments (from the forward), B = diag(beta).
//     R  = dR + e^{G_C - G} K D + reach^T dO          adjoint of the increments, from everything after them
//     dY = N^T R,   dV = B dY                         of beta (V - what was read)
//     D <- e^{G_C} D + Q^T (e^G dO) - K^T (e^G B dY)
//     dQ = e^G dO S0^T + (e o D_ji) K,                                            e = tril(dO U^T)
//     dK = e^{G_C - G} U D^T - e^G B dY S0^T + (e o D_ji)^T Q - (F + F^T) K,      F = B (f o D_ji),  f = tril(dY U^T, -1)
//     dbeta_j = dY_j . (V_j - e^{G_j} k_j S0 - sum_i D_ji k_j.k_i U_i)            nothing is divided by beta
//     dg_l = all that decays through token l, a sum of such terms only, so that a strong gate keeps its own precision
// (K and Q normalised and scaled as the forward uses them.)
//
// After scan_backward.cuh's walks `gradients` does the rest, all chunks at once and the value heads of a group in their order;
// `finish` goes back through normalisation and scale.
#pragma once

#include "gated_delta_rule.cuh"
#include "scan_backward.cuh"

namespace writesae::cuda::gated_delta_rule {

// Host: the chunks' kernels in one type of computation (gated_delta_rule_backward_<type>.cu).
template <class T>
void run_backward(const Backward& b, tile::Stream stream);

}  // namespace writesae::cuda::gated_delta_rule
