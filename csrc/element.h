// Element types and strided views as kernels see them: raw pointers, no torch.
#pragma once

#include <cstdint>

namespace writesae {

enum class Element : int { f32, bf16, f16 };

constexpr int64_t element_size(Element type) { return type == Element::f32 ? 4 : 2; }

// A read-only tensor of up to four axes. Strides count elements; the last axis has stride 1 where the kernel says so.
struct View {
  const void* data = nullptr;
  Element type = Element::f32;
  int64_t stride[4] = {0, 0, 0, 0};

  const void* at(int64_t a, int64_t b, int64_t c, int64_t d = 0) const {
    const int64_t offset = a * stride[0] + b * stride[1] + c * stride[2] + d * stride[3];
    return static_cast<const char*>(data) + offset * element_size(type);
  }
};

}  // namespace writesae
