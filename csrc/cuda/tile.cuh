// What every CUDA kernel here stands on: where a thread is, shared memory, barriers, shuffles, matrix products, asynchronous
// copies, launches. Compiled by nvcc it is the device (tile_device.cuh, the only file with PTX); compiled by a host compiler
// it is the host twin (host_twin.h), which runs the same kernels on a CPU thread by thread, with real barriers, and checks
// their use.
//
// Rules that both sides keep, and the twin enforces:
//  - a block has whole warps; every shuffle, ballot, matrix product and matrix load is called by all 32 lanes of a warp
//    together, and `sync()` by all threads of a block, from the same place in the source;
//  - shared memory is taken piece by piece through `Shared`, by all threads in the same order;
//  - an asynchronous copy may be read by its own thread after `wait_copies`, by others after a barrier behind that, and none
//    is left unwaited-for at the end;
//  - blocks of one launch do not wait for each other.
//
// `count(name)` adds one (`count(name, n)`: n) to a number of the launch, for tests that ask how often something was done. It is
// code of the twin alone, so that a kernel that counts costs a device nothing: called by each thread that comes by.
#pragma once

#include <cstddef>
#include <cstdint>

namespace writesae::tile {

constexpr int WARP = 32;

// bf16 and f16 as they lie in memory.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// 16 bytes of anything, the widest access of a thread.
struct __attribute__((aligned(16), may_alias)) Vec16 {
  uint32_t x[4];
};

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

// Bytes of shared memory that a piece of so many takes. For the host, which asks for their sum.
constexpr size_t shared_piece(size_t bytes) { return (bytes + 127) / 128 * 128; }

}  // namespace writesae::tile

#if defined(__CUDACC__)
#include "tile_device.cuh"
#else
#include "host_twin.h"
#endif

// ---- made of the above, the same on both sides -----------------------------------------------------------------------

namespace writesae::tile {

// Host: throws where a block of `what` (an operator and its sizes) needs more shared memory than the current device has. Called
// before the operator runs anything.
inline void require_shared(const std::string& what, size_t bytes) {
  if (bytes > shared_limit())
    throw std::runtime_error(what + " needs " + std::to_string(bytes) +
                             " bytes of shared memory a block, and this device has " + std::to_string(shared_limit()) +
                             "; use backend=\"reference\"");
}

__device__ __forceinline__ int lane() { return thread() % WARP; }
__device__ __forceinline__ int warp() { return thread() / WARP; }

__device__ __forceinline__ float load_float(const float* p) { return *p; }
__device__ __forceinline__ float load_float(const bf16* p) { return to_float(*p); }
__device__ __forceinline__ float load_float(const f16* p) { return to_float(*p); }
__device__ __forceinline__ void store_float(float* p, float x) { *p = x; }
__device__ __forceinline__ void store_float(bf16* p, float x) { *p = to_bf16(x); }
__device__ __forceinline__ void store_float(f16* p, float x) { *p = to_f16(x); }

// Sum and maximum over the warp, in every lane; the order of additions is fixed.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) x += shuffle_xor(x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) {
    const float y = shuffle_xor(x, step);
    x = y > x ? y : x;
  }
  return x;
}

// Where a thread's share of a matrix product lies. Accumulators of a 16 x 8 tile, d[0..3]:
// rows accumulator_row(0|1) = lane / 4 (+ 8), columns accumulator_column() (+ 1): d[2 * i + j] is row i, column j.
__device__ __forceinline__ int accumulator_row(int i) { return lane() / 4 + 8 * i; }
__device__ __forceinline__ int accumulator_column() { return 2 * (lane() % 4); }

}  // namespace writesae::tile
