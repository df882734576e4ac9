// The arguments that encode and the operators after it share, from tensors to EncodeParams.
#pragma once

#include "edit_list.h"
#include "encode.h"
#include "tensors.h"

namespace writesae {

// A view of [B, T, heads, R, size] by its first four strides; the last axis is made dense.
inline View rows_view(const char* op, const char* name, const Tensor& x, std::vector<Tensor>& keep) {
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
inline EncodeParams encode_arguments(const char* op, const Tensor& decay, const Tensor& left, const Tensor& right,
                                     const Tensor& heads, const Tensor& v_enc, const Tensor& w_enc,
                                     const std::optional<Tensor>& b_enc, const std::optional<Tensor>& carry,
                                     const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& edit_index,
                                     const std::optional<Tensor>& edit_left, const std::optional<Tensor>& edit_right,
                                     std::vector<Tensor>& keep) {
  STD_TORCH_CHECK(left.dim() == 5 && right.dim() == 5, op, ": left and right must be [B, T, heads, R, size]");
  STD_TORCH_CHECK(v_enc.dim() == 4 && w_enc.dim() == 4, op, ": v_enc and w_enc must be [Hs, F, r, size]");
  EncodeParams p = {};
  p.B = right.size(0), p.T = right.size(1), p.H = right.size(2), p.R = right.size(3), p.V = right.size(4);
  p.Hl = left.size(2), p.K = left.size(4), p.N = p.B;
  p.Hs = v_enc.size(0), p.F = v_enc.size(1), p.rank = v_enc.size(2);
  STD_TORCH_CHECK(p.Hl > 0 && p.H % p.Hl == 0, op, ": the left heads (", p.Hl, ") must divide the value heads (", p.H, ")");
  STD_TORCH_CHECK(p.K > 0 && p.V > 0 && p.R > 0 && p.T > 0 && p.F > 0 && p.rank > 0, op, ": sizes must be positive");
  STD_TORCH_CHECK(p.F < (int64_t{1} << 30), op, ": F must be below 2^30");
  check_shape(op, "left", left, {p.B, p.T, p.Hl, p.R, p.K});
  p.channels = decay.dim() == 4;
  if (p.channels) {
    check_shape(op, "decay", decay, {p.B, p.T, p.H, p.K});
  } else {
    check_shape(op, "decay", decay, {p.B, p.T, p.H});
  }
  check_shape(op, "heads", heads, {p.Hs});
  check_shape(op, "v_enc", v_enc, {p.Hs, p.F, p.rank, p.K});
  check_shape(op, "w_enc", w_enc, {p.Hs, p.F, p.rank, p.V});
  p.decay = static_cast<const float*>(data_as(op, "decay", decay, ScalarType::Float, keep));
  p.left = rows_view(op, "left", left, keep);
  p.right = rows_view(op, "right", right, keep);
  p.heads = static_cast<const int64_t*>(data_as(op, "heads", heads, ScalarType::Long, keep));
  for (int64_t i = 0; READABLE && i < p.Hs; i++)
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
    for (int64_t n = 0; READABLE && n < p.N; n++) lengths.push_back(p.cu_seqlens[n + 1] - p.cu_seqlens[n]);
  }
  const auto* before = static_cast<const float*>(data_as(op, "carry", carry, ScalarType::Float, keep));
  if (p.channels) {
    if (carry.has_value()) check_shape(op, "carry", *carry, {p.N, p.Hs, p.K, p.V});
    p.states = before;
  } else {
    if (carry.has_value()) check_shape(op, "carry", *carry, {p.N, p.Hs, p.F});
    p.carry_in = before;
  }
  p.edits = edit_list(op, edit_index, edit_left, edit_right, p.N, lengths, p.H, p.K, p.V, keep);
  for (int64_t e = 0; READABLE && e < p.edits.count; e++)
    STD_TORCH_CHECK(p.edits.kind(e).code == EditKind::ADD, op, ": edit ", e, " is no addition before its token's read");
  return p;
}

// `indices [B, T, Hs, m]`, each checked where an operator may look: CPU kernels read the factors there.
inline void take_indices(const char* op, const Tensor& indices, EncodeParams& p, std::vector<Tensor>& keep) {
  STD_TORCH_CHECK(indices.dim() == 4, op, ": indices must be [B, T, Hs, m]");
  p.m = indices.size(3);
  check_shape(op, "indices", indices, {p.B, p.T, p.Hs, p.m});
  check_dtype(op, "indices", indices, ScalarType::Long);
  p.at = static_cast<const int64_t*>(data_as(op, "indices", indices, ScalarType::Long, keep));
  for (int64_t i = 0; READABLE && i < p.B * p.T * p.Hs * p.m; i++)
    STD_TORCH_CHECK(p.at[i] >= 0 && p.at[i] < p.F, op, ": index ", p.at[i], " is out of range");
}

inline void refuse_channels(const char* op, const EncodeParams& p) {
  STD_TORCH_CHECK(!p.channels, op, ": expected decay [B, T, H], one gate a head, got one a key channel");
}

inline const float* take_floats(const char* op, const char* name, const std::optional<Tensor>& x,
                                std::initializer_list<int64_t> shape, std::vector<Tensor>& keep) {
  if (x.has_value()) check_shape(op, name, *x, shape);
  return static_cast<const float*>(data_as(op, name, x, ScalarType::Float, keep));
}

}  // namespace writesae
