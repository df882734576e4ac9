// encode on tensors: checks, allocation, and the kernel's parameters.
#include "encode.h"

#include <limits>
#include <string>

#include "encode_arguments.h"
#include "operators.h"
#include "sae_training.h"

namespace writesae {
namespace {

Precision precision_of(const char* op, const std::string& name) {
  STD_TORCH_CHECK(name == "fp32" || name == "bf16" || (name == "tf32" && WRITESAE_SIDE != 0), op, ": precision must be ",
                  WRITESAE_SIDE == 0 ? "fp32 or bf16" : "fp32, tf32 or bf16", ", got ", name);
  return name == "fp32" ? Precision::fp32 : name == "tf32" ? Precision::tf32 : Precision::bf16;
}

#if WRITESAE_SIDE != 0

void check_limits(const char* op, const EncodeParams& p) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(p.K <= 256 && p.V <= 256, op, ": the CUDA kernel takes K and V up to 256, got ", p.K, " and ", p.V);
  STD_TORCH_CHECK(p.B * p.T * p.Hs <= most && p.B * p.T * p.R + p.edits.count <= most - 65536, op,
                  ": B * T * Hs and the rows of the writes must be below 2^31");
  STD_TORCH_CHECK(!p.channels || (p.B <= 65535 && p.rank <= 65535), op,
                  ": B and r must be below 65536 under a channel gate");
}

// One launch, with the memory it needs.
void run(const char* op, const EncodeParams& p, Precision precision, cuda::EncodeMode mode,
         const cuda::EncodeFindings& findings) {
  check_limits(op, p);
  const Workspace workspace(cuda::encode_scratch(p, precision, mode));
  cuda::encode(p, precision, mode, findings, workspace.data(), stream());
}

#endif

}  // namespace

std::tuple<Tensor, Tensor, Tensor> encode_topk(Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor v_enc,
                                               Tensor w_enc, std::optional<Tensor> b_enc, int64_t k,
                                               std::optional<Tensor> carry, std::optional<Tensor> cu_seqlens,
                                               std::optional<Tensor> edit_index, std::optional<Tensor> edit_left,
                                               std::optional<Tensor> edit_right, std::string precision) {
  const char* op = "encode_topk";
  const OnDeviceOf device(right);
  std::vector<Tensor> keep;
  EncodeParams p = encode_arguments(op, decay, left, right, heads, v_enc, w_enc, b_enc, carry, cu_seqlens, edit_index,
                                    edit_left, edit_right, keep);
  STD_TORCH_CHECK(k >= 1 && k <= p.F, op, ": k must be from 1 to F");
  Tensor values = empty({p.B, p.T, p.Hs, k}, ScalarType::Float);
  Tensor indices = empty({p.B, p.T, p.Hs, k}, ScalarType::Long);
  Tensor carry_out = empty({p.N, p.Hs, p.F}, ScalarType::Float);
  p.k = k;
  const Precision products = precision_of(op, precision);
  p.bf16 = products == Precision::bf16;
  p.values = floats(values);
  p.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  p.carry_out = floats(carry_out);
#if WRITESAE_SIDE == 0
  cpu::encode(p, nullptr, torch_threads());
#else
  run(op, p, products, cuda::EncodeMode::topk, {});
#endif
  return {values, indices, carry_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> encode_threshold(
    Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor v_enc, Tensor w_enc, std::optional<Tensor> b_enc,
    Tensor threshold, std::optional<Tensor> carry, std::optional<Tensor> cu_seqlens, std::optional<Tensor> edit_index,
    std::optional<Tensor> edit_left, std::optional<Tensor> edit_right, std::string precision) {
  const char* op = "encode_threshold";
  const OnDeviceOf device(right);
  std::vector<Tensor> keep;
  EncodeParams p = encode_arguments(op, decay, left, right, heads, v_enc, w_enc, b_enc, carry, cu_seqlens, edit_index,
                                    edit_left, edit_right, keep);
  const Precision products = precision_of(op, precision);
  p.bf16 = products == Precision::bf16;
  check_shape(op, "threshold", threshold, {p.Hs, p.F});
  p.threshold = static_cast<const float*>(data_as(op, "threshold", threshold, ScalarType::Float, keep));
  Tensor counts = empty({p.B * p.T * p.Hs}, ScalarType::Long);
  Tensor carry_out = empty({p.N, p.Hs, p.F}, ScalarType::Float);
  p.carry_out = floats(carry_out);
#if WRITESAE_SIDE != 0
  // Once to count, once to fill; between them this waits for one number, which says how much memory the findings take.
  cuda::EncodeFindings findings = {};
  findings.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  run(op, p, products, cuda::EncodeMode::count, findings);
  Tensor offsets = empty({p.B * p.T * p.Hs + 1}, ScalarType::Long);
  auto* const offset = static_cast<int64_t*>(offsets.mutable_data_ptr());
  const int64_t total = cuda::encode_offsets(findings.counts, p.B * p.T * p.Hs, offset, stream());
  Tensor values = empty({total}, ScalarType::Float);
  Tensor indices = empty({total}, ScalarType::Long);
  findings.offsets = offset;
  findings.values = floats(values);
  findings.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  run(op, p, products, cuda::EncodeMode::fill, findings);
#else
  EncodeFound found;
  found.values.resize(p.Hs);
  found.indices.resize(p.Hs);
  found.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  cpu::encode(p, &found, torch_threads());
  int64_t total = 0;
  for (const auto& run : found.values) total += run.size();
  Tensor values = empty({total}, ScalarType::Float);
  Tensor indices = empty({total}, ScalarType::Long);
  float* value = floats(values);
  int64_t* index = static_cast<int64_t*>(indices.mutable_data_ptr());
  std::vector<int64_t> at(p.Hs, 0);
  for (int64_t token = 0; token < p.B * p.T; token++)
    for (int64_t h = 0; h < p.Hs; h++) {
      const int64_t count = found.counts[token * p.Hs + h];
      for (int64_t i = at[h]; i < at[h] + count; i++) {
        *value++ = found.values[h][i];
        *index++ = found.indices[h][i];
      }
      at[h] += count;
    }
#endif
  return {values, indices, counts, carry_out};
}

std::tuple<Tensor, Tensor> encode_at(Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor v_enc, Tensor w_enc,
                                     Tensor indices, std::optional<Tensor> carry, std::optional<Tensor> cu_seqlens,
                                     std::optional<Tensor> edit_index, std::optional<Tensor> edit_left,
                                     std::optional<Tensor> edit_right) {
  const char* op = "encode_at";
  const OnDeviceOf device(right);
  std::vector<Tensor> keep;
  EncodeParams p = encode_arguments(op, decay, left, right, heads, v_enc, w_enc, std::nullopt, carry, cu_seqlens, edit_index,
                                    edit_left, edit_right, keep);
  take_indices(op, indices, p, keep);
  Tensor values = empty({p.B, p.T, p.Hs, p.m}, ScalarType::Float);
  Tensor carry_out = empty({p.N, p.Hs, p.F}, ScalarType::Float);
  p.values = floats(values);
  p.carry_out = floats(carry_out);
#if WRITESAE_SIDE == 0
  cpu::encode(p, nullptr, torch_threads());
#else
  run(op, p, Precision::fp32, cuda::EncodeMode::at, {});  // an index out of range gives NaN
#endif
  return {values, carry_out};
}

std::tuple<Tensor, Tensor, Tensor> encode_backward(Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor v_enc,
                                                   Tensor w_enc, Tensor indices, Tensor grad,
                                                   std::optional<Tensor> cu_seqlens, std::optional<Tensor> edit_index,
                                                   std::optional<Tensor> edit_left, std::optional<Tensor> edit_right) {
  const char* op = "encode_backward";
  const OnDeviceOf device(right);
  std::vector<Tensor> keep;
  EncodeParams e = encode_arguments(op, decay, left, right, heads, v_enc, w_enc, std::nullopt, std::nullopt, cu_seqlens,
                                    edit_index, edit_left, edit_right, keep);
  take_indices(op, indices, e, keep);
  const float* d_values = take_floats(op, "grad", grad, {e.B, e.T, e.Hs, e.m}, keep);
  Tensor dv = empty({e.Hs, e.F, e.rank, e.K}, ScalarType::Float);
  Tensor dw = empty({e.Hs, e.F, e.rank, e.V}, ScalarType::Float);
  Tensor d_carry = empty({e.N, e.Hs, e.F}, ScalarType::Float);
  refuse_channels(op, e);
#if WRITESAE_SIDE == 0
  SaeTrainingParams p = {};
  p.rows = e, p.grad = d_values;
  p.encoder = p.gradients = true;
  p.dv_enc = floats(dv), p.dw_enc = floats(dw), p.d_carry = floats(d_carry);
  cpu::sae_training(p, torch_threads());
#else
  STD_TORCH_CHECK(e.edits.count == 0, op, ": the CUDA kernel takes no edits, got ", e.edits.count);
  check_limits(op, e);
  const EncodeBackwardParams p = {e, d_values, floats(dv), floats(dw), floats(d_carry), nullptr, nullptr};
  const Workspace workspace(cuda::encode_backward_scratch(p));
  cuda::encode_backward(p, workspace.data(), stream());
#endif
  return {dv, dw, d_carry};
}

#if WRITESAE_SIDE != 0

std::tuple<Tensor, Tensor> encode_writes_backward(Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor v_enc,
                                                  Tensor w_enc, Tensor indices, Tensor grad,
                                                  std::optional<Tensor> cu_seqlens) {
  const char* op = "encode_writes_backward";
  const OnDeviceOf device(right);
  std::vector<Tensor> keep;
  EncodeParams e = encode_arguments(op, decay, left, right, heads, v_enc, w_enc, std::nullopt, std::nullopt, cu_seqlens,
                                    std::nullopt, std::nullopt, std::nullopt, keep);
  refuse_channels(op, e);
  take_indices(op, indices, e, keep);
  const float* d_values = take_floats(op, "grad", grad, {e.B, e.T, e.Hs, e.m}, keep);
  check_limits(op, e);
  Tensor d_left = empty({e.B, e.T, e.Hs, e.R, e.K}, ScalarType::Float);
  Tensor d_right = empty({e.B, e.T, e.Hs, e.R, e.V}, ScalarType::Float);
  const EncodeBackwardParams p = {e, d_values, nullptr, nullptr, nullptr, floats(d_left), floats(d_right)};
  const Workspace workspace(cuda::encode_backward_scratch(p));
  cuda::encode_backward(p, workspace.data(), stream());
  return {d_left, d_right};
}

#endif

}  // namespace writesae
