// tile_hopper.cuh on the host: a model of wgmma, TMA, mbarriers and clusters that is stricter than the hardware is fast.
//
// What is under way ends as late as it may. Products end when they are waited for. Copies of tiles end, in forward order, one
// at a time and only when no thread can go on; in reverse order at once. Whatever must not be touched meanwhile is spoilt
// or watched:
//  - accumulators are NaN until they are waited for, and a fault if they are written; operands, in registers and in shared
//    memory, a fault if they differ at the end from what they were at the beginning;
//  - the target of a copy is NaN from its beginning to its end; it is a fault to begin one over operands of a product under
//    way, over another copy, to read it in a product, or to write it;
//  - copies and products see shared memory as it was at the last `fence_async` of the block: where plain stores have come since,
//    a fault. (A store that lacks its own fence passes if another thread's follows it in both orders.)
//  - barriers count arrivals and bytes; more of either than expected, one that was never made or that something wrote over,
//    one that copies do not know of yet (`fence_barriers`), are faults. Who waits for the wrong phase waits for ever, which is
//    a fault, or goes on too early, and then reads NaN or what it must not;
//  - a thread that ends with products not waited for, a block that ends with copies or arrivals still on the way to it.
// Descriptors are read bit by bit, and addresses are those of the device's numbering of shared memory, whose pieces begin at
// multiples of 128 and no more, so that a tile that lies off its swizzle's boundary is seen. A warp's products are its own to
// wait for: another warp's wait gives it nothing.
// What this cannot show: PTX, time, what a descriptor with a base offset means (refused).
#pragma once

namespace writesae::tile {

// What the driver encodes on a device.
struct TensorMap {
  const char* data;
  uint64_t size[2], row_bytes;  // columns, rows
  uint32_t box[2];
  Swizzle swizzle;
};

namespace twin {

void barrier_init(Barrier* b, int count, Place place);
void fence_barriers();
void barrier_arrive(Barrier* b, int rank, int64_t expected, Place place);  // rank -1: this block's
void barrier_wait(Barrier* b, int parity, Place place);
void fence_async();
void copy_tile(void* to, const TensorMap& map, int column, int row, Barrier* b, uint32_t blocks, Place place);
void products_fence(Place place);
void products_commit(Place place);
void products_wait(int pending, Place place);
struct Wide {  // one thread's part
  float* d;
  int columns;
  const uint32_t* a;  // or null, and a description
  uint64_t a_description, b;
  bool add;
  Place place;
};
void multiply_wide(const Wide& part);
void change_registers(int each, bool up, Place place);

}  // namespace twin

inline uint32_t shared_address(const void* p, WRITESAE_HERE) { return twin::shared_number(p, {file, line}); }
inline int cluster_rank() { return twin::cluster_rank(); }
inline void cluster_sync(WRITESAE_HERE) { twin::meet_cluster({file, line}); }

template <int N>
inline void registers_down(WRITESAE_HERE) {
  twin::change_registers(N, false, {file, line});
}
template <int N>
inline void registers_up(WRITESAE_HERE) {
  twin::change_registers(N, true, {file, line});
}

inline void barrier_init(Barrier* b, int count, WRITESAE_HERE) { twin::barrier_init(b, count, {file, line}); }
inline void fence_barriers() { twin::fence_barriers(); }
inline void barrier_arrive(Barrier* b, WRITESAE_HERE) { twin::barrier_arrive(b, -1, 0, {file, line}); }
inline void barrier_arrive_at(Barrier* b, int rank, WRITESAE_HERE) { twin::barrier_arrive(b, rank, 0, {file, line}); }
inline void barrier_expect(Barrier* b, int bytes, WRITESAE_HERE) { twin::barrier_arrive(b, -1, bytes, {file, line}); }
inline void barrier_wait(Barrier* b, int parity, WRITESAE_HERE) { twin::barrier_wait(b, parity, {file, line}); }

inline void fence_async() { twin::fence_async(); }
inline void copy_tile(void* to, const TensorMap& map, int column, int row, Barrier* b, WRITESAE_HERE) {
  twin::copy_tile(to, map, column, row, b, 1u << cluster_rank(), {file, line});
}
inline void copy_tile_to_all(void* to, const TensorMap& map, int column, int row, Barrier* b, uint16_t blocks,
                             WRITESAE_HERE) {
  twin::copy_tile(to, map, column, row, b, blocks, {file, line});
}

inline void products_fence(WRITESAE_HERE) { twin::products_fence({file, line}); }
inline void products_commit(WRITESAE_HERE) { twin::products_commit({file, line}); }
template <int N>
inline void products_wait(WRITESAE_HERE) {
  twin::products_wait(N, {file, line});
}
template <int N>
inline void multiply_wide(float (&d)[N / 2], uint64_t a, uint64_t b, bool add, WRITESAE_HERE) {
  static_assert(N == 64 || N == 128, "columns for which there is an instruction here");
  twin::multiply_wide({d, N, nullptr, a, b, add, {file, line}});
}
template <int N>
inline void multiply_wide(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add, WRITESAE_HERE) {
  static_assert(N == 64 || N == 128, "columns for which there is an instruction here");
  twin::multiply_wide({d, N, a, 0, b, add, {file, line}});
}

// ---- of the host ----------------------------------------------------------------------------------------------------

inline TensorMap encode_tensor_map(const void* data, const uint64_t (&size)[2], uint64_t row_bytes, const uint32_t (&box)[2],
                                   Swizzle swizzle) {
  return {static_cast<const char*>(data), {size[0], size[1]}, row_bytes, {box[0], box[1]}, swizzle};
}

namespace twin {
extern const Beside hopper;
}
template <class... P, class... A>
void launch_cluster(const char* name, void (*kernel)(P...), Grid grid, int cluster, int threads, size_t shared, Stream,
                    const A&... args) {
  require_hopper(name, twin::settings.machine.architecture);
  auto call = [&] { kernel(static_cast<P>(args)...); };
  twin::run(
      name, grid, threads, shared, [](void* context) { (*static_cast<decltype(call)*>(context))(); }, &call, cluster,
      &twin::hopper);
}

}  // namespace writesae::tile
