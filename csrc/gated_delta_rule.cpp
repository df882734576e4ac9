// gated_delta_rule on tensors: checks, allocation, and the kernel's parameters.
#include "gated_delta_rule.h"

#include "edit_list.h"
#include "operators.h"
#include "tensors.h"

namespace writesae {
namespace {

void check_heads(const char* op, int64_t Hk, int64_t H, int64_t K, int64_t V) {
  STD_TORCH_CHECK(Hk > 0 && H % Hk == 0, op, ": the key heads (", Hk, ") must divide the value heads (", H, ")");
  STD_TORCH_CHECK(K > 0 && V > 0, op, ": K and V must be positive");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_delta_rule(
    Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, double scale, std::optional<Tensor> initial_state,
    bool use_qk_l2norm, std::optional<Tensor> cu_seqlens, std::optional<Tensor> edit_index,
    std::optional<Tensor> edit_left, std::optional<Tensor> edit_right, std::optional<Tensor> snapshots,
    bool return_writes) {
  const char* op = "gated_delta_rule";
  STD_TORCH_CHECK(v.dim() == 4 && k.dim() == 4, op, ": k and v must be [B, T, heads, size]");
  const int64_t B = v.size(0), T = v.size(1), H = v.size(2), V = v.size(3), Hk = k.size(2), K = k.size(3);
  check_heads(op, Hk, H, K, V);
  check_shape(op, "k", k, {B, T, Hk, K});
  check_shape(op, "q", q, {B, T, Hk, K});
  check_shape(op, "g", g, {B, T, H});
  check_shape(op, "beta", beta, {B, T, H});
  std::vector<Tensor> keep;
  GatedDeltaRuleParams p = {};
  p.B = B, p.T = T, p.Hk = Hk, p.H = H, p.K = K, p.V = V, p.N = B;
  p.q = view(op, "q", q, true, keep);
  p.k = view(op, "k", k, true, keep);
  p.v = view(op, "v", v, true, keep);
  p.g = view(op, "g", g, false, keep);
  p.beta = view(op, "beta", beta, false, keep);
  p.scale = static_cast<float>(scale);
  p.use_qk_l2norm = use_qk_l2norm;
  std::vector<int64_t> lengths(B, T);
  if (cu_seqlens.has_value()) {
    STD_TORCH_CHECK(B == 1 && cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 2, op,
                    ": cu_seqlens needs B = 1 and at least two offsets");
    p.cu_seqlens = static_cast<const int64_t*>(data_as(op, "cu_seqlens", cu_seqlens, ScalarType::Long, keep));
    p.N = cu_seqlens->size(0) - 1;
    lengths.clear();
    for (int64_t n = 0; n < p.N; n++) lengths.push_back(p.cu_seqlens[n + 1] - p.cu_seqlens[n]);
    bool rising = p.cu_seqlens[0] == 0 && p.cu_seqlens[p.N] == T;
    for (int64_t length : lengths) rising = rising && length >= 0;
    STD_TORCH_CHECK(rising, op, ": cu_seqlens must rise from 0 to T");
  }
  if (initial_state.has_value()) check_shape(op, "initial_state", *initial_state, {p.N, H, K, V});
  p.initial_state =
      static_cast<const float*>(data_as(op, "initial_state", initial_state, ScalarType::Float, keep));
  p.edits = edit_list(op, edit_index, edit_left, edit_right, p.N, lengths, H, K, V, keep);
  if (snapshots.has_value()) {
    STD_TORCH_CHECK(snapshots->dim() == 2 && snapshots->size(1) == 2, op, ": snapshots must be [P, 2]");
    check_dtype(op, "snapshots", *snapshots, ScalarType::Long);
    p.P = snapshots->size(0);
    p.places = static_cast<const int64_t*>(data_as(op, "snapshots", snapshots, ScalarType::Long, keep));
    for (int64_t i = 0; i < p.P; i++) {
      const int64_t n = p.places[2 * i], t = p.places[2 * i + 1];
      STD_TORCH_CHECK(n >= 0 && n < p.N && t >= 0 && t < lengths[n], op, ": snapshot ", i, " is out of range: row ", n,
                      ", position ", t);
    }
  }
  Tensor o = empty({B, T, H, V}, v.scalar_type());
  Tensor final_state = empty({p.N, H, K, V}, ScalarType::Float);
  Tensor left = return_writes ? empty({B, T, Hk, K}, ScalarType::Float) : empty({0}, ScalarType::Float);
  Tensor right = return_writes ? empty({B, T, H, V}, ScalarType::Float) : empty({0}, ScalarType::Float);
  Tensor shots = empty({p.P, H, K, V}, ScalarType::Float);
  p.o = o.mutable_data_ptr();
  p.o_type = p.v.type;
  p.final_state = floats(final_state);
  p.left = return_writes ? floats(left) : nullptr;
  p.right = return_writes ? floats(right) : nullptr;
  p.snapshots = floats(shots);
  cpu::gated_delta_rule(p, torch_threads());
  return {o, final_state, left, right, shots};
}

std::tuple<Tensor, Tensor, Tensor> gated_delta_rule_step(
    Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor state, double scale, bool use_qk_l2norm,
    std::optional<Tensor> edit_index, std::optional<Tensor> edit_left, std::optional<Tensor> edit_right,
    bool return_writes) {
  const char* op = "gated_delta_rule_step";
  STD_TORCH_CHECK(v.dim() == 3 && k.dim() == 3, op, ": k and v must be [B, heads, size]");
  const int64_t B = v.size(0), H = v.size(1), V = v.size(2), Hk = k.size(1), K = k.size(2);
  check_heads(op, Hk, H, K, V);
  check_shape(op, "k", k, {B, Hk, K});
  check_shape(op, "q", q, {B, Hk, K});
  check_shape(op, "g", g, {B, H});
  check_shape(op, "beta", beta, {B, H});
  check_shape(op, "state", state, {B, H, K, V});
  check_cpu(op, "state", state);
  check_dtype(op, "state", state, ScalarType::Float);
  check_contiguous(op, "state", state);
  std::vector<Tensor> keep;
  GatedDeltaRuleStepParams p = {};
  p.B = B, p.Hk = Hk, p.H = H, p.K = K, p.V = V;
  p.q = view(op, "q", q, true, keep);
  p.k = view(op, "k", k, true, keep);
  p.v = view(op, "v", v, true, keep);
  p.g = view(op, "g", g, false, keep);
  p.beta = view(op, "beta", beta, false, keep);
  p.scale = static_cast<float>(scale);
  p.use_qk_l2norm = use_qk_l2norm;
  p.state = floats(state);
  p.edits = edit_list(op, edit_index, edit_left, edit_right, B, {}, H, K, V, keep);
  Tensor o = empty({B, H, V}, v.scalar_type());
  Tensor left = return_writes ? empty({B, Hk, K}, ScalarType::Float) : empty({0}, ScalarType::Float);
  Tensor right = return_writes ? empty({B, H, V}, ScalarType::Float) : empty({0}, ScalarType::Float);
  p.o = o.mutable_data_ptr();
  p.o_type = p.v.type;
  p.left = return_writes ? floats(left) : nullptr;
  p.right = return_writes ? floats(right) : nullptr;
  cpu::gated_delta_rule_step(p, torch_threads());
  return {o, left, right};
}

}  // namespace writesae
