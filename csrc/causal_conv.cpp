// causal_conv on tensors: checks, allocation, and the kernel's parameters.
#include "causal_conv.h"

#include "operators.h"
#include "tensors.h"

namespace writesae {

Tensor causal_conv(Tensor x, Tensor weight, std::optional<Tensor> bias, bool silu, std::optional<Tensor> cu_seqlens) {
  const char* op = "causal_conv";
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2, op, ": x must be [B, T, D] and weight [D, W]");
  std::vector<Tensor> keep;
  CausalConvParams p = {};
  p.B = x.size(0), p.T = x.size(1), p.D = x.size(2), p.W = weight.size(1), p.N = p.B;
  STD_TORCH_CHECK(p.D > 0 && p.W > 0, op, ": D and W must be positive");
  check_shape(op, "weight", weight, {p.D, p.W});
  if (bias.has_value()) check_shape(op, "bias", *bias, {p.D});
  p.x = view(op, "x", x, true, keep);
  p.weight = view(op, "weight", weight, true, keep);
  p.bias = static_cast<const float*>(data_as(op, "bias", bias, ScalarType::Float, keep));
  if (cu_seqlens.has_value()) {
    p.N = cu_seqlens->size(0) - 1;
    p.cu_seqlens = sequence_offsets(op, *cu_seqlens, p.B, p.T, keep);
  }
  p.silu = silu;
  Tensor y = empty({p.B, p.T, p.D}, x.scalar_type());
  p.y = y.mutable_data_ptr();
  cpu::causal_conv(p, torch_threads());
  return y;
}

}  // namespace writesae
