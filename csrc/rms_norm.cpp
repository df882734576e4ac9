// rms_norm on tensors: checks, allocation, and the kernel's parameters.
#include "rms_norm.h"

#include "operators.h"
#include "tensors.h"

namespace writesae {

Tensor rms_norm(Tensor x, Tensor weight, std::optional<Tensor> gate, double eps, bool zero_centred, bool round_once) {
  const char* op = "rms_norm";
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0, op, ": x must be [N, D]");
  std::vector<Tensor> keep;
  RmsNormParams p = {};
  p.N = x.size(0), p.D = x.size(1);
  check_shape(op, "weight", weight, {p.D});
  p.x = view(op, "x", x, true, keep);
  p.weight = static_cast<const float*>(data_as(op, "weight", weight, ScalarType::Float, keep));
  if (gate.has_value()) {
    check_shape(op, "gate", *gate, {p.N, p.D});
    p.gate = view(op, "gate", *gate, true, keep);
  }
  p.eps = static_cast<float>(eps), p.zero_centred = zero_centred, p.round_once = round_once;
  Tensor y = empty({p.N, p.D}, x.scalar_type());
  p.y = y.mutable_data_ptr();
  cpu::rms_norm(p, torch_threads());
  return y;
}

}  // namespace writesae
