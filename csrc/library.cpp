// Every operator: its schema and what runs it. The functions are declared in operators.h and defined in csrc/<op>.cpp.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/isa.h"
#include "operators.h"

namespace writesae {
namespace {

// Chooses an instruction set by name ("" keeps the present one) and returns the one in use.
std::string cpu_isa(std::string force) {
  if (!force.empty()) cpu::force_isa(force);
  return cpu::isa_name(cpu::isa());
}

std::string cpu_isa_list() { return cpu::isa_list(); }

}  // namespace
}  // namespace writesae

STABLE_TORCH_LIBRARY(writesae, m) {
  m.def("cpu_isa(str force) -> str");
  m.def("cpu_isa_list() -> str");
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

STABLE_TORCH_LIBRARY_IMPL(writesae, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&writesae::cpu_isa));
  m.impl("cpu_isa_list", TORCH_BOX(&writesae::cpu_isa_list));
}

STABLE_TORCH_LIBRARY_IMPL(writesae, CPU, m) {
  m.impl("gated_delta_rule", TORCH_BOX(&writesae::gated_delta_rule));
  m.impl("gated_delta_rule_step", TORCH_BOX(&writesae::gated_delta_rule_step));
}
