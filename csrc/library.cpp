// Every operator: its schema, and the function that turns tensors into the kernel's parameters. Kernels see no torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace writesae {
namespace {

// Kernels run on torch's own thread pool.
cpu::Parallel torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
            torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { body(begin, end, context); });
          }};
}

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
}

STABLE_TORCH_LIBRARY_IMPL(writesae, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&writesae::cpu_isa));
  m.impl("cpu_isa_list", TORCH_BOX(&writesae::cpu_isa_list));
}
