// tile.cuh on the device. PTX lives here and in tile_hopper.cuh and nowhere else.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#define WRITESAE_NOINLINE __noinline__

namespace writesae::tile {

using Stream = cudaStream_t;

// ---- place ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int thread() { return threadIdx.x; }
__device__ __forceinline__ int block_threads() { return blockDim.x; }
__device__ __forceinline__ int block_x() { return blockIdx.x; }
__device__ __forceinline__ int block_y() { return blockIdx.y; }
__device__ __forceinline__ int block_z() { return blockIdx.z; }
__device__ __forceinline__ int grid_x() { return gridDim.x; }
__device__ __forceinline__ int grid_y() { return gridDim.y; }

// For the host twin, which counts by name; nothing here.
__device__ __forceinline__ void count(const char*, int64_t = 1) {}

// ---- shared memory --------------------------------------------------------------------------------------------------

// Hands out the block's dynamic shared memory, each piece on a boundary of 128 bytes.
class Shared {
 public:
  __device__ __forceinline__ Shared() : used_(0) {}
  template <class T>
  __device__ __forceinline__ T* take(int count) {
    extern __shared__ __align__(128) unsigned char tile_shared[];
    T* piece = reinterpret_cast<T*>(tile_shared + used_);
    used_ += (count * static_cast<int>(sizeof(T)) + 127) / 128 * 128;
    return piece;
  }

 private:
  int used_;
};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// A pointer to shared memory that functions which are not inlined take: 32 bits, and the compiler sees what it points to.
class SharedBytes {
 public:
  __device__ __forceinline__ explicit SharedBytes(void* p) : at_(shared_address(p)) {}
  template <class T>
  __device__ __forceinline__ T* get(int bytes = 0) const {
    return static_cast<T*>(__cvta_shared_to_generic(at_ + bytes));
  }

 private:
  uint32_t at_;
};

// ---- barriers -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void sync() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
// Barrier `id` (1..15) among `threads` threads (whole warps) of the block.
__device__ __forceinline__ void sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- between lanes --------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T shuffle(T x, int from) {
  return __shfl_sync(0xffffffffu, x, from);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
// From the lane `step` below; lanes below `step` keep their own.
template <class T>
__device__ __forceinline__ T shuffle_up(T x, int step) {
  return __shfl_up_sync(0xffffffffu, x, step);
}
__device__ __forceinline__ uint32_t ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
__device__ __forceinline__ int count_bits(uint32_t x) { return __popc(x); }
__device__ __forceinline__ int count_bits(unsigned long long x) { return __popcll(x); }
// Place of the lowest bit that is set; x is not zero.
__device__ __forceinline__ int lowest_bit(uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }
// Place of the highest.
__device__ __forceinline__ int highest_bit(uint32_t x) { return 31 - __clz(static_cast<int>(x)); }
// Whether x holds in any lane of the warp: one instruction, where a ballot that is compared takes three.
__device__ __forceinline__ bool any(bool x) { return __any_sync(0xffffffffu, x); }
// The largest x of the warp, in every lane.
__device__ __forceinline__ int warp_max(int x) { return __reduce_max_sync(0xffffffffu, x); }

// ---- atomics, on shared or global memory; they return the value before ----------------------------------------------

template <class T>
__device__ __forceinline__ T atomic_add(T* p, T x) {
  return atomicAdd(p, x);
}
template <class T>
__device__ __forceinline__ T atomic_max(T* p, T x) {
  return atomicMax(p, x);
}
template <class T>
__device__ __forceinline__ T atomic_min(T* p, T x) {
  return atomicMin(p, x);
}
template <class T>
__device__ __forceinline__ T atomic_exchange(T* p, T x) {
  return atomicExch(p, x);
}

// ---- numbers --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ bf16 to_bf16(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
__device__ __forceinline__ f16 to_f16(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
// Two numbers in one register, `low` in the lower half (the earlier index).
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
// Rounds to tf32 (10 bits after the point), as the bits of a float. Ties go to even from sm_90 on, where this is one
// instruction; the other way, away from zero, is the only one before, and on sm_90 takes four.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t y;
#if __CUDA_ARCH__ >= 900
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
#endif
  return y;
}
__device__ __forceinline__ float bits_to_float(uint32_t x) { return __uint_as_float(x); }
__device__ __forceinline__ uint32_t float_to_bits(float x) { return __float_as_uint(x); }
// bits * 2 + (x < height), without a predicate; false where one is NaN: the subtraction then gives 0x7fffffff.
__device__ __forceinline__ uint32_t append_below(uint32_t bits, float x, float height) {
  return __funnelshift_l(__float_as_uint(x - height), bits, 1);
}
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ float round_to_whole(float x) { return rintf(x); }
__device__ __forceinline__ float reciprocal_root(float x) { return 1.0f / sqrtf(x); }

// x, of which the compiler knows nothing: what is computed from it stays where it is written instead of moving out of loops
// into registers that are needed there.
__device__ __forceinline__ int fresh(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ int64_t fresh(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}
__device__ __forceinline__ float fresh(float x) {
  asm volatile("" : "+f"(x));
  return x;
}

// ---- matrix products: d += a b on a 16 x 8 tile ---------------------------------------------------------------------
// Shares of a thread, g = lane / 4, c = lane % 4 (PTX ISA, "Matrix Fragments"):
//   16 x 8 x 16 (bf16, f16), two numbers a register: a[0] (g, 2c..) a[1] (g + 8, 2c..) a[2] (g, 2c + 8..) a[3] (g + 8, 2c + 8..);
//                                                    b[0] (rows 2c.., column g) b[1] (rows 2c + 8.., column g)
//   16 x 8 x 8 (tf32): a[0] (g, c) a[1] (g + 8, c) a[2] (g, c + 4) a[3] (g + 8, c + 4); b[0] (c, g) b[1] (c + 4, g)
//   d: see accumulator_row in tile.cuh

__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads 8 x 8 matrices of 16-bit elements from shared memory. Lane i gives the address (16-byte aligned) of row i % 8 of
// matrix i / 8 (x2: lanes 0..15). Register m gets row lane / 4, elements 2 (lane % 4) and + 1 of matrix m; `transposed`:
// column lane / 4, rows 2 (lane % 4) and + 1.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// ---- asynchronous copies, global to shared --------------------------------------------------------------------------

// 16 bytes, both addresses 16-byte aligned. Not `valid`: zeros are written and `from` is not read.
__device__ __forceinline__ void copy_16(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
// 4 bytes.
__device__ __forceinline__ void copy_4(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
}
// Closes a group of the copies issued since the last one.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the N latest groups of this thread are under way.
template <int N>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- launch ---------------------------------------------------------------------------------------------------------

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
// Bytes of shared memory that a block may have, and that the blocks of a multiprocessor share.
inline size_t shared_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
inline size_t processor_shared() { return device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor); }

// Lets a kernel have all the dynamic shared memory that the current device gives a block: once a kernel and device, whatever
// a call asks for, so that two threads that launch it do not take it from each other. Throws where that is less than `bytes`.
inline void allow_shared(const void* kernel, size_t bytes, const char* name) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  check(cudaGetDevice(&device), name);
  const std::lock_guard<std::mutex> held(mutex);
  size_t& most = allowed[{kernel, device}];
  if (most == 0) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), name);
    const size_t own = shared_limit() - attributes.sharedSizeBytes;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(own)), name);
    most = own;
  }
  if (bytes > most)
    throw std::runtime_error(std::string(name) + ": " + std::to_string(bytes) +
                             " bytes of shared memory; a block has at most " + std::to_string(most));
}

// kernel(args...) with `shared` bytes of dynamic shared memory, on `stream`. Does not wait for it.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), Grid grid, int threads, size_t shared, Stream stream, const A&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > 48 * 1024) allow_shared(reinterpret_cast<const void*>(kernel), shared, name);
  kernel<<<dim3(grid.x, grid.y, grid.z), threads, shared, stream>>>(static_cast<P>(args)...);
  check(cudaGetLastError(), name);
}

// Copies device memory to the host when the stream has come so far, and waits for it.
inline void read(void* to, const void* from, size_t bytes, Stream stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream), "read");
  check(cudaStreamSynchronize(stream), "read");
}

// Sets every byte of memory, in the stream's order.
inline void fill(void* p, int byte, size_t bytes, Stream stream) { check(cudaMemsetAsync(p, byte, bytes, stream), "fill"); }
inline void zero(void* p, size_t bytes, Stream stream) { fill(p, 0, bytes, stream); }

}  // namespace writesae::tile
