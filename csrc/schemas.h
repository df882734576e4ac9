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
      "gated_delta_rule_backward(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, "
      "Tensor? initial_state, bool use_qk_l2norm, Tensor? cu_seqlens, Tensor? edit_index, Tensor? edit_left, "
      "Tensor? edit_right, Tensor? snapshots, Tensor right, Tensor? d_o, Tensor? d_final_state, Tensor? d_left, "
      "Tensor? d_right, Tensor? d_snapshots) -> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_g, Tensor d_beta, "
      "Tensor d_initial_state, Tensor d_edit_left, Tensor d_edit_right)");
  m.def(
      "gated_delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, float scale, "
      "bool use_qk_l2norm, Tensor? edit_index, Tensor? edit_left, Tensor? edit_right, bool return_writes) "
      "-> (Tensor o, Tensor left, Tensor right)");
  m.def(
      "encode_topk(Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor v_enc, Tensor w_enc, Tensor? b_enc, "
      "int k, Tensor? carry, Tensor? cu_seqlens, Tensor? edit_index, Tensor? edit_left, Tensor? edit_right, "
      "str precision=\"fp32\") -> (Tensor values, Tensor indices, Tensor carry)");
  m.def(
      "encode_threshold(Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor v_enc, Tensor w_enc, "
      "Tensor? b_enc, Tensor threshold, Tensor? carry, Tensor? cu_seqlens, Tensor? edit_index, Tensor? edit_left, "
      "Tensor? edit_right, str precision=\"fp32\") -> (Tensor values, Tensor indices, Tensor counts, Tensor carry)");
  m.def(
      "encode_at(Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor v_enc, Tensor w_enc, Tensor indices, "
      "Tensor? carry, Tensor? cu_seqlens, Tensor? edit_index, Tensor? edit_left, Tensor? edit_right) "
      "-> (Tensor values, Tensor carry)");
  m.def(
      "encode_backward(Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor v_enc, Tensor w_enc, "
      "Tensor indices, Tensor grad, Tensor? cu_seqlens, Tensor? edit_index, Tensor? edit_left, Tensor? edit_right) "
      "-> (Tensor dv_enc, Tensor dw_enc, Tensor d_carry)");
  m.def(
      "encode_writes_backward(Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor v_enc, Tensor w_enc, "
      "Tensor indices, Tensor grad, Tensor? cu_seqlens) -> (Tensor d_left, Tensor d_right)");
}

}  // namespace writesae
