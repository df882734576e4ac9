// Schemas of the operators that have kernels on more than one side.
#pragma once

#include "scan_operators.h"
#include "scans.h"

namespace writesae {

template <class Module>
void define_device_operators(Module& m) {
  for_each_scan([&](auto rule) { define_scan<decltype(rule)>(m); });
  m.def(
      "selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? initial_state, "
      "Tensor? cu_seqlens, Tensor? edit_index, Tensor? edit_left, Tensor? edit_right, Tensor? snapshots, "
      "bool return_writes) -> (Tensor o, Tensor final_state, Tensor right, Tensor snapshots, Tensor first_nonfinite)");
  m.def(
      "selective_scan_backward(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? initial_state, "
      "Tensor? cu_seqlens, Tensor? edit_index, Tensor? edit_left, Tensor? edit_right, Tensor? snapshots, Tensor? d_o, "
      "Tensor? d_final_state, Tensor? d_right, Tensor? d_snapshots) -> (Tensor d_x, Tensor d_dt, Tensor d_A, "
      "Tensor d_B, Tensor d_C, Tensor d_D, Tensor d_initial_state, Tensor d_edit_left, Tensor d_edit_right)");
  m.def(
      "selective_scan_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor(a!) state, Tensor? D, "
      "Tensor? edit_index, Tensor? edit_left, Tensor? edit_right, bool return_writes) "
      "-> (Tensor o, Tensor right, Tensor first_nonfinite)");
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
