// The twin's model of Hopper: products of a warpgroup against plain loops in every layout, copies of tiles with their zeros,
// clusters, and that each planted fault is found in at least one of the two orders.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cuda/tile_hopper.cuh"

namespace {

namespace tile = writesae::tile;
using tile::Swizzle;
using tile::twin::Schedule;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "check_host_twin_hopper: %s\n", what.c_str());
  std::exit(1);
}

void in_order(Schedule schedule, const std::function<void()>& run) {
  tile::twin::settings.schedule = schedule;
  run();
  tile::twin::settings.schedule = Schedule::forward;
}

// What a launch fails with in each order, "" where it does not.
std::vector<std::string> faults(const std::function<void()>& run) {
  std::vector<std::string> found;
  for (Schedule schedule : {Schedule::forward, Schedule::reverse}) {
    found.emplace_back();
    try {
      in_order(schedule, run);
    } catch (const std::runtime_error& error) {
      found.back() = error.what();
    }
  }
  tile::twin::settings.schedule = Schedule::forward;
  return found;
}

void expect_fault(const std::string& part, const std::function<void()>& run) {
  const auto found = faults(run);
  expect(found[0].find(part) != std::string::npos || found[1].find(part) != std::string::npos,
         "expected a fault with \"" + part + "\", got \"" + found[0] + "\" and \"" + found[1] + "\"");
}

using Numbers = std::vector<uint16_t>;  // bf16

Numbers normal(int n) {
  static std::mt19937 generator(0);
  std::normal_distribution<float> distribution;
  Numbers x(n);
  for (auto& value : x) value = tile::to_bf16(distribution(generator)).bits;
  return x;
}

float number(uint16_t bits) { return tile::to_float(tile::bf16{bits}); }

// ---- products -------------------------------------------------------------------------------------------------------

constexpr int M = 64, K = 64, LEFT_OUT = 3;  // rows of a, depth; rows and columns of the tensors that are not there

// What is done wrong in `product`.
enum Fault {
  none,
  no_wait_for_barrier,
  wrong_parity,
  no_fence_of_barriers,
  no_meeting,
  no_products_fence,
  no_products_wait,
  accumulators_read,
  accumulators_written,
  registers_written,
  operand_stored,
  operand_copied,
  other_swizzle,
  copied_without_swizzle,
  too_few_bytes,
  too_many_bytes,
  two_arrivals,
  off_boundary,
  three_warps,
  base_offset,
  beyond_the_row,
  barrier_overwritten,
  other_shape,
};

constexpr int box_columns(Swizzle s) { return s == Swizzle::none ? 8 : static_cast<int>(tile::swizzle_bytes(s)) / 2; }

// d [64, N] = a b^T of a [64, K], b [N, K], copied box by box by a thread of a fifth warp. From registers: a comes from its
// place in global memory.
template <int N, Swizzle S, bool REGISTERS, Fault FAULT>
__global__ void product(const __grid_constant__ tile::TensorMap map_a, const __grid_constant__ tile::TensorMap map_b,
                        const uint16_t* a_numbers, float* out) {
  constexpr int COLUMNS = box_columns(S), BOXES = K / COLUMNS, A_BOX = M * COLUMNS * 2, B_BOX = N * COLUMNS * 2;
  tile::Shared shared;
  char* a = tile::take_at_boundary<1024>(shared, BOXES * A_BOX + 1024);
  char* b = tile::take_at_boundary<1024>(shared, BOXES * B_BOX);
  auto* full = shared.take<tile::Barrier>(1);
  if (FAULT == off_boundary) a += 128;
  const bool producer = tile::warp() == 4 && tile::lane() == 0;
  if (producer) {
    tile::barrier_init(full, 1);
    if (FAULT != no_fence_of_barriers) tile::fence_barriers();
  }
  if (FAULT != no_meeting) tile::sync();
  const auto copy = [&] {
    constexpr int BYTES = BOXES * (A_BOX + B_BOX);
    tile::barrier_expect(full, FAULT == too_few_bytes ? BYTES - 16 : FAULT == too_many_bytes ? BYTES + 16 : BYTES);
    if (FAULT == two_arrivals) tile::barrier_arrive(full);
    for (int i = 0; i < BOXES; i++) {
      tile::copy_tile(a + i * A_BOX, map_a, i * COLUMNS, 0, full);
      tile::copy_tile(b + i * B_BOX, map_b, i * COLUMNS, 0, full);
    }
  };
  if (producer) copy();
  if (FAULT == barrier_overwritten && tile::thread() == 0) full->bits = 0;
  if (tile::warp() < 4) {
    if (FAULT != no_wait_for_barrier) tile::barrier_wait(full, FAULT == wrong_parity ? 1 : 0);
    if (FAULT == three_warps && tile::warp() == 3) return;
    constexpr auto READ_AS = FAULT == other_swizzle ? Swizzle::bytes_64 : S;
    float d[N / 2];
    uint32_t fragments[K / 16][4];
    if (REGISTERS)
      for (int k = 0; k < K / 16; k++)
        for (int r = 0; r < 4; r++) {
          const int row = 16 * tile::warp() + tile::lane() / 4 + 8 * (r % 2);
          const int column = 16 * k + 2 * (tile::lane() % 4) + 8 * (r / 2);
          fragments[k][r] = 0;
          for (int j = 0; j < 2; j++)
            if (row < M - LEFT_OUT && column + j < K - LEFT_OUT)
              fragments[k][r] |= static_cast<uint32_t>(a_numbers[row * K + column + j]) << (16 * j);
        }
    if (FAULT != no_products_fence) tile::products_fence();
    for (int k = 0; k < K; k += 16) {
      const int box = k / COLUMNS, within = k % COLUMNS * 2;
      // Eight rows of a box follow each other; without a swizzle a box is eight columns.
      uint64_t db = tile::describe(b + box * B_BOX, B_BOX, 8 * COLUMNS * 2, READ_AS);
      uint64_t da = tile::describe(a + box * A_BOX, A_BOX, 8 * COLUMNS * 2, READ_AS);
      if (FAULT == base_offset) da |= uint64_t{1} << 49;
      da = tile::advance(da, FAULT == beyond_the_row ? within + 16 : within);
      db = tile::advance(db, within);
      if constexpr (REGISTERS)
        tile::multiply_wide<N>(d, fragments[k / 16], db, k > 0);
      else
        tile::multiply_wide<N>(d, da, db, k > 0);
    }
    if constexpr (FAULT == other_shape && N == 128)
      tile::multiply_wide<64>(reinterpret_cast<float (&)[32]>(d), tile::describe(a, A_BOX, 8 * COLUMNS * 2, S),
                              tile::describe(b, B_BOX, 8 * COLUMNS * 2, S), true);
    tile::products_commit();
    float early = 0;
    if (FAULT == accumulators_read) early = d[5];
    if (FAULT == accumulators_written) d[5] = 1;
    if (FAULT == registers_written) fragments[1][2]++;
    if (FAULT == operand_stored && tile::thread() == 77) b[33] ^= 1;
    if (FAULT == operand_copied && tile::thread() == 0) tile::copy_tile(a, map_a, 0, 0, full);
    if (FAULT != no_products_wait) tile::products_wait<0>();
    for (int i = 0; i < N / 2; i++) {
      const int row = 16 * tile::warp() + tile::lane() / 4 + 8 * (i / 2 % 2),
                column = 8 * (i / 4) + 2 * (tile::lane() % 4) + i % 2;
      out[row * N + column] = FAULT == accumulators_read && i == 5 ? early : d[i];
    }
  }
}

// Whether the result is right in the order that is set; faults are thrown.
template <int N, Swizzle S, bool REGISTERS = false, Fault FAULT = none>
bool run_product() {
  const auto a = normal(M * K), b = normal(N * K);
  std::vector<float> d(static_cast<size_t>(M) * N, NAN);
  const auto map = [&](const Numbers& x, int rows, int left_out) {
    return tile::tensor_map("check", x.data(), rows - left_out, K - LEFT_OUT, K * 2, rows, box_columns(S),
                            FAULT == copied_without_swizzle ? Swizzle::none : S);
  };
  const size_t shared = tile::shared_piece(M * K * 2 + 2048) + tile::shared_piece(N * K * 2 + 1024) + 128;
  tile::launch_cluster("product", product<N, S, REGISTERS, FAULT>, {1, 1, 1}, 1, 160, shared, nullptr, map(a, M, LEFT_OUT),
                       map(b, N, 0), a.data(), d.data());
  bool right = true;
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) {
      double sum = 0, size = 1e-30;
      for (int k = 0; k < K - LEFT_OUT && i < M - LEFT_OUT; k++) {
        const double one = double{number(a[i * K + k])} * number(b[j * K + k]);
        sum += one, size += std::fabs(one);
      }
      right = right && std::fabs(d[static_cast<size_t>(i) * N + j] - sum) <= 1e-6 * size;
    }
  return right;
}

template <int N, Swizzle S>
void check_products() {
  for (Schedule schedule : {Schedule::forward, Schedule::reverse})
    in_order(schedule, [] {
      const std::string what = "a product of N = " + std::to_string(N) + ", swizzle " + std::to_string(static_cast<int>(S));
      expect(run_product<N, S>(), what + " is wrong");
      expect(run_product<N, S, true>(), what + ", a in registers, is wrong");
    });
}

template <Fault FAULT, bool REGISTERS = false>
void expect_fault_in_product(const std::string& part) {
  expect_fault(part, [] { run_product<128, Swizzle::bytes_128, REGISTERS, FAULT>(); });
}

void check_planted() {
  expect_fault_in_product<no_wait_for_barrier>("is the target of a copy that is under way");
  expect_fault_in_product<wrong_parity>("is the target of a copy that is under way");
  expect_fault_in_product<no_fence_of_barriers>("a barrier that copies do not know of");
  expect_fault_in_product<no_meeting>("a barrier that was never made");
  expect_fault_in_product<no_products_fence>("without products_fence");
  expect_fault_in_product<no_products_wait>("a product is never waited for");
  expect_fault_in_product<accumulators_written>("accumulators were written while a product was under way");
  expect_fault_in_product<registers_written, true>("an operand in registers was written");
  expect_fault_in_product<operand_stored>("an operand in shared memory was written while a product");
  expect_fault_in_product<operand_copied>("over an operand of a product that is under way");
  expect_fault_in_product<too_few_bytes>("more bytes reach a barrier than it expects");
  expect_fault_in_product<too_many_bytes>("waits at barrier_wait, parity 0");
  expect_fault_in_product<two_arrivals>("more arrivals than the barrier counts");
  expect_fault_in_product<off_boundary>("at a multiple of 1024");
  expect_fault_in_product<three_warps>("waits at multiply_wide");
  expect_fault_in_product<other_swizzle>("rows swizzled by 64 bytes at a multiple of 512");
  expect_fault_in_product<base_offset>("a base offset");
  expect_fault_in_product<beyond_the_row>("leave a row of 128");
  expect_fault_in_product<barrier_overwritten>("a barrier that something else wrote over");
  expect_fault_in_product<other_shape>("another shape is under way in these accumulators");
  for (Schedule schedule : {Schedule::forward, Schedule::reverse})
    in_order(schedule, [] {
      expect(!run_product<128, Swizzle::bytes_128, false, copied_without_swizzle>(), "another swizzle goes unseen");
      expect(!run_product<128, Swizzle::bytes_128, false, accumulators_read>(), "accumulators read early go unseen");
    });
}

// ---- plain stores, and what products see of them ---------------------------------------------------------------------

// a = b = the identity, written by all threads.
template <bool FENCE>
__global__ void stored(float* out) {
  tile::Shared shared;
  char* a = tile::take_at_boundary<1024>(shared, 64 * 128);
  for (int i = tile::thread(); i < 64 * 64; i += tile::block_threads()) {
    const uint32_t at = tile::swizzled(static_cast<uint32_t>(i / 64 * 128 + i % 64 * 2), Swizzle::bytes_128);
    *reinterpret_cast<uint16_t*>(a + at) = tile::to_bf16(i / 64 == i % 64 ? 1.0f : 0.0f).bits;
  }
  if (FENCE) tile::fence_async();
  tile::sync();
  float d[32];
  tile::products_fence();
  for (int k = 0; k < 4; k++) {
    const uint64_t x = tile::advance(tile::describe(a, 0, 1024, Swizzle::bytes_128), 32 * k);
    tile::multiply_wide<64>(d, x, x, k > 0);
  }
  tile::products_commit();
  tile::products_wait<0>();
  for (int i = 0; i < 32; i++)
    out[(16 * tile::warp() + tile::lane() / 4 + 8 * (i / 2 % 2)) * 64 + 8 * (i / 4) + 2 * (tile::lane() % 4) + i % 2] = d[i];
}

// A warp that waited says so for all four: the others' products may still read.
template <bool OWN>
__global__ void reused(float* out) {
  tile::Shared shared;
  char* a = tile::take_at_boundary<1024>(shared, 64 * 128);
  auto* released = shared.take<tile::Barrier>(1);
  for (int i = tile::thread(); i < 64 * 128; i += tile::block_threads()) a[i] = 0;
  if (tile::thread() == 0) tile::barrier_init(released, OWN ? 4 : 1);
  tile::fence_async();
  tile::sync();
  if (tile::warp() < 4) {
    float d[32];
    tile::products_fence();
    const uint64_t x = tile::describe(a, 0, 1024, Swizzle::bytes_128);
    tile::multiply_wide<64>(d, x, x, false);
    tile::products_commit();
    tile::products_wait<0>();
    if (tile::lane() == 0 && (OWN || tile::warp() == 0)) tile::barrier_arrive(released);
    out[tile::thread()] = d[0];
  } else {
    tile::barrier_wait(released, 0);
    a[tile::lane()] = 1;
  }
}

// ---- clusters --------------------------------------------------------------------------------------------------------

constexpr int TILE = 32 * 128;

// Each of two blocks copies half of a tile to both; then each block has the whole, and says so to the other.
template <bool WAIT, bool SYNC>
__global__ void shared_out(const __grid_constant__ tile::TensorMap map, uint16_t* out) {
  tile::Shared shared;
  char* whole = tile::take_at_boundary<1024>(shared, TILE);
  auto* barriers = shared.take<tile::Barrier>(2);
  const int rank = tile::cluster_rank();
  if (tile::thread() == 0) {
    tile::barrier_init(barriers, 1);
    tile::barrier_init(barriers + 1, 2);
    tile::fence_barriers();
  }
  if (SYNC)
    tile::cluster_sync();
  else
    tile::sync();
  if (tile::thread() == 0) {
    tile::barrier_expect(barriers, TILE);
    tile::copy_tile_to_all(whole + rank * TILE / 2, map, 0, 16 * rank, barriers, 3);
  }
  tile::barrier_wait(barriers, 0);
  for (int i = tile::thread(); i < TILE / 2; i += tile::block_threads()) {
    const auto* from = whole + tile::swizzled(static_cast<uint32_t>(2 * i), Swizzle::bytes_128);
    out[tile::block_x() * (TILE / 2) + i] = *reinterpret_cast<const uint16_t*>(from);
  }
  if (tile::thread() == 0)
    for (int other = 0; other < 2; other++) tile::barrier_arrive_at(barriers + 1, other);
  if (WAIT) tile::barrier_wait(barriers + 1, 0);
}

template <bool WAIT = true, bool SYNC = true>
void run_cluster() {
  const auto x = normal(32 * 64);
  Numbers out(2 * 32 * 64);
  tile::launch_cluster("shared_out", shared_out<WAIT, SYNC>, {2, 1, 1}, 2, 32, tile::shared_piece(TILE + 1024) + 128,
                       nullptr, tile::tensor_map("check", x.data(), 32, 64, 128, 16, 64, Swizzle::bytes_128), out.data());
  for (int block = 0; block < 2; block++)
    for (int i = 0; i < 32 * 64; i++) expect(out[block * 32 * 64 + i] == x[i], "a tile copied to a cluster is wrong");
}

// ---- registers -------------------------------------------------------------------------------------------------------

template <bool DOWN>
__global__ void registers() {
  if (tile::warp() < 4) {
    if (DOWN) tile::registers_down<40>();
  } else {
    tile::registers_up<232>();
  }
}

void refuses(const std::string& part, const std::function<void()>& run) {
  try {
    run();
  } catch (const std::runtime_error& error) {
    expect(std::string(error.what()).find(part) != std::string::npos, "refused with \"" + std::string(error.what()) + "\"");
    return;
  }
  expect(false, "not refused: " + part);
}

void check_maps() {
  const auto x = normal(64 * 64);
  const auto map = [&](int64_t row_bytes, int box, Swizzle swizzle, int off = 0) {
    return [=, &x] { tile::tensor_map("v", x.data() + off, 64, 64, row_bytes, 64, box, swizzle); };
  };
  refuses("v: rows that TMA copies must be a multiple of 16 bytes apart", map(126, 64, Swizzle::bytes_128));
  refuses("v: a tensor that TMA copies must begin at a multiple of 16 bytes", map(128, 64, Swizzle::bytes_128, 1));
  refuses("v: rows of a box must be as long as its swizzle", map(128, 64, Swizzle::bytes_64));
  refuses("v: a box of TMA has 1 to 256", map(128, 512, Swizzle::none));
}

}  // namespace

int main() {
  check_products<64, Swizzle::none>();
  check_products<64, Swizzle::bytes_32>();
  check_products<128, Swizzle::bytes_64>();
  check_products<128, Swizzle::bytes_128>();
  check_planted();
  std::vector<float> out(64 * 64);
  for (Schedule schedule : {Schedule::forward, Schedule::reverse})
    in_order(schedule, [&] {
      const size_t shared = tile::shared_piece(64 * 128 + 1024) + 128;
      tile::launch_cluster("stored", stored<true>, {1, 1, 1}, 1, 128, shared, nullptr, out.data());
      for (int i = 0; i < 64 * 64; i++) expect(out[i] == (i / 64 == i % 64 ? 1.0f : 0.0f), "a product of what was stored");
      tile::launch_cluster("reused", reused<true>, {1, 1, 1}, 1, 160, shared, nullptr, out.data());
      run_cluster();
      tile::launch_cluster("registers", registers<true>, {1, 1, 1}, 1, 384, 0, nullptr);
    });
  const size_t shared = tile::shared_piece(64 * 128 + 1024) + 128;
  expect_fault("without fence_async",
               [&] { tile::launch_cluster("stored", stored<false>, {1, 1, 1}, 1, 128, shared, nullptr, out.data()); });
  expect_fault("an operand in shared memory was written while a product",
               [&] { tile::launch_cluster("reused", reused<false>, {1, 1, 1}, 1, 160, shared, nullptr, out.data()); });
  expect_fault("of the cluster has ended", [] { run_cluster<false>(); });
  expect_fault("no piece of block", [] { run_cluster<true, false>(); });
  expect_fault("waits at registers_up",
               [] { tile::launch_cluster("registers", registers<false>, {1, 1, 1}, 1, 384, 0, nullptr); });
  check_maps();
  std::printf("check_host_twin_hopper: all hold\n");
  return 0;
}
