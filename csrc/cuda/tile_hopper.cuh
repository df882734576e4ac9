// What Hopper has beyond tile.cuh, for kernels compiled for sm_90a: products of a warpgroup (wgmma), copies of tiles by one
// thread (TMA), barriers in shared memory that count arrivals and bytes (mbarrier), clusters of blocks. Compiled by nvcc it
// is PTX, here and in tile_device.cuh and nowhere else; compiled by a host compiler, the twin's model (host_twin_hopper.h).
// Names of sections are those of NVIDIA's PTX ISA.
//
// Rules, which the twin enforces:
//  - a warpgroup is four warps, the first divisible by 4; its 128 threads call `multiply_wide` together, from one place and
//    with the same descriptors;
//  - a product is under way from `multiply_wide` until the thread waited (`products_commit`, `products_wait`): until then its
//    accumulators are neither read nor written, nor its operands written, in registers or in shared memory. Another product
//    may add to the same accumulators;
//  - before a product, `products_fence` has come after whatever else touched its registers;
//  - what plain stores wrote to shared memory is seen by products and copies of tiles only behind `fence_async`;
//  - a barrier is used by copies behind `fence_barriers`, and by other threads behind a meeting after that;
//  - a copy of a tile may be read by who has waited for its barrier, and its target is nobody's before that;
//  - a block ends when nothing it started, and nothing that is to reach it, is under way.
#pragma once

#include "tile.cuh"

namespace writesae::tile {

constexpr int WARPGROUP = 4 * WARP;

// In shared memory, 8 bytes aligned; only the functions here touch it.
struct Barrier {
  uint64_t bits;
};

// How 16-byte units of a row of so many bytes are mixed among eight rows ("Swizzling Modes"): the address alone says it, bits 4..6
// (128), 4..5 (64) or 4 (32) with those three places higher. Tiles whose rows are 128 bytes then lie without bank conflicts.
enum class Swizzle : int { none = 0, bytes_128 = 1, bytes_64 = 2, bytes_32 = 3 };  // as descriptors number them
__host__ __device__ constexpr uint32_t swizzle_bytes(Swizzle s) {
  return s == Swizzle::none ? 16 : 256u >> static_cast<int>(s);
}
// Where the byte is that would be at `address` without.
__host__ __device__ constexpr uint32_t swizzled(uint32_t address, Swizzle s) {
  return address ^ (address >> 3 & (swizzle_bytes(s) - 16));
}

// Throws, by name, unless a device of that compute capability (times ten) runs these kernels.
inline void require_hopper(const char* name, int architecture) {
  if (architecture != 90)
    throw std::runtime_error(std::string(name) + ": needs compute capability 9.0 (sm_90a), this device has " +
                             std::to_string(architecture / 10) + "." + std::to_string(architecture % 10));
}

}  // namespace writesae::tile

#if defined(__CUDACC__)

#include <cuda.h>
#include <cudaTypedefs.h>  // types of the driver's functions; the driver is not linked

namespace writesae::tile {

using TensorMap = CUtensorMap;

// Whether what is being compiled can hold these instructions. A kernel for anything else is left empty, and `launch_cluster`
// refuses to run it.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WRITESAE_HOPPER 1
#else
#define WRITESAE_HOPPER 0
#endif

#if WRITESAE_HOPPER

// ---- clusters -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// All threads of all blocks of the cluster; what they wrote to each other's shared memory is seen behind it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- registers ------------------------------------------------------------------------------------------------------

// The warpgroup gives registers back, or takes them: N a thread from here on, a multiple of 8 from 24 to 256 ("setmaxnreg").
template <int N>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- barriers ("mbarrier") ------------------------------------------------------------------------------------------

// A phase ends when `count` threads have arrived and as many bytes as they expect. Arriving and waiting order what a block's
// threads do among themselves; between blocks, arrivals and copied bytes alone: at cluster scope a wait would also drop the
// first cache (CCTL.IVALL) and an arrival wait for all stores (MEMBAR.ALL.GPU). Plain stores for another block need cluster_sync.
__device__ __forceinline__ void barrier_init(Barrier* b, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}
// Makes new barriers known to copies and to the cluster; by the thread that made them.
__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(Barrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
// At the same barrier of another block of the cluster.
__device__ __forceinline__ void barrier_arrive_at(Barrier* b, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(b)),
      "r"(rank)
      : "memory");
}
// Arrives, and says that `bytes` more are to come in this phase.
__device__ __forceinline__ void barrier_expect(Barrier* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
// Until the phase of that parity (the first has 0) is over: `parity` 1 passes a new barrier at once.
__device__ __forceinline__ void barrier_wait(Barrier* b, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\nbra again;\nover:\n}" ::"r"(shared_address(b)),
      "r"(parity)
      : "memory");
}

// ---- copies of tiles ("cp.async.bulk.tensor") -----------------------------------------------------------------------

// What this thread stored to shared memory, as seen by copies and products ("Async Proxy").
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The map's box at (column, row) to `to`; elements beyond the tensor are zeros. Its bytes, all of them, count at `b`.
__device__ __forceinline__ void copy_tile(void* to, const TensorMap& map, int column, int row, Barrier* b) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(b))
      : "memory");
}
// The same to the same place of each block of the cluster whose bit is set in `blocks`, counted at its own barrier.
__device__ __forceinline__ void copy_tile_to_all(void* to, const TensorMap& map, int column, int row, Barrier* b,
                                                 uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(b)), "h"(blocks)
      : "memory");
}

// ---- products of a warpgroup ("wgmma") ------------------------------------------------------------------------------

__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most the N latest groups of this warp are under way.
template <int N>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#define WRITESAE_F8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define WRITESAE_F32(i) WRITESAE_F8(i), WRITESAE_F8(i + 8), WRITESAE_F8(i + 16), WRITESAE_F8(i + 24)
#define WRITESAE_NAMES_32                                                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
  "%25, %26, %27, %28, %29, %30, %31"
#define WRITESAE_NAMES_64                                                                                                 \
  WRITESAE_NAMES_32                                                                                                       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, " \
  "%55, %56, %57, %58, %59, %60, %61, %62, %63"

// d [64, N] = a [64, 16] b [16, N], plus d where `add`; bf16, sums in float32. Both operands lie with k running fastest. Shares
// ("Register Fragments"): a warp has 16 rows; d[i] is row lane / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (lane % 4) + i % 2;
// an a in registers is a warp's 16 x 16 as mma_bf16 has it.
template <int N>
__device__ __forceinline__ void multiply_wide(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
  static_assert(N == 64 || N == 128, "columns for which there is an instruction here");
  if constexpr (N == 64) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{" WRITESAE_NAMES_32 "}, %32, %33, add, 1, 1, 0, 0;\n}"
        : WRITESAE_F32(0)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));
  } else {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{" WRITESAE_NAMES_64 "}, %64, %65, add, 1, 1, 0, 0;\n}"
        : WRITESAE_F32(0), WRITESAE_F32(32)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));
  }
}
template <int N>
__device__ __forceinline__ void multiply_wide(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(N == 64 || N == 128, "columns for which there is an instruction here");
  if constexpr (N == 64) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{" WRITESAE_NAMES_32 "}, {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}"
        : WRITESAE_F32(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
  } else {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{" WRITESAE_NAMES_64 "}, {%64, %65, %66, %67}, %68, add, 1, 1, 0;\n}"
        : WRITESAE_F32(0), WRITESAE_F32(32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
  }
}

#undef WRITESAE_F8
#undef WRITESAE_F32
#undef WRITESAE_NAMES_32
#undef WRITESAE_NAMES_64

#endif  // WRITESAE_HOPPER

// ---- of the host ----------------------------------------------------------------------------------------------------

// The driver's own function, without linking the driver.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result),
          "cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess || function == nullptr)
      throw std::runtime_error("cuTensorMapEncodeTiled: not found in this driver; CUDA 12.0 or newer is needed");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return found;
}

inline TensorMap encode_tensor_map(const void* data, const uint64_t (&size)[2], uint64_t row_bytes, const uint32_t (&box)[2],
                                   Swizzle swizzle) {
  TensorMap map;
  const cuuint64_t sizes[2] = {size[0], size[1]}, strides[1] = {row_bytes};
  const cuuint32_t boxes[2] = {box[0], box[1]}, steps[2] = {1, 1};
  const CUtensorMapSwizzle modes[4] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_SWIZZLE_64B,
                                       CU_TENSOR_MAP_SWIZZLE_32B};
  const CUresult result =
      tensor_map_encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes, strides, boxes, steps,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, modes[static_cast<int>(swizzle)],
                           CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
  return map;
}

// `launch` of clusters of so many blocks along x.
template <class... P, class... A>
void launch_cluster(const char* name, void (*kernel)(P...), Grid grid, int cluster, int threads, size_t shared,
                    Stream stream, const A&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  require_hopper(
      name, 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor));
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess || attributes.ptxVersion < 90)
    throw std::runtime_error(std::string(name) + ": this library was built without sm_90a (csrc/sources.py)");
  allow_shared(reinterpret_cast<const void*>(kernel), shared, name);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...), name);
}

}  // namespace writesae::tile

#else
#define WRITESAE_HOPPER 1
#include "host_twin_hopper.h"
#endif

// ---- made of the above, the same on both sides -----------------------------------------------------------------------

namespace writesae::tile {

#if WRITESAE_HOPPER

// `bytes` of a piece of shared memory from its first address that is a multiple of `boundary`; the piece has boundary - 128
// more.
template <int BOUNDARY>
__device__ __forceinline__ char* take_at_boundary(Shared& shared, int bytes) {
  char* piece = shared.take<char>(bytes + BOUNDARY - 128);
  return piece + (BOUNDARY - shared_address(piece) % BOUNDARY) % BOUNDARY;
}

// Describes an operand in shared memory ("Matrix Descriptor Format"), k running fastest. Swizzled: rows of swizzle_bytes, eight of
// them a block that begins at a multiple of its size, `stride` bytes from one block of eight rows to the next; `leading`
// means nothing, and 16 k further on begin 32 bytes further. Not swizzled: blocks of eight rows of 16 bytes, `leading` bytes
// from one to the next along k, `stride` along the rows.
__device__ __forceinline__ uint64_t describe(const void* p, uint32_t leading, uint32_t stride, Swizzle swizzle) {
  return (shared_address(p) & 0x3ffffu) >> 4 | static_cast<uint64_t>(leading >> 4 & 0x3fffu) << 16 |
         static_cast<uint64_t>(stride >> 4 & 0x3fffu) << 32 | static_cast<uint64_t>(swizzle) << 62;
}
// The same matrix further on in its rows.
__device__ __forceinline__ uint64_t advance(uint64_t description, uint32_t bytes) {
  const auto low = static_cast<uint32_t>(description) + (bytes >> 4);  // 32 bits: the address has no carry to give
  return (description >> 32 << 32) | low;
}

#endif

// Host: describes `rows` x `columns` of bf16 in global memory, rows `row_bytes` apart, to be copied in boxes of `box_rows` x
// `box_columns`, which lie row by row, swizzled. Throws std::runtime_error, naming `name`, where the unit cannot.
inline TensorMap tensor_map(const char* name, const void* data, int64_t rows, int64_t columns, int64_t row_bytes,
                            int box_rows, int box_columns, Swizzle swizzle) {
  const auto require = [&](bool holds, const std::string& what) {
    if (!holds) throw std::runtime_error(std::string(name) + ": " + what);
  };
  require(reinterpret_cast<uintptr_t>(data) % 16 == 0, "a tensor that TMA copies must begin at a multiple of 16 bytes");
  require(
      row_bytes % 16 == 0 && row_bytes > 0 && row_bytes < int64_t{1} << 40,
      "rows that TMA copies must be a multiple of 16 bytes apart (8 elements of bf16), got " + std::to_string(row_bytes));
  require(rows > 0 && rows <= int64_t{1} << 32 && columns > 0 && columns <= int64_t{1} << 32,
          "TMA copies from 1 to 2^32 rows and columns");
  require(box_rows > 0 && box_rows <= 256 && box_columns > 0 && box_columns <= 256,
          "a box of TMA has 1 to 256 rows, columns");
  const uint32_t box_bytes = static_cast<uint32_t>(box_columns) * 2;
  require(swizzle == Swizzle::none ? box_bytes % 16 == 0 : box_bytes == swizzle_bytes(swizzle),
          "rows of a box must be as long as its swizzle, or a multiple of 16 bytes without one");
  return encode_tensor_map(data, {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows)},
                           static_cast<uint64_t>(row_bytes),
                           {static_cast<uint32_t>(box_columns), static_cast<uint32_t>(box_rows)}, swizzle);
}

}  // namespace writesae::tile
