// Schemas of the operators that have kernels on more than one side.
#pragma once

namespace writesae {

template <class Module>
void define_device_operators(Module& m) {
  m.def(
      "gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, Tensor? initial_state, "
      "bool use_qk_l2norm, Tensor? cu_seqlens, Tensor? edit_index, Tensor? edit_left, Tensor? edit_right, "
      "Tensor? snapshots, bool return_writes) "
      "-> (Tensor o, Tensor final_state, Tensor left, Tensor right, Tensor snapshots)");
  m.def(
      "gated_delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, float scale, "
      "bool use_qk_l2norm, Tensor? edit_index, Tensor? edit_left, Tensor? edit_right, bool return_writes) "
      "-> (Tensor o, Tensor left, Tensor right)");
}

}  // namespace writesae
