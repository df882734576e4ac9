// causal_conv: y_t = act(bias + sum_s w_s x_{t-W+1+s}), a short depthwise convolution along time and its activation, as
// gated-delta layers make q, k and v. Letters: B row, T position, D channel, W width, N sequences.
#pragma once

#include "element.h"
#include "parallel.h"

namespace writesae {

struct CausalConvParams {
  int64_t B, T, D, W, N;
  View x;                     // [B, T, D]  last stride 1
  View weight;                // [D, W]     last stride 1
  const float* bias;          // [D] or null (zero)
  const int64_t* cu_seqlens;  // [N + 1] or null; then B = 1
  bool silu;                  // else no activation
  void* y;                    // [B, T, D] of x's type
};

namespace cpu {

void causal_conv(const CausalConvParams& p, const Parallel& parallel);

}  // namespace cpu
}  // namespace writesae
