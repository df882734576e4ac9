// The training step's operators on tensors: checks, allocation, and the kernel's parameters.
#include "sae_training.h"

#include "encode_arguments.h"
#include "operators.h"

namespace writesae {

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
  refuse_channels(op, e);
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
