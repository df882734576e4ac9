// selective_scan on tensors: checks, allocation, and the kernels' parameters.
#include "selective_scan.h"

#include "operators.h"
#include "scan_sequences.h"
#include "tensors.h"

namespace writesae {
namespace {

// Of x and dt, read in place as far as tokens or channels lie next to each other.
View selective_scan_view(const char* op, const char* name, const Tensor& x, std::vector<Tensor>& keep) {
  return view(op, name, x, x.stride(1) != 1 || x.stride(2) == 1, keep);
}

// Everything but the outputs. Shapes are checked again here, though the Python wrapper says more.
SelectiveScanParams inputs(const char* op, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                           const Tensor& C, const std::optional<Tensor>& D, const std::optional<Tensor>& initial_state,
                           const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& edit_index,
                           const std::optional<Tensor>& edit_left, const std::optional<Tensor>& edit_right,
                           const std::optional<Tensor>& snapshots, std::vector<Tensor>& keep) {
  STD_TORCH_CHECK(x.dim() == 3 && A.dim() == 2, op, ": x must be [B, T, V] and A [V, K]");
  SelectiveScanParams p = {};
  p.B = x.size(0), p.T = x.size(1), p.V = x.size(2), p.K = A.size(1), p.N = p.B;
  STD_TORCH_CHECK(p.V > 0 && p.K > 0, op, ": V and K must be positive");
  check_shape(op, "dt", dt, {p.B, p.T, p.V});
  check_shape(op, "A", A, {p.V, p.K});
  check_shape(op, "B", B, {p.B, p.T, p.K});
  check_shape(op, "C", C, {p.B, p.T, p.K});
  if (D.has_value()) check_shape(op, "D", *D, {p.V});
  p.x = selective_scan_view(op, "x", x, keep);
  p.dt = selective_scan_view(op, "dt", dt, keep);
  p.rates = view(op, "A", A, false, keep);
  p.write = view(op, "B", B, true, keep);
  p.read = view(op, "C", C, true, keep);
  p.skip = static_cast<const float*>(data_as(op, "D", D, ScalarType::Float, keep));
  scan_sequences(op, 1, initial_state, cu_seqlens, edit_index, edit_left, edit_right, snapshots, p, keep);
  return p;
}

// Outputs of x's shape (o, right), where right is first not finite, and the kernel run.
std::tuple<Tensor, Tensor, Tensor> run(SelectiveScanParams& p, const Tensor& x, bool return_writes) {
  Tensor o = empty({p.B, p.T, p.V}, x.scalar_type());
  Tensor right = return_writes ? empty({p.B, p.T, p.V}, ScalarType::Float) : empty({0}, ScalarType::Float);
  Tensor first_nonfinite = empty({return_writes ? p.B : 0}, ScalarType::Long);
  p.o = o.mutable_data_ptr();
  p.right = return_writes ? floats(right) : nullptr;
  p.first_nonfinite = return_writes ? integers(first_nonfinite) : nullptr;
#if WRITESAE_SIDE == 0
  cpu::selective_scan::forward(p, torch_threads());
#else
  const Workspace workspace(cuda::selective_scan::forward_workspace(p));
  cuda::selective_scan::forward(p, workspace.data(), stream());
#endif
  return {o, right, first_nonfinite};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan(
    Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, std::optional<Tensor> D, std::optional<Tensor> initial_state,
    std::optional<Tensor> cu_seqlens, std::optional<Tensor> edit_index, std::optional<Tensor> edit_left,
    std::optional<Tensor> edit_right, std::optional<Tensor> snapshots, bool return_writes) {
  const OnDeviceOf device(x);
  std::vector<Tensor> keep;
  SelectiveScanParams p = inputs("selective_scan", x, dt, A, B, C, D, initial_state, cu_seqlens, edit_index, edit_left,
                                 edit_right, snapshots, keep);
  Tensor final_state = empty({p.N, 1, p.K, p.V}, ScalarType::Float), shots = empty({p.P, 1, p.K, p.V}, ScalarType::Float);
  p.final_state = floats(final_state), p.snapshots = floats(shots);
  auto [o, right, first_nonfinite] = run(p, x, return_writes);
  return {o, final_state, right, shots, first_nonfinite};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, std::optional<Tensor> D, std::optional<Tensor> initial_state,
    std::optional<Tensor> cu_seqlens, std::optional<Tensor> edit_index, std::optional<Tensor> edit_left,
    std::optional<Tensor> edit_right, std::optional<Tensor> snapshots, std::optional<Tensor> d_o,
    std::optional<Tensor> d_final_state, std::optional<Tensor> d_right, std::optional<Tensor> d_snapshots) {
  const char* op = "selective_scan_backward";
  const OnDeviceOf device(x);
  std::vector<Tensor> keep;
  SelectiveScanBackwardParams p = {};
  p.in = inputs(op, x, dt, A, B, C, D, initial_state, cu_seqlens, edit_index, edit_left, edit_right, snapshots, keep);
  const int64_t V = p.in.V, K = p.in.K, N = p.in.N, E = p.in.edits.count;
  const auto rows = [&](const char* name, const std::optional<Tensor>& y) {
    if (!y.has_value()) return View{};
    check_shape(op, name, *y, {p.in.B, p.in.T, V});
    return view(op, name, *y, true, keep);
  };
  const auto states = [&](const char* name, const std::optional<Tensor>& y, int64_t count) {
    if (y.has_value()) check_shape(op, name, *y, {count, 1, K, V});
    return static_cast<const float*>(data_as(op, name, y, ScalarType::Float, keep));
  };
  p.d_o = rows("d_o", d_o), p.d_right = rows("d_right", d_right);
  p.d_final_state = states("d_final_state", d_final_state, N);
  p.d_snapshots = states("d_snapshots", d_snapshots, p.in.P);
  Tensor d_x = empty({p.in.B, p.in.T, V}, x.scalar_type()), d_dt = empty({p.in.B, p.in.T, V}, dt.scalar_type());
  Tensor d_B = empty({p.in.B, p.in.T, K}, B.scalar_type()), d_C = empty({p.in.B, p.in.T, K}, C.scalar_type());
  Tensor d_A = empty({V, K}, ScalarType::Float), d_D = empty({V}, ScalarType::Float);
  Tensor d_initial_state = empty({N, 1, K, V}, ScalarType::Float);
  Tensor d_edit_left = empty({E, K}, ScalarType::Float), d_edit_right = empty({E, V}, ScalarType::Float);
  p.d_x = d_x.mutable_data_ptr(), p.d_dt = d_dt.mutable_data_ptr();
  p.d_write = d_B.mutable_data_ptr(), p.d_read = d_C.mutable_data_ptr();
  p.d_rates = floats(d_A), p.d_skip = floats(d_D), p.d_initial_state = floats(d_initial_state);
  p.d_edit_left = floats(d_edit_left), p.d_edit_right = floats(d_edit_right);
#if WRITESAE_SIDE == 0
  cpu::selective_scan::backward(p, torch_threads());
#else
  const Workspace workspace(cuda::selective_scan::backward_workspace(p));
  cuda::selective_scan::backward(p, workspace.data(), stream());
#endif
  return {d_x, d_dt, d_A, d_B, d_C, d_D, d_initial_state, d_edit_left, d_edit_right};
}

// One token of every row: the forward at T = 1, from and to one state.
std::tuple<Tensor, Tensor, Tensor> selective_scan_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor state,
                                                       std::optional<Tensor> D, std::optional<Tensor> edit_index,
                                                       std::optional<Tensor> edit_left, std::optional<Tensor> edit_right,
                                                       bool return_writes) {
  const char* op = "selective_scan_step";
  const OnDeviceOf device(x);
  std::vector<Tensor> keep;
  check_side(op, "state", state);
  check_dtype(op, "state", state, ScalarType::Float);
  check_contiguous(op, "state", state);
  SelectiveScanParams p =
      inputs(op, x, dt, A, B, C, D, state, std::nullopt, edit_index, edit_left, edit_right, std::nullopt, keep);
  STD_TORCH_CHECK(p.T == 1, op, ": x must be [B, 1, V]");
  p.final_state = floats(state);
  return run(p, x, return_writes);
}

}  // namespace writesae
