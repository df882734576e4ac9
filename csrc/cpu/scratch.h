// Scratch memory of the kernels: uninitialised, on a cache line's boundary.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

namespace writesae::cpu {

constexpr int64_t LINE = 64;  // bytes

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

struct AlignedDelete {
  void operator()(char* data) const { ::operator delete(data, std::align_val_t(LINE)); }
};
using AlignedBytes = std::unique_ptr<char, AlignedDelete>;

inline AlignedBytes aligned_bytes(int64_t bytes) {
  return AlignedBytes(static_cast<char*>(::operator new(std::max(bytes, LINE), std::align_val_t(LINE))));
}

// One piece of floats.
class Buffer {
 public:
  explicit Buffer(int64_t floats) : data_(aligned_bytes(floats * static_cast<int64_t>(sizeof(float)))) {}
  float* operator+(int64_t offset) const { return reinterpret_cast<float*>(data_.get()) + offset; }

 private:
  AlignedBytes data_;
};

// Handed out piece by piece, each on a boundary of its own.
class Arena {
 public:
  explicit Arena(int64_t bytes) : data_(aligned_bytes(bytes)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(data_.get() + used_);
    used_ += round_up(count * sizeof(T), LINE);
    return piece;
  }
  void clear() { used_ = 0; }

 private:
  AlignedBytes data_;
  int64_t used_ = 0;
};

}  // namespace writesae::cpu
