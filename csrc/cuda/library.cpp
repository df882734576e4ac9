// The operators whose kernels are CUDA's: for CUDA tensors in the namespace of the CPU library, which defines their schemas
// and is loaded before; compiled as the host twin, for CPU tensors in a namespace of its own, `writesae_twin`.
#include <torch/csrc/stable/library.h>

#include "encode.h"
#include "operators.h"
#include "schemas.h"
#if WRITESAE_SIDE == 2
#include "cuda/encode_select.cuh"
#endif

namespace writesae {

template <class Module>
void implement_device_operators(Module& m) {
  for_each_scan([&](auto rule) { implement_scan<decltype(rule)>(m); });
  m.impl("selective_scan", TORCH_BOX(&selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward));
  m.impl("selective_scan_step", TORCH_BOX(&selective_scan_step));
  m.impl("encode_topk", TORCH_BOX(&encode_topk));
  m.impl("encode_threshold", TORCH_BOX(&encode_threshold));
  m.impl("encode_at", TORCH_BOX(&encode_at));
  m.impl("encode_backward", TORCH_BOX(&encode_backward));
  m.impl("encode_writes_backward", TORCH_BOX(&encode_writes_backward));
}

// Operators that nothing in the package calls, until a card has shown what they are worth: in a namespace of their own.
template <class Module>
void define_prototypes(Module& m) {
  m.def("encode_product(Tensor v, Tensor left, str kernel, int cluster=1) -> Tensor");
}

template <class Module>
void implement_prototypes(Module& m) {
  m.impl("encode_product", TORCH_BOX(&encode_product));
}

#if WRITESAE_SIDE == 2
namespace {

// Tokens of encode's segments from now on; 0 for the kernel's own choice.
int64_t encode_segment(int64_t tokens) {
  cuda::encode_force_segment(static_cast<int>(tokens));
  return tokens;
}

// Blocks that share the features of a segment in encode from now on; 0 for the kernel's own choice.
int64_t encode_parts(int64_t parts) {
  cuda::encode_force_parts(static_cast<int>(parts));
  return parts;
}

// How encode cuts a top-k call with one write a token: tokens of a segment, blocks that share its features, heads at a time,
// blocks at once, candidates kept a token, and millionths of those blocks that work.
std::vector<int64_t> encode_plan(int64_t B, int64_t T, int64_t heads, int64_t K, int64_t V, int64_t F, int64_t k,
                                 std::string precision) {
  EncodeParams p = {};
  p.B = p.N = B, p.T = T, p.Hl = p.H = p.Hs = heads, p.R = p.rank = 1, p.K = K, p.V = V, p.F = F, p.k = k;
  const auto found = cuda::encode_outline(p, precision == "bf16"   ? Precision::bf16
                                             : precision == "tf32" ? Precision::tf32
                                                                   : Precision::fp32);
  return {found.segment, found.parts, found.heads, found.slots, found.capacity, static_cast<int64_t>(1e6 * found.busy)};
}

}  // namespace
#endif

}  // namespace writesae

#if WRITESAE_SIDE == 1

STABLE_TORCH_LIBRARY_IMPL(writesae, CUDA, m) { writesae::implement_device_operators(m); }
STABLE_TORCH_LIBRARY(writesae_prototypes, m) { writesae::define_prototypes(m); }
STABLE_TORCH_LIBRARY_IMPL(writesae_prototypes, CUDA, m) { writesae::implement_prototypes(m); }

#else

STABLE_TORCH_LIBRARY(writesae_twin, m) {
  writesae::define_device_operators(m);
  writesae::define_prototypes(m);
  m.def("encode_segment(int tokens) -> int");
  m.def("encode_parts(int parts) -> int");
  m.def("encode_plan(int B, int T, int heads, int K, int V, int F, int k, str precision) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(writesae_twin, CPU, m) {
  writesae::implement_device_operators(m);
  writesae::implement_prototypes(m);
}

STABLE_TORCH_LIBRARY_IMPL(writesae_twin, CompositeExplicitAutograd, m) {
  m.impl("encode_segment", TORCH_BOX(&writesae::encode_segment));
  m.impl("encode_parts", TORCH_BOX(&writesae::encode_parts));
  m.impl("encode_plan", TORCH_BOX(&writesae::encode_plan));
}

#endif
