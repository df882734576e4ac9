// rms_norm: y = x / sqrt(mean(x^2) + eps) times a weight, and times silu(gate) where there is one, as a model's layers
// take it before their projections and after the recurrence. Letters: N row, D size of a row.
#pragma once

#include "element.h"
#include "parallel.h"

namespace writesae {

struct RmsNormParams {
  int64_t N, D;
  View x;               // [N, D]  last stride 1
  View gate;            // [N, D]  last stride 1; data null for none
  const float* weight;  // [D]
  float eps;
  bool zero_centred;  // times 1 + weight
  bool round_once;    // in half precision at the end only; else before the weight and before the gate too
  void* y;            // [N, D] of x's type
};

namespace cpu {

void rms_norm(const RmsNormParams& p, const Parallel& parallel);

}  // namespace cpu
}  // namespace writesae
