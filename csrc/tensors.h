// From torch tensors to what kernels take: views, raw pointers, torch's thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "check.h"
#include "cpu/parallel.h"
#include "element.h"

namespace writesae {

// Kernels run on torch's own thread pool.
inline cpu::Parallel torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
            torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { body(begin, end, context); });
          }};
}

inline Element element_of(const char* op, const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Element::f32;
    case ScalarType::BFloat16:
      return Element::bf16;
    case ScalarType::Half:
      return Element::f16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
  return Element::f32;
}

// A view through strides. With `dense`, the last axis must have stride 1: `keep` holds the copy made where it has not.
inline View view(const char* op, const char* name, const Tensor& x, bool dense, std::vector<Tensor>& keep) {
  check_cpu(op, name, x);
  Tensor held = x;
  if (dense && x.size(x.dim() - 1) > 1 && x.stride(x.dim() - 1) != 1) {
    held = torch::stable::contiguous(x);
    keep.push_back(held);
  }
  View out;
  out.data = held.const_data_ptr();
  out.type = element_of(op, name, held);
  for (int64_t axis = 0; axis < held.dim(); axis++) out.stride[axis] = held.stride(axis);
  if (dense) out.stride[held.dim() - 1] = 1;
  return out;
}

// Data of a contiguous CPU tensor of the given type, converting and copying where needed; null for none.
inline const void* data_as(const char* op, const char* name, const std::optional<Tensor>& x, ScalarType type,
                           std::vector<Tensor>& keep) {
  if (!x.has_value()) return nullptr;
  check_cpu(op, name, *x);
  Tensor held = x->scalar_type() == type ? *x : torch::stable::to(*x, type);
  held = torch::stable::contiguous(held);
  keep.push_back(held);
  return held.const_data_ptr();
}

inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::empty({shape.begin(), shape.size()}, type);
}

inline float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

}  // namespace writesae
