// The operators of a scan on tensors: checks, allocation, and the kernels' parameters; and their schemas. `Rule` is a write
// rule as its header (csrc/<rule>.h) names it for this: NAME, CHANNEL_GATE, LOW_RANK, and its kernels. With LOW_RANK its
// operators also take a and b, and return what the erase reads and the gradients; all of it comes last.
#pragma once

#include <string>
#include <tuple>

#include "scan_inputs.h"

namespace writesae {

template <class Rule>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_operator(
    Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, double scale, std::optional<Tensor> initial_state,
    bool use_qk_l2norm, std::optional<Tensor> cu_seqlens, std::optional<Tensor> edit_index, std::optional<Tensor> edit_left,
    std::optional<Tensor> edit_right, std::optional<Tensor> snapshots, bool return_writes, std::optional<Tensor> a,
    std::optional<Tensor> b) {
  const char* op = Rule::NAME;
  const OnDeviceOf device(v);
  std::vector<Tensor> keep;
  ScanParams p = scan_inputs(op, Rule::CHANNEL_GATE, q, k, v, g, beta, scale, initial_state, use_qk_l2norm, cu_seqlens,
                             edit_index, edit_left, edit_right, snapshots, keep);
  const int64_t B = p.B, T = p.T, Hk = p.Hk, H = p.H, K = p.K, V = p.V;
  scan_erase(op, {B, T, H, K}, a, b, p, keep);
  Tensor o = empty({B, T, H, V}, v.scalar_type());
  Tensor final_state = empty({p.N, H, K, V}, ScalarType::Float);
  Tensor left = return_writes ? empty({B, T, Hk, K}, ScalarType::Float) : empty({0}, ScalarType::Float);
  Tensor right = return_writes ? empty({B, T, H, V}, ScalarType::Float) : empty({0}, ScalarType::Float);
  const bool erased_too = return_writes && a.has_value();
  Tensor erased = erased_too ? empty({B, T, H, V}, ScalarType::Float) : empty({0}, ScalarType::Float);
  Tensor shots = empty({p.P, H, K, V}, ScalarType::Float);
  Tensor first_nonfinite = empty({return_writes ? B : 0}, ScalarType::Long);
  p.o = o.mutable_data_ptr();
  p.o_type = p.v.type;
  p.final_state = floats(final_state);
  p.left = return_writes ? floats(left) : nullptr;
  p.right = return_writes ? floats(right) : nullptr;
  p.erased = erased_too ? floats(erased) : nullptr;
  p.snapshots = floats(shots);
  p.first_nonfinite = return_writes ? integers(first_nonfinite) : nullptr;
#if WRITESAE_SIDE == 0
  Rule::forward(p, torch_threads());
#else
  const Workspace workspace(Rule::forward_workspace(p, {}));
  Rule::forward(p, workspace.data(), stream(), {});
#endif
  return {o, final_state, left, right, shots, first_nonfinite, erased};
}

template <class Rule>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_operator(
    Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, double scale, std::optional<Tensor> initial_state,
    bool use_qk_l2norm, std::optional<Tensor> cu_seqlens, std::optional<Tensor> edit_index, std::optional<Tensor> edit_left,
    std::optional<Tensor> edit_right, std::optional<Tensor> snapshots, bool return_writes) {
  auto [o, final_state, left, right, shots, first_nonfinite, erased] =
      low_rank_operator<Rule>(q, k, v, g, beta, scale, initial_state, use_qk_l2norm, cu_seqlens, edit_index, edit_left,
                              edit_right, snapshots, return_writes, {}, {});
  return {o, final_state, left, right, shots, first_nonfinite};
}

template <class Rule>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_backward_operator(
    Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, double scale, std::optional<Tensor> initial_state,
    bool use_qk_l2norm, std::optional<Tensor> cu_seqlens, std::optional<Tensor> edit_index, std::optional<Tensor> edit_left,
    std::optional<Tensor> edit_right, std::optional<Tensor> snapshots, Tensor right, std::optional<Tensor> d_o,
    std::optional<Tensor> d_final_state, std::optional<Tensor> d_left, std::optional<Tensor> d_right,
    std::optional<Tensor> d_snapshots, std::optional<Tensor> a, std::optional<Tensor> b, std::optional<Tensor> erased,
    std::optional<Tensor> d_erased) {
  const std::string name = std::string(Rule::NAME) + "_backward";
  const char* op = name.c_str();
  const OnDeviceOf device(v);
  std::vector<Tensor> keep;
  ScanBackwardParams p = {};
  p.in = scan_inputs(op, Rule::CHANNEL_GATE, q, k, v, g, beta, scale, initial_state, use_qk_l2norm, cu_seqlens, edit_index,
                     edit_left, edit_right, snapshots, keep);
  const int64_t B = p.in.B, T = p.in.T, Hk = p.in.Hk, H = p.in.H, K = p.in.K, V = p.in.V, E = p.in.edits.count;
  scan_erase(op, {B, T, H, K}, a, b, p.in, keep);
  STD_TORCH_CHECK(a.has_value() == erased.has_value(), op, ": erased comes with a and b");
  const auto rows = [&](const char* name, const Tensor& x) {
    check_shape(op, name, x, {B, T, H, V});
    return view(op, name, x, true, keep);
  };
  const auto dense = [&](const char* name, const std::optional<Tensor>& x, std::initializer_list<int64_t> shape) {
    if (x.has_value()) check_shape(op, name, *x, shape);
    return static_cast<const float*>(data_as(op, name, x, ScalarType::Float, keep));
  };
  p.right = rows("right", right);
  if (d_o.has_value()) p.d_o = rows("d_o", *d_o);
  if (d_right.has_value()) p.d_right = rows("d_right", *d_right);
  if (erased.has_value()) p.erased = rows("erased", *erased);
  if (a.has_value() && d_erased.has_value()) p.d_erased = rows("d_erased", *d_erased);
  p.d_left = dense("d_left", d_left, {B, T, Hk, K});
  p.d_final_state = dense("d_final_state", d_final_state, {p.in.N, H, K, V});
  p.d_snapshots = dense("d_snapshots", d_snapshots, {p.in.P, H, K, V});
  Tensor d_q = empty({B, T, Hk, K}, q.scalar_type()), d_k = empty({B, T, Hk, K}, k.scalar_type());
  Tensor d_v = empty({B, T, H, V}, v.scalar_type());
  Tensor d_g = p.in.channel_gate ? empty({B, T, H, K}, g.scalar_type()) : empty({B, T, H}, g.scalar_type()),
         d_beta = empty({B, T, H}, beta.scalar_type());
  Tensor d_a = a.has_value() ? empty({B, T, H, K}, a->scalar_type()) : empty({0}, ScalarType::Float);
  Tensor d_b = b.has_value() ? empty({B, T, H, K}, b->scalar_type()) : empty({0}, ScalarType::Float);
  Tensor d_initial_state = empty({p.in.N, H, K, V}, ScalarType::Float);
  Tensor d_edit_left = empty({E, K}, ScalarType::Float), d_edit_right = empty({E, V}, ScalarType::Float);
  p.d_q = d_q.mutable_data_ptr(), p.d_k = d_k.mutable_data_ptr(), p.d_v = d_v.mutable_data_ptr();
  p.d_g = d_g.mutable_data_ptr(), p.d_beta = d_beta.mutable_data_ptr();
  if (a.has_value()) p.d_a = d_a.mutable_data_ptr(), p.d_b = d_b.mutable_data_ptr();
  p.d_initial_state = floats(d_initial_state);
  p.d_edit_left = floats(d_edit_left), p.d_edit_right = floats(d_edit_right);
#if WRITESAE_SIDE == 0
  Rule::backward(p, torch_threads());
#else
  const Workspace workspace(Rule::backward_workspace(p));
  Rule::backward(p, workspace.data(), stream());
#endif
  return {d_q, d_k, d_v, d_g, d_beta, d_initial_state, d_edit_left, d_edit_right, d_a, d_b};
}

template <class Rule>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward_operator(
    Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, double scale, std::optional<Tensor> initial_state,
    bool use_qk_l2norm, std::optional<Tensor> cu_seqlens, std::optional<Tensor> edit_index, std::optional<Tensor> edit_left,
    std::optional<Tensor> edit_right, std::optional<Tensor> snapshots, Tensor right, std::optional<Tensor> d_o,
    std::optional<Tensor> d_final_state, std::optional<Tensor> d_left, std::optional<Tensor> d_right,
    std::optional<Tensor> d_snapshots) {
  auto [d_q, d_k, d_v, d_g, d_beta, d_initial_state, d_edit_left, d_edit_right, d_a, d_b] = low_rank_backward_operator<Rule>(
      q, k, v, g, beta, scale, initial_state, use_qk_l2norm, cu_seqlens, edit_index, edit_left, edit_right, snapshots, right,
      d_o, d_final_state, d_left, d_right, d_snapshots, {}, {}, {}, {});
  return {d_q, d_k, d_v, d_g, d_beta, d_initial_state, d_edit_left, d_edit_right};
}

template <class Rule>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_step_operator(
    Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor state, double scale, bool use_qk_l2norm,
    std::optional<Tensor> edit_index, std::optional<Tensor> edit_left, std::optional<Tensor> edit_right, bool return_writes,
    std::optional<Tensor> a, std::optional<Tensor> b) {
  const std::string name = std::string(Rule::NAME) + "_step";
  const char* op = name.c_str();
  const OnDeviceOf device(v);
  STD_TORCH_CHECK(v.dim() == 3 && k.dim() == 3, op, ": k and v must be [B, heads, size]");
  std::vector<Tensor> keep;
  auto p = scan_common<ScanStepParams>(op, Rule::CHANNEL_GATE, q, k, v, g, beta, scale, use_qk_l2norm, keep);
  const int64_t B = p.B, Hk = p.Hk, H = p.H, K = p.K, V = p.V;
  check_shape(op, "k", k, {B, Hk, K});
  check_shape(op, "q", q, {B, Hk, K});
  if (p.channel_gate) {
    check_shape(op, "g", g, {B, H, K});
  } else {
    check_shape(op, "g", g, {B, H});
  }
  check_shape(op, "beta", beta, {B, H});
  check_shape(op, "state", state, {B, H, K, V});
  check_side(op, "state", state);
  check_dtype(op, "state", state, ScalarType::Float);
  check_contiguous(op, "state", state);
  p.state = floats(state);
  scan_erase(op, {B, H, K}, a, b, p, keep);
  p.edits = edit_list(op, edit_index, edit_left, edit_right, B, {}, H, K, V, keep);
  Tensor o = empty({B, H, V}, v.scalar_type());
  Tensor left = return_writes ? empty({B, Hk, K}, ScalarType::Float) : empty({0}, ScalarType::Float);
  Tensor right = return_writes ? empty({B, H, V}, ScalarType::Float) : empty({0}, ScalarType::Float);
  const bool erased_too = return_writes && a.has_value();
  Tensor erased = erased_too ? empty({B, H, V}, ScalarType::Float) : empty({0}, ScalarType::Float);
  Tensor first_nonfinite = empty({return_writes ? B : 0}, ScalarType::Long);
  p.o = o.mutable_data_ptr();
  p.o_type = p.v.type;
  p.left = return_writes ? floats(left) : nullptr;
  p.right = return_writes ? floats(right) : nullptr;
  p.erased = erased_too ? floats(erased) : nullptr;
  p.first_nonfinite = return_writes ? integers(first_nonfinite) : nullptr;
#if WRITESAE_SIDE == 0
  Rule::step(p, torch_threads());
#else
  Rule::step(p, stream());
#endif
  return {o, left, right, first_nonfinite, erased};
}

template <class Rule>
std::tuple<Tensor, Tensor, Tensor, Tensor> scan_step_operator(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta,
                                                              Tensor state, double scale, bool use_qk_l2norm,
                                                              std::optional<Tensor> edit_index,
                                                              std::optional<Tensor> edit_left,
                                                              std::optional<Tensor> edit_right, bool return_writes) {
  auto [o, left, right, first_nonfinite, erased] = low_rank_step_operator<Rule>(
      q, k, v, g, beta, state, scale, use_qk_l2norm, edit_index, edit_left, edit_right, return_writes, {}, {});
  return {o, left, right, first_nonfinite};
}

// The schemas of a rule's three operators.
template <class Rule, class Module>
void define_scan(Module& m) {
  const std::string rule = Rule::NAME;
  const auto low_rank = [](const char* more) { return Rule::LOW_RANK ? std::string(more) : std::string(); };
  const std::string erase = low_rank(", Tensor? a, Tensor? b"), erased = low_rank(", Tensor erased");
  const std::string inputs = "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, ";
  const std::string edits = "Tensor? edit_index, Tensor? edit_left, Tensor? edit_right, ";
  const std::string rest = "float scale, Tensor? initial_state, bool use_qk_l2norm, Tensor? cu_seqlens, " + edits;
  m.def((rule + inputs + rest + "Tensor? snapshots, bool return_writes" + erase +
         ") -> (Tensor o, Tensor final_state, Tensor left, Tensor right, Tensor snapshots, "
         "Tensor first_nonfinite" +
         erased + ")")
            .c_str());
  m.def((rule + "_backward" + inputs + rest +
         "Tensor? snapshots, Tensor right, Tensor? d_o, Tensor? d_final_state, Tensor? d_left, Tensor? d_right, "
         "Tensor? d_snapshots" +
         erase + low_rank(", Tensor? erased, Tensor? d_erased") +
         ") -> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_g, Tensor d_beta, Tensor d_initial_state, "
         "Tensor d_edit_left, Tensor d_edit_right" +
         low_rank(", Tensor d_a, Tensor d_b") + ")")
            .c_str());
  m.def((rule + "_step" + inputs + "Tensor(a!) state, float scale, bool use_qk_l2norm, " + edits + "bool return_writes" +
         erase + ") -> (Tensor o, Tensor left, Tensor right, Tensor first_nonfinite" + erased + ")")
            .c_str());
}

template <class Rule, class Module>
void implement_scan(Module& m) {
  const std::string name = Rule::NAME;
  if constexpr (Rule::LOW_RANK) {
    m.impl(name.c_str(), TORCH_BOX(&low_rank_operator<Rule>));
    m.impl((name + "_backward").c_str(), TORCH_BOX(&low_rank_backward_operator<Rule>));
    m.impl((name + "_step").c_str(), TORCH_BOX(&low_rank_step_operator<Rule>));
  } else {
    m.impl(name.c_str(), TORCH_BOX(&scan_operator<Rule>));
    m.impl((name + "_backward").c_str(), TORCH_BOX(&scan_backward_operator<Rule>));
    m.impl((name + "_step").c_str(), TORCH_BOX(&scan_step_operator<Rule>));
  }
}

}  // namespace writesae
