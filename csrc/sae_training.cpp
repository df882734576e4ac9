// The training step's operators on tensors: checks, allocation, and the kernel's parameters.
#include "sae_training.h"

#include "encode_arguments.h"
#include "operators.h"

namespace writesae {
namespace {

// `indices [B, T, Hs, m]`, each checked: the kernel reads the factors there.
void take_indices(const char* op, const Tensor& indices, EncodeParams& p, std::vector<Tensor>& keep) {
  STD_TORCH_CHECK(indices.dim() == 4, op, ": indices must be [B, T, Hs, m]");
  p.m = indices.size(3);
  check_shape(op, "indices", indices, {p.B, p.T, p.Hs, p.m});
  check_dtype(op, "indices", indices, ScalarType::Long);
  p.at = static_cast<const int64_t*>(data_as(op, "indices", indices, ScalarType::Long, keep));
  for (int64_t i = 0; i < p.B * p.T * p.Hs * p.m; i++)
    STD_TORCH_CHECK(p.at[i] >= 0 && p.at[i] < p.F, op, ": index ", p.at[i], " is out of range");
}

const float* take_floats(const char* op, const char* name, const std::optional<Tensor>& x,
                         std::initializer_list<int64_t> shape, std::vector<Tensor>& keep) {
  if (x.has_value()) check_shape(op, name, *x, shape);
  return static_cast<const float*>(data_as(op, name, x, ScalarType::Float, keep));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> encode_backward(
    Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor v_enc, Tensor w_enc, Tensor indices, Tensor grad,
    std::optional<Tensor> cu_seqlens, std::optional<Tensor> edit_index, std::optional<Tensor> edit_left,
    std::optional<Tensor> edit_right) {
  const char* op = "encode_backward";
  std::vector<Tensor> keep;
  SaeTrainingParams p = {};
  p.rows = encode_arguments(op, decay, left, right, heads, v_enc, w_enc, std::nullopt, std::nullopt, cu_seqlens,
                            edit_index, edit_left, edit_right, keep);
  EncodeParams& e = p.rows;
  take_indices(op, indices, e, keep);
  p.grad = take_floats(op, "grad", grad, {e.B, e.T, e.Hs, e.m}, keep);
  p.encoder = p.gradients = true;
  Tensor dv = empty({e.Hs, e.F, e.rank, e.K}, ScalarType::Float);
  Tensor dw = empty({e.Hs, e.F, e.rank, e.V}, ScalarType::Float);
  Tensor d_carry = empty({e.N, e.Hs, e.F}, ScalarType::Float);
  p.dv_enc = floats(dv), p.dw_enc = floats(dw), p.d_carry = floats(d_carry);
  cpu::sae_training(p, torch_threads());
  return {dv, dw, d_carry};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> factored_loss(
    Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor values, Tensor indices, Tensor v_dec, Tensor w_dec,
    std::optional<Tensor> offset, std::optional<Tensor> on_offset, std::optional<Tensor> weight,
    std::optional<Tensor> initial_state, std::optional<Tensor> cu_seqlens, std::optional<Tensor> v_enc,
    std::optional<Tensor> w_enc, bool gradients) {
  const char* op = "factored_loss";
  std::vector<Tensor> keep;
  SaeTrainingParams p = {};
  p.rows = encode_arguments(op, decay, left, right, heads, v_dec, w_dec, std::nullopt, std::nullopt, cu_seqlens,
                            std::nullopt, std::nullopt, std::nullopt, keep);
  EncodeParams& e = p.rows;
  take_indices(op, indices, e, keep);
  STD_TORCH_CHECK(v_enc.has_value() == w_enc.has_value(), op, ": v_enc and w_enc go together");
  STD_TORCH_CHECK(gradients || !v_enc.has_value(), op, ": v_enc and w_enc are for gradients");
  p.decoder = true, p.gradients = gradients, p.encoder = v_enc.has_value();
  p.v_dec = e.v_enc, p.w_dec = e.w_enc;
  if (p.encoder) {
    check_shape(op, "v_enc", *v_enc, {e.Hs, e.F, e.rank, e.K});
    check_shape(op, "w_enc", *w_enc, {e.Hs, e.F, e.rank, e.V});
    e.v_enc = view(op, "v_enc", *v_enc, true, keep), e.w_enc = view(op, "w_enc", *w_enc, true, keep);
  }
  p.values = take_floats(op, "values", values, {e.B, e.T, e.Hs, e.m}, keep);
  p.offset = take_floats(op, "offset", offset, {e.Hs, e.K, e.V}, keep);
  p.on_offset = take_floats(op, "on_offset", on_offset, {e.Hs, e.F}, keep);
  p.weight = take_floats(op, "weight", weight, {e.B, e.T, e.Hs}, keep);
  p.initial = take_floats(op, "initial_state", initial_state, {e.N, e.H, e.K, e.V}, keep);
  STD_TORCH_CHECK(offset.has_value() == on_offset.has_value(), op, ": offset and on_offset go together");
  // A result that was not asked for is empty.
  const auto result = [](bool wanted, std::initializer_list<int64_t> shape, float*& to) {
    Tensor x = wanted ? empty(shape, ScalarType::Float) : empty({0}, ScalarType::Float);
    to = wanted ? floats(x) : nullptr;
    return x;
  };
  Tensor error = result(true, {e.B, e.T, e.Hs}, p.error);
  Tensor d_values = result(gradients && !p.encoder, {e.B, e.T, e.Hs, e.m}, p.d_values);
  Tensor dv_dec = result(gradients, {e.Hs, e.F, e.rank, e.K}, p.dv_dec);
  Tensor dw_dec = result(gradients, {e.Hs, e.F, e.rank, e.V}, p.dw_dec);
  Tensor usage = result(gradients, {e.Hs, e.F}, p.usage);
  Tensor state_sum = result(gradients, {e.Hs, e.K, e.V}, p.state_sum);
  Tensor dv_enc = result(p.encoder, {e.Hs, e.F, e.rank, e.K}, p.dv_enc);
  Tensor dw_enc = result(p.encoder, {e.Hs, e.F, e.rank, e.V}, p.dw_enc);
  Tensor db_enc = result(p.encoder, {e.Hs, e.F}, p.db_enc);
  cpu::sae_training(p, torch_threads());
  return {error, d_values, dv_dec, dw_dec, usage, state_sum, dv_enc, dw_enc, db_enc};
}

}  // namespace writesae
