// From torch tensors to what kernels take: views, raw pointers, torch's thread pool.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "check.h"
#include "element.h"
#include "parallel.h"

#if WRITESAE_SIDE == 1
#include <dlfcn.h>
#endif

namespace writesae {

// Kernels run on torch's own thread pool.
inline Parallel torch_threads() {
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
  check_side(op, name, x);
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
  check_side(op, name, *x);
  Tensor held = x->scalar_type() == type ? *x : torch::stable::to(*x, type);
  held = torch::stable::contiguous(held);
  keep.push_back(held);
  return held.const_data_ptr();
}

// Offsets of packed sequences [N + 1], checked: one row, rising from 0 to T.
inline const int64_t* sequence_offsets(const char* op, const Tensor& cu_seqlens, int64_t B, int64_t T,
                                       std::vector<Tensor>& keep) {
  STD_TORCH_CHECK(B == 1 && cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 2, op,
                  ": cu_seqlens needs B = 1 and at least two offsets");
  const auto* offsets = static_cast<const int64_t*>(data_as(op, "cu_seqlens", cu_seqlens, ScalarType::Long, keep));
  const int64_t N = cu_seqlens.size(0) - 1;
  if (!READABLE) return offsets;
  bool rising = offsets[0] == 0 && offsets[N] == T;
  for (int64_t n = 0; n < N; n++) rising = rising && offsets[n] <= offsets[n + 1];
  STD_TORCH_CHECK(rising, op, ": cu_seqlens must rise from 0 to T");
  return offsets;
}

// While it lives, the device of a tensor is the current one: `empty` allocates there and `stream` is its stream.
class OnDeviceOf {
 public:
#if WRITESAE_SIDE == 1
  explicit OnDeviceOf(const Tensor& x) : guard_(x.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
#else
  explicit OnDeviceOf(const Tensor&) {}
#endif
};

inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) {
#if WRITESAE_SIDE == 1
  const torch::stable::Device device(torch::headeronly::DeviceType::CUDA,
                                     torch::stable::accelerator::getCurrentDeviceIndex());
  return torch::stable::empty({shape.begin(), shape.size()}, type, std::nullopt, device);
#else
  return torch::stable::empty({shape.begin(), shape.size()}, type);
#endif
}

// torch's current stream on the current device, a cudaStream_t; kernels of the host twin have none.
inline void* stream() {
  void* current = nullptr;
#if WRITESAE_SIDE == 1
  // torch's CUDA half has it, which a build against a torch without CUDA cannot link: asked for when first needed.
  using Get = AOTITorchError (*)(int32_t device_index, void** stream);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* found = dlsym(library != nullptr ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    STD_TORCH_CHECK(found != nullptr, "aoti_torch_get_current_cuda_stream: not found in the torch that is loaded");
    return reinterpret_cast<Get>(found);
  }();
  STABLE_TORCH_ERROR_CODE_CHECK(get(torch::stable::accelerator::getCurrentDeviceIndex(), &current));
#endif
  return current;
}

// Device memory of a kernel's own while it runs (torch hands it out in the stream's order), 256-byte aligned.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : held_(empty({bytes + 256}, ScalarType::Byte)) {}
  void* data() const {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(held_.mutable_data_ptr()) + 255) / 256 * 256);
  }

 private:
  Tensor held_;
};

inline float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }
inline int64_t* integers(const Tensor& x) { return static_cast<int64_t*>(x.mutable_data_ptr()); }

inline void check_heads(const char* op, int64_t Hk, int64_t H, int64_t K, int64_t V) {
  STD_TORCH_CHECK(Hk > 0 && H % Hk == 0, op, ": the key heads (", Hk, ") must divide the value heads (", H, ")");
  STD_TORCH_CHECK(K > 0 && V > 0, op, ": K and V must be positive");
}

}  // namespace writesae
