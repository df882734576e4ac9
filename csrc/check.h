// Argument checks shared by the operators. The Python wrappers say the same things earlier and with more context; these
// keep a direct torch.ops call from reading out of bounds.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>

// For which side the operators on tensors are compiled: 0 the CPU, 1 CUDA, 2 the host twin of CUDA, whose kernels take CPU
// tensors. The same files make all three.
#ifndef WRITESAE_SIDE
#define WRITESAE_SIDE 0
#endif

namespace writesae {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_shape(const char* op, const char* name, const Tensor& x, std::initializer_list<int64_t> expected) {
  bool same = x.dim() == static_cast<int64_t>(expected.size());
  int64_t axis = 0;
  for (int64_t size : expected) {
    same = same && x.size(axis) == size;
    axis++;
    if (!same) break;
  }
  STD_TORCH_CHECK(same, op, ": ", name, " has the wrong shape");
}

// Whether an operator may look at its tensors' numbers: it does not wait for a GPU to check them.
constexpr bool READABLE = WRITESAE_SIDE != 1;

inline void check_side(const char* op, const char* name, const Tensor& x) {
#if WRITESAE_SIDE == 1
  STD_TORCH_CHECK(x.is_cuda(), op, ": ", name, " must be a CUDA tensor");
#else
  STD_TORCH_CHECK(x.is_cpu(), op, ": ", name, " must be a CPU tensor");
#endif
}

inline void check_dtype(const char* op, const char* name, const Tensor& x, ScalarType expected) {
  STD_TORCH_CHECK(x.scalar_type() == expected, op, ": ", name, " must be ", torch::headeronly::toString(expected), ", got ",
                  torch::headeronly::toString(x.scalar_type()));
}

inline void check_contiguous(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), op, ": ", name, " must be contiguous");
}

}  // namespace writesae
