// encode on tensors: checks, allocation, and the kernel's parameters.
#include "encode.h"

#include "edit_list.h"
#include "operators.h"
#include "tensors.h"

namespace writesae {
namespace {

// A view of [B, T, heads, R, size] by its first four strides; the last axis is made dense.
View rows_view(const char* op, const char* name, const Tensor& x, std::vector<Tensor>& keep) {
  check_side(op, name, x);
  Tensor held = x;
  if (x.size(4) > 1 && x.stride(4) != 1) {
    held = torch::stable::contiguous(x);
    keep.push_back(held);
  }
  View out;
  out.data = held.const_data_ptr();
  out.type = element_of(op, name, held);
  for (int64_t axis = 0; axis < 4; axis++) out.stride[axis] = held.stride(axis);
  return out;
}

// The arguments every form of the operator shares. Shapes are checked again here, though the Python wrapper says more: a
// torch.ops call must not read out of bounds.
EncodeParams common(const char* op, const Tensor& decay, const Tensor& left, const Tensor& right, const Tensor& heads,
                    const Tensor& v_enc, const Tensor& w_enc, const std::optional<Tensor>& b_enc,
                    const std::optional<Tensor>& carry, const std::optional<Tensor>& cu_seqlens,
                    const std::optional<Tensor>& edit_index, const std::optional<Tensor>& edit_left,
                    const std::optional<Tensor>& edit_right, std::vector<Tensor>& keep) {
  STD_TORCH_CHECK(left.dim() == 5 && right.dim() == 5, op, ": left and right must be [B, T, heads, R, size]");
  STD_TORCH_CHECK(v_enc.dim() == 4 && w_enc.dim() == 4, op, ": v_enc and w_enc must be [Hs, F, r, size]");
  EncodeParams p = {};
  p.B = right.size(0), p.T = right.size(1), p.H = right.size(2), p.R = right.size(3), p.V = right.size(4);
  p.Hl = left.size(2), p.K = left.size(4), p.N = p.B;
  p.Hs = v_enc.size(0), p.F = v_enc.size(1), p.rank = v_enc.size(2);
  STD_TORCH_CHECK(p.Hl > 0 && p.H % p.Hl == 0, op, ": the left heads (", p.Hl, ") must divide the value heads (", p.H,
                  ")");
  STD_TORCH_CHECK(p.K > 0 && p.V > 0 && p.R > 0 && p.T > 0 && p.F > 0 && p.rank > 0, op, ": sizes must be positive");
  STD_TORCH_CHECK(p.F < (int64_t{1} << 30), op, ": F must be below 2^30");
  check_shape(op, "left", left, {p.B, p.T, p.Hl, p.R, p.K});
  check_shape(op, "decay", decay, {p.B, p.T, p.H});
  check_shape(op, "heads", heads, {p.Hs});
  check_shape(op, "v_enc", v_enc, {p.Hs, p.F, p.rank, p.K});
  check_shape(op, "w_enc", w_enc, {p.Hs, p.F, p.rank, p.V});
  p.decay = static_cast<const float*>(data_as(op, "decay", decay, ScalarType::Float, keep));
  p.left = rows_view(op, "left", left, keep);
  p.right = rows_view(op, "right", right, keep);
  p.heads = static_cast<const int64_t*>(data_as(op, "heads", heads, ScalarType::Long, keep));
  for (int64_t i = 0; i < p.Hs; i++)
    STD_TORCH_CHECK(p.heads[i] >= 0 && p.heads[i] < p.H, op, ": head ", p.heads[i], " is out of range");
  p.v_enc = view(op, "v_enc", v_enc, true, keep);
  p.w_enc = view(op, "w_enc", w_enc, true, keep);
  if (b_enc.has_value()) check_shape(op, "b_enc", *b_enc, {p.Hs, p.F});
  p.b_enc = static_cast<const float*>(data_as(op, "b_enc", b_enc, ScalarType::Float, keep));
  std::vector<int64_t> lengths(p.B, p.T);
  if (cu_seqlens.has_value()) {
    p.cu_seqlens = sequence_offsets(op, *cu_seqlens, p.B, p.T, keep);
    p.N = cu_seqlens->size(0) - 1;
    lengths.clear();
    for (int64_t n = 0; n < p.N; n++) lengths.push_back(p.cu_seqlens[n + 1] - p.cu_seqlens[n]);
  }
  if (carry.has_value()) check_shape(op, "carry", *carry, {p.N, p.Hs, p.F});
  p.carry_in = static_cast<const float*>(data_as(op, "carry", carry, ScalarType::Float, keep));
  p.edits = edit_list(op, edit_index, edit_left, edit_right, p.N, lengths, p.H, p.K, p.V, keep);
  return p;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> encode_topk(
    Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor v_enc, Tensor w_enc, std::optional<Tensor> b_enc,
    int64_t k, std::optional<Tensor> carry, std::optional<Tensor> cu_seqlens, std::optional<Tensor> edit_index,
    std::optional<Tensor> edit_left, std::optional<Tensor> edit_right, bool bf16) {
  const char* op = "encode_topk";
  std::vector<Tensor> keep;
  EncodeParams p = common(op, decay, left, right, heads, v_enc, w_enc, b_enc, carry, cu_seqlens, edit_index, edit_left,
                          edit_right, keep);
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
  EncodeParams p = common(op, decay, left, right, heads, v_enc, w_enc, b_enc, carry, cu_seqlens, edit_index, edit_left,
                          edit_right, keep);
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
  EncodeParams p = common(op, decay, left, right, heads, v_enc, w_enc, std::nullopt, carry, cu_seqlens, edit_index,
                          edit_left, edit_right, keep);
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
