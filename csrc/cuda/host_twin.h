// tile.cuh on the host: the same kernels, run block by block, each thread a fiber with a stack of its own.
//
// A fiber runs until it must wait for others (a barrier, a shuffle, a matrix product), so that how far threads run ahead of
// each other is extreme, and is set by `Schedule`: in forward order warp 0 runs to the next barrier before warp 1 begins, in
// reverse order the last warp does. A kernel that lacks a barrier gives another result in one of the two.
// Caught, with the thread and the source line: threads that meet at different places or not at all, misaligned matrix loads
// and copies, more shared memory than was asked for at launch, copies nobody waited for. Every piece of shared memory is an
// allocation of its own, full of NaN, so that the address sanitizer sees the first byte past its end and an element that
// nobody wrote spoils the result. The target of an asynchronous copy is NaN until the copy is waited for.
// What this cannot show: PTX, timing. Sums inside matrix products are plain float sums, or cut off as the hardware's are
// (`Settings::truncating`, host_twin_units.cpp).
// It measures (`statistics`), by the name of a launch. Launches of several threads wait for each other, so that everything
// here is of one thread at a time; what reads or sets it from outside holds `lock`.
#pragma once

#include <cmath>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static_assert(false, "take shared memory through tile::Shared");
#define __forceinline__ inline
#define WRITESAE_NOINLINE __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__

#define WRITESAE_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace writesae::tile {

using Stream = void*;

namespace twin {

enum class Schedule { forward, reverse };

// What the kernels run on: an H100 unless told otherwise.
struct Machine {
  int multiprocessors = 132, architecture = 90;  // 80: rounds to tf32 with ties away from zero, and sums in shorter blocks
  size_t block_shared = 227 * 1024, processor_shared = 228 * 1024;  // bytes of shared memory
};

struct Settings {
  Schedule schedule = Schedule::forward;
  bool truncating = false;  // sums of matrix products are cut off as the machine's are
  Machine machine;
};

// Of the launches of one name. Rows of a matrix load that share banks cost a pass each: `conflicts` counts the passes beyond
// one. What kernels read and write by plain loads and stores is not seen.
struct Statistics {
  int64_t launches = 0, blocks = 0, barriers = 0;
  int64_t products = 0, multiply_adds = 0;                  // of matrix units
  int64_t matrix_loads = 0, conflicts = 0;                  // of 8 x 8 matrices
  int64_t copies = 0, copied_bytes = 0;                     // asynchronous: all, and what was read from global memory
  int64_t shared_bytes_read = 0, shared_bytes_written = 0;  // by matrix loads, by asynchronous copies
  int64_t shared_bytes_taken = 0, shared_bytes_asked = 0;   // by the block that took most, at the launch that asked most
  std::map<std::string, int64_t, std::less<>> own;          // what kernels `count`, and the bytes copied of what is watched
};

// Memory whose asynchronous copies are counted apart, under "bytes of <name>".
struct Watched {
  std::string name;
  const char* begin;
  size_t bytes;
};

extern std::mutex lock;  // not held inside a kernel's own thread
extern Settings settings;
extern std::map<std::string, Statistics> statistics;
extern std::vector<Watched> watched;

struct Place {
  const char* file;
  int line;
};

// ---- of the running thread ------------------------------------------------------------------------------------------

int thread();
int block_threads();
unsigned block(int axis);
unsigned grid(int axis);
void* take(size_t bytes);
void add_copy(void* to, const void* from, int bytes, bool valid, Place place);
void close_copies();
void finish_copies(size_t pending);

// Waits for the other lanes (or, `all`, for the other threads of the block). The last one to come runs act(args of all).
using Act = void (*)(void** args, int count);
void meet(bool all, const char* what, Place place, void* args, Act act);
void meet_named(int id, int threads, Place place);
[[noreturn]] void fail(const std::string& message, Place place);
[[noreturn]] void fail_of(const std::string& who, const std::string& message, Place place);  // no running thread's
Statistics& counts();                                                                        // of the running launch

// What goes on beside the threads of a cluster: see host_twin_hopper.cpp.
struct Beside {
  void (*begin)();        // before its threads
  bool (*advance)();      // no thread can go on: ends something that is under way; false if nothing is
  void (*thread_ends)();  // on the thread
  void (*end)();          // after the last thread
};

// Runs body(context) as every thread of every block. Blocks run one after another; those of a cluster (as many as `cluster`
// along x) together.
void run(const char* name, Grid grid, int threads, size_t shared, void (*body)(void*), void* context, int cluster = 1,
         const Beside* beside = nullptr);

// ---- for host_twin_hopper.cpp ---------------------------------------------------------------------------------------

int cluster_blocks();
int cluster_rank();                                                                   // of the running thread's block
bool ended(int rank);                                                                 // whether all threads of a block have
void meet_warpgroup(const char* what, Place place, void* args, Act act);              // four warps, the first divisible by 4
void meet_cluster(Place place);                                                       // all threads of all its blocks
void wait_until(bool (*holds)(void*), void* context, const char* what, Place place);  // asked again and again

// Shared memory as the device numbers it: a piece's first byte is a multiple of 128, and of no more by itself.
uint32_t shared_number(const void* p, Place place);
char* at_number(int rank, uint32_t number, size_t bytes, Place place);  // fails unless all of it is in one piece
struct Memory {
  char* data;
  size_t bytes;
};
Memory piece_of(const char* p);              // of any block of the cluster
void for_each_piece(void (*visit)(Memory));  // of the running thread's block

inline void check_alignment(const void* p, size_t bytes, const char* what, Place place) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    fail(std::string(what) + ": address not aligned to " + std::to_string(bytes) + " bytes", place);
}

// d [16][8] += a b, a [16][depth], b [depth][8], summed as `settings` say. What a matrix unit takes as tf32 is given cut to it.
void add_product(float* d, const float* a, const float* b, int depth);

void multiply_16(void** args, int count, bool half);
void multiply_tf32(void** args, int count);
void load_matrices(void** args, int count, int matrices, bool transposed);

}  // namespace twin

// ---- place ----------------------------------------------------------------------------------------------------------

inline int thread() { return twin::thread(); }
inline int block_threads() { return twin::block_threads(); }
inline int block_x() { return static_cast<int>(twin::block(0)); }
inline int block_y() { return static_cast<int>(twin::block(1)); }
inline int block_z() { return static_cast<int>(twin::block(2)); }
inline int grid_x() { return static_cast<int>(twin::grid(0)); }
inline int grid_y() { return static_cast<int>(twin::grid(1)); }

inline void count(const char* name, int64_t n = 1) { twin::counts().own[name] += n; }

class Shared {
 public:
  template <class T>
  T* take(int count) {
    return static_cast<T*>(twin::take(static_cast<size_t>(count) * sizeof(T)));
  }
};

class SharedBytes {
 public:
  explicit SharedBytes(void* p) : at_(static_cast<char*>(p)) {}
  template <class T>
  T* get(int bytes = 0) const {
    return reinterpret_cast<T*>(at_ + bytes);
  }

 private:
  char* at_;
};

// ---- barriers -------------------------------------------------------------------------------------------------------

inline void sync(WRITESAE_HERE) { twin::meet(true, "sync", {file, line}, nullptr, nullptr); }
inline void sync_warp(WRITESAE_HERE) { twin::meet(false, "sync_warp", {file, line}, nullptr, nullptr); }
inline void sync(int id, int threads, WRITESAE_HERE) { twin::meet_named(id, threads, {file, line}); }

// ---- between lanes --------------------------------------------------------------------------------------------------

namespace twin {
template <class T>
struct Exchange {
  T value, result;
  int from;
};

template <class T>
T exchange(T x, int from, const char* what, Place place) {
  Exchange<T> mine = {x, x, from};
  meet(false, what, place, &mine, [](void** args, int count) {
    for (int i = 0; i < count; i++) {
      auto* one = static_cast<Exchange<T>*>(args[i]);
      one->result = static_cast<Exchange<T>*>(args[one->from & (WARP - 1)])->value;
    }
  });
  return mine.result;
}
}  // namespace twin

template <class T>
inline T shuffle(T x, int from, WRITESAE_HERE) {
  return twin::exchange(x, from, "shuffle", {file, line});
}
template <class T>
inline T shuffle_xor(T x, int mask, WRITESAE_HERE) {
  return twin::exchange(x, (twin::thread() % WARP) ^ mask, "shuffle_xor", {file, line});
}
template <class T>
inline T shuffle_up(T x, int step, WRITESAE_HERE) {
  const int lane = twin::thread() % WARP;
  return twin::exchange(x, lane < step ? lane : lane - step, "shuffle_up", {file, line});
}
inline uint32_t ballot(bool x, WRITESAE_HERE) {
  struct Vote {
    uint32_t bits;
  } mine = {x};
  twin::meet(false, "ballot", {file, line}, &mine, [](void** args, int count) {
    uint32_t bits = 0;
    for (int i = 0; i < count; i++) bits |= static_cast<Vote*>(args[i])->bits << i;
    for (int i = 0; i < count; i++) static_cast<Vote*>(args[i])->bits = bits;
  });
  return mine.bits;
}
inline int count_bits(uint32_t x) { return __builtin_popcount(x); }
inline int count_bits(unsigned long long x) { return __builtin_popcountll(x); }
inline int lowest_bit(uint32_t x) { return __builtin_ctz(x); }
inline int highest_bit(uint32_t x) { return 31 - __builtin_clz(x); }
inline bool any(bool x, WRITESAE_HERE) { return ballot(x, file, line) != 0; }
inline int warp_max(int x, WRITESAE_HERE) {
  for (int step = 1; step < WARP; step *= 2) {
    const int other = shuffle_xor(x, step, file, line);
    x = other > x ? other : x;
  }
  return x;
}

// ---- atomics --------------------------------------------------------------------------------------------------------

template <class T>
inline T atomic_add(T* p, T x) {
  const T before = *p;
  *p = before + x;
  return before;
}
template <class T>
inline T atomic_max(T* p, T x) {
  const T before = *p;
  if (x > before) *p = x;
  return before;
}
template <class T>
inline T atomic_min(T* p, T x) {
  const T before = *p;
  if (x < before) *p = x;
  return before;
}
template <class T>
inline T atomic_exchange(T* p, T x) {
  const T before = *p;
  *p = x;
  return before;
}

// ---- numbers --------------------------------------------------------------------------------------------------------

inline float bits_to_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline uint32_t float_to_bits(float x) {
  uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
float to_float(f16 x);
bf16 to_bf16(float x);
f16 to_f16(float x);
inline uint32_t pack_bf16(float low, float high) {
  return to_bf16(low).bits | static_cast<uint32_t>(to_bf16(high).bits) << 16;
}
inline uint32_t pack_f16(float low, float high) { return to_f16(low).bits | static_cast<uint32_t>(to_f16(high).bits) << 16; }
uint32_t to_tf32(float x);
inline uint32_t append_below(uint32_t bits, float x, float height) { return bits << 1 | (x < height ? 1u : 0u); }
inline float exponential(float x) { return std::exp(x); }
inline float round_to_whole(float x) { return std::rint(x); }
inline float reciprocal_root(float x) { return 1.0f / std::sqrt(x); }

inline int fresh(int x) { return x; }
inline int64_t fresh(int64_t x) { return x; }
inline float fresh(float x) { return x; }

// ---- matrix products; shares as tile_device.cuh has them ------------------------------------------------------------

namespace twin {
struct Product {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};
struct MatrixLoad {
  uint32_t* r;
  const void* row;
  Place place;
};
template <int MATRICES, bool TRANSPOSED>
inline void load(uint32_t* r, const void* row, Place place) {
  if (thread() % WARP < 8 * MATRICES) check_alignment(row, 16, "load_matrices", place);
  MatrixLoad mine = {r, row, place};
  meet(false, "load_matrices", place, &mine,
       [](void** args, int count) { load_matrices(args, count, MATRICES, TRANSPOSED); });
}
}  // namespace twin

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], WRITESAE_HERE) {
  twin::Product mine = {d, a, b};
  twin::meet(false, "mma_bf16", {file, line}, &mine, [](void** args, int n) { twin::multiply_16(args, n, false); });
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], WRITESAE_HERE) {
  twin::Product mine = {d, a, b};
  twin::meet(false, "mma_f16", {file, line}, &mine, [](void** args, int n) { twin::multiply_16(args, n, true); });
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], WRITESAE_HERE) {
  twin::Product mine = {d, a, b};
  twin::meet(false, "mma_tf32", {file, line}, &mine, [](void** args, int n) { twin::multiply_tf32(args, n); });
}
inline void load_matrices(uint32_t (&r)[4], const void* row, WRITESAE_HERE) { twin::load<4, false>(r, row, {file, line}); }
inline void load_matrices(uint32_t (&r)[2], const void* row, WRITESAE_HERE) { twin::load<2, false>(r, row, {file, line}); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row, WRITESAE_HERE) {
  twin::load<4, true>(r, row, {file, line});
}
inline void load_matrices_transposed(uint32_t (&r)[2], const void* row, WRITESAE_HERE) {
  twin::load<2, true>(r, row, {file, line});
}

// ---- asynchronous copies --------------------------------------------------------------------------------------------

inline void copy_16(void* to, const void* from, bool valid = true, WRITESAE_HERE) {
  twin::add_copy(to, from, 16, valid, {file, line});
}
inline void copy_4(void* to, const void* from, bool valid = true, WRITESAE_HERE) {
  twin::add_copy(to, from, 4, valid, {file, line});
}
inline void commit_copies() { twin::close_copies(); }
template <int N>
inline void wait_copies() {
  twin::finish_copies(N);
}

// ---- launch ---------------------------------------------------------------------------------------------------------

inline int multiprocessors() { return twin::settings.machine.multiprocessors; }
inline size_t shared_limit() { return twin::settings.machine.block_shared; }
inline size_t processor_shared() { return twin::settings.machine.processor_shared; }

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), Grid grid, int threads, size_t shared, Stream, const A&... args) {
  auto call = [&] { kernel(static_cast<P>(args)...); };
  twin::run(name, grid, threads, shared, [](void* context) { (*static_cast<decltype(call)*>(context))(); }, &call);
}

inline void read(void* to, const void* from, size_t bytes, Stream) { std::memcpy(to, from, bytes); }
inline void fill(void* p, int byte, size_t bytes, Stream) { std::memset(p, byte, bytes); }
inline void zero(void* p, size_t bytes, Stream stream) { fill(p, 0, bytes, stream); }

}  // namespace writesae::tile
