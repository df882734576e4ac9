// Every operator: its schema and what runs it. The functions are declared in operators.h and defined in csrc/<op>.cpp.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/bf16.h"
#include "cpu/isa.h"
#include "operators.h"
#include "schemas.h"

namespace writesae {
namespace {

// Chooses an instruction set by name ("" keeps the present one) and returns the one in use.
std::string cpu_isa(std::string force) {
  if (!force.empty()) cpu::force_isa(force);
  return cpu::isa_name(cpu::isa());
}

std::string cpu_isa_list() { return cpu::isa_list(); }

// The same for what multiplies bfloat16.
std::string cpu_bf16(std::string force) {
  if (!force.empty()) cpu::force_bf16(force);
  return cpu::bf16_name(cpu::bf16());
}

std::string cpu_bf16_list() { return cpu::bf16_list(); }

}  // namespace
}  // namespace writesae

STABLE_TORCH_LIBRARY(writesae, m) {
  writesae::define_device_operators(m);
  m.def("cpu_isa(str force) -> str");
  m.def("cpu_isa_list() -> str");
  m.def("cpu_bf16(str force) -> str");
  m.def("cpu_bf16_list() -> str");
  m.def("causal_conv(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? cu_seqlens) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, Tensor? gate, float eps, bool zero_centred, bool round_once) -> Tensor");
  m.def(
      "factored_loss(Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor values, Tensor indices, "
      "Tensor v_dec, Tensor w_dec, Tensor? offset, Tensor? on_offset, Tensor? weight, Tensor? initial_state, "
      "Tensor? cu_seqlens, Tensor? v_enc, Tensor? w_enc, bool gradients) "
      "-> (Tensor error, Tensor d_values, Tensor dv_dec, Tensor dw_dec, Tensor usage, Tensor state_sum, "
      "Tensor dv_enc, Tensor dw_enc, Tensor db_enc)");
}

STABLE_TORCH_LIBRARY_IMPL(writesae, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&writesae::cpu_isa));
  m.impl("cpu_isa_list", TORCH_BOX(&writesae::cpu_isa_list));
  m.impl("cpu_bf16", TORCH_BOX(&writesae::cpu_bf16));
  m.impl("cpu_bf16_list", TORCH_BOX(&writesae::cpu_bf16_list));
}

STABLE_TORCH_LIBRARY_IMPL(writesae, CPU, m) {
  m.impl("causal_conv", TORCH_BOX(&writesae::causal_conv));
  writesae::for_each_scan([&](auto rule) { writesae::implement_scan<decltype(rule)>(m); });
  m.impl("selective_scan", TORCH_BOX(&writesae::selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&writesae::selective_scan_backward));
  m.impl("selective_scan_step", TORCH_BOX(&writesae::selective_scan_step));
  m.impl("encode_topk", TORCH_BOX(&writesae::encode_topk));
  m.impl("encode_threshold", TORCH_BOX(&writesae::encode_threshold));
  m.impl("encode_at", TORCH_BOX(&writesae::encode_at));
  m.impl("encode_backward", TORCH_BOX(&writesae::encode_backward));
  m.impl("rms_norm", TORCH_BOX(&writesae::rms_norm));
  m.impl("factored_loss", TORCH_BOX(&writesae::factored_loss));
}
