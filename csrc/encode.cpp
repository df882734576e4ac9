// encode on tensors: checks, allocation, and the kernel's parameters.
#include "encode.h"

#include "encode_arguments.h"
#include "operators.h"

namespace writesae {

std::tuple<Tensor, Tensor, Tensor> encode_topk(
    Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor v_enc, Tensor w_enc, std::optional<Tensor> b_enc,
    int64_t k, std::optional<Tensor> carry, std::optional<Tensor> cu_seqlens, std::optional<Tensor> edit_index,
    std::optional<Tensor> edit_left, std::optional<Tensor> edit_right, bool bf16) {
  const char* op = "encode_topk";
  std::vector<Tensor> keep;
  EncodeParams p = encode_arguments(op, decay, left, right, heads, v_enc, w_enc, b_enc, carry, cu_seqlens, edit_index,
                                    edit_left, edit_right, keep);
  STD_TORCH_CHECK(k >= 1 && k <= p.F, op, ": k must be from 1 to F");
  Tensor values = empty({p.B, p.T, p.Hs, k}, ScalarType::Float);
  Tensor indices = empty({p.B, p.T, p.Hs, k}, ScalarType::Long);
  Tensor carry_out = empty({p.N, p.Hs, p.F}, ScalarType::Float);
  p.k = k;
  p.bf16 = bf16;
  p.values = floats(values);
  p.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  p.carry_out = floats(carry_out);
  cpu::encode(p, nullptr, torch_threads());
  return {values, indices, carry_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> encode_threshold(
    Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor v_enc, Tensor w_enc, std::optional<Tensor> b_enc,
    Tensor threshold, std::optional<Tensor> carry, std::optional<Tensor> cu_seqlens, std::optional<Tensor> edit_index,
    std::optional<Tensor> edit_left, std::optional<Tensor> edit_right, bool bf16) {
  const char* op = "encode_threshold";
  std::vector<Tensor> keep;
  EncodeParams p = encode_arguments(op, decay, left, right, heads, v_enc, w_enc, b_enc, carry, cu_seqlens, edit_index,
                                    edit_left, edit_right, keep);
  p.bf16 = bf16;
  check_shape(op, "threshold", threshold, {p.Hs, p.F});
  p.threshold = static_cast<const float*>(data_as(op, "threshold", threshold, ScalarType::Float, keep));
  Tensor counts = empty({p.B * p.T * p.Hs}, ScalarType::Long);
  Tensor carry_out = empty({p.N, p.Hs, p.F}, ScalarType::Float);
  p.carry_out = floats(carry_out);
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
  return {values, indices, counts, carry_out};
}

std::tuple<Tensor, Tensor> encode_at(
    Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor v_enc, Tensor w_enc, Tensor indices,
    std::optional<Tensor> carry, std::optional<Tensor> cu_seqlens, std::optional<Tensor> edit_index,
    std::optional<Tensor> edit_left, std::optional<Tensor> edit_right) {
  const char* op = "encode_at";
  std::vector<Tensor> keep;
  EncodeParams p = encode_arguments(op, decay, left, right, heads, v_enc, w_enc, std::nullopt, carry, cu_seqlens,
                                    edit_index, edit_left, edit_right, keep);
  STD_TORCH_CHECK(indices.dim() == 4, op, ": indices must be [B, T, Hs, m]");
  p.m = indices.size(3);
  check_shape(op, "indices", indices, {p.B, p.T, p.Hs, p.m});
  check_dtype(op, "indices", indices, ScalarType::Long);
  p.at = static_cast<const int64_t*>(data_as(op, "indices", indices, ScalarType::Long, keep));
  for (int64_t i = 0; i < p.B * p.T * p.Hs * p.m; i++)
    STD_TORCH_CHECK(p.at[i] >= 0 && p.at[i] < p.F, op, ": index ", p.at[i], " is out of range");
  Tensor values = empty({p.B, p.T, p.Hs, p.m}, ScalarType::Float);
  Tensor carry_out = empty({p.N, p.Hs, p.F}, ScalarType::Float);
  p.values = floats(values);
  p.carry_out = floats(carry_out);
  cpu::encode(p, nullptr, torch_threads());
  return {values, carry_out};
}

}  // namespace writesae
