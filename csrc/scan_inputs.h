// The inputs of a scan, from tensors, checked; its backward takes the same.
#pragma once

#include "scan.h"
#include "scan_sequences.h"
#include "tensors.h"

namespace writesae {

// What the scan and the step take alike. The caller has checked the axes of k and v, and checks all sizes after.
template <class Params>
Params scan_common(const char* op, bool channel_gates, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                   const Tensor& beta, double scale, bool use_qk_l2norm, std::vector<Tensor>& keep) {
  Params p = {};
  const int64_t heads = v.dim() - 2;
  p.B = v.size(0), p.Hk = k.size(heads), p.H = v.size(heads), p.K = k.size(heads + 1), p.V = v.size(heads + 1);
  check_heads(op, p.Hk, p.H, p.K, p.V);
  p.channel_gate = g.dim() == v.dim();
  STD_TORCH_CHECK(q.dim() == v.dim() && (p.channel_gate || g.dim() == v.dim() - 1) && beta.dim() == v.dim() - 1, op,
                  ": q must have the axes of v, beta one less, and g either");
  STD_TORCH_CHECK(channel_gates || !p.channel_gate, op, ": g has a channel axis, which this kernel does not take");
  p.q = view(op, "q", q, true, keep);
  p.k = view(op, "k", k, true, keep);
  p.v = view(op, "v", v, true, keep);
  p.g = view(op, "g", g, p.channel_gate, keep);
  p.beta = view(op, "beta", beta, false, keep);
  p.scale = static_cast<float>(scale);
  p.use_qk_l2norm = use_qk_l2norm;
  return p;
}

// a and b of a low-rank erase, both of the shape that keys have with a head a value head, or neither.
template <class Params>
void scan_erase(const char* op, std::initializer_list<int64_t> shape, const std::optional<Tensor>& a,
                const std::optional<Tensor>& b, Params& p, std::vector<Tensor>& keep) {
  STD_TORCH_CHECK(a.has_value() == b.has_value(), op, ": a and b come together or not at all");
  if (!a.has_value()) return;
  STD_TORCH_CHECK(p.channel_gate, op, ": with a and b, g must have a channel axis");
  check_shape(op, "a", *a, shape);
  check_shape(op, "b", *b, shape);
  p.a = view(op, "a", *a, true, keep);
  p.b = view(op, "b", *b, true, keep);
}

// Everything but the outputs. Shapes are checked again here, though the Python wrapper says more.
inline ScanParams scan_inputs(const char* op, bool channel_gates, const Tensor& q, const Tensor& k, const Tensor& v,
                              const Tensor& g, const Tensor& beta, double scale, const std::optional<Tensor>& initial_state,
                              bool use_qk_l2norm, const std::optional<Tensor>& cu_seqlens,
                              const std::optional<Tensor>& edit_index, const std::optional<Tensor>& edit_left,
                              const std::optional<Tensor>& edit_right, const std::optional<Tensor>& snapshots,
                              std::vector<Tensor>& keep) {
  STD_TORCH_CHECK(v.dim() == 4 && k.dim() == 4, op, ": k and v must be [B, T, heads, size]");
  auto p = scan_common<ScanParams>(op, channel_gates, q, k, v, g, beta, scale, use_qk_l2norm, keep);
  const int64_t B = p.B, T = v.size(1), Hk = p.Hk, H = p.H, K = p.K, V = p.V;
  p.T = T, p.N = B;
  check_shape(op, "k", k, {B, T, Hk, K});
  check_shape(op, "q", q, {B, T, Hk, K});
  if (p.channel_gate) {
    check_shape(op, "g", g, {B, T, H, K});
  } else {
    check_shape(op, "g", g, {B, T, H});
  }
  check_shape(op, "beta", beta, {B, T, H});
  scan_sequences(op, H, initial_state, cu_seqlens, edit_index, edit_left, edit_right, snapshots, p, keep);
  return p;
}

}  // namespace writesae
