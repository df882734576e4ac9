// The host twin itself: its matrix products and loads against plain loops, its meeting points, and that it catches faults.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cuda/tile.cuh"

namespace {

namespace tile = writesae::tile;
using tile::twin::Schedule;
using tile::twin::settings;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "check_host_twin: %s\n", what.c_str());
  std::exit(1);
}

void expect_fault(const std::string& part, const std::function<void()>& run) {
  for (Schedule schedule : {Schedule::forward, Schedule::reverse}) {
    settings.schedule = schedule;
    try {
      run();
    } catch (const std::runtime_error& error) {
      expect(std::string(error.what()).find(part) != std::string::npos,
             "expected a fault with \"" + part + "\", got \"" + error.what() + "\"");
      continue;
    }
    expect(false, "no fault where \"" + part + "\" was planted");
  }
  settings.schedule = Schedule::forward;
}

std::vector<float> normal(int n) {
  static std::mt19937 generator(0);
  std::normal_distribution<float> distribution;
  std::vector<float> x(n);
  for (float& value : x) value = distribution(generator);
  return x;
}

// ---- products -------------------------------------------------------------------------------------------------------

constexpr int M = 32, N = 24, K = 48;  // two warps, three column tiles

enum class Kind { bf16, f16, tf32 };

// d [M, N] = a [M, K] b [K, N], row-major, through shared memory and matrix loads (16 bits) or plain loads (tf32).
template <Kind KIND>
__global__ void product(const float* a, const float* b, float* d) {
  tile::Shared shared;
  constexpr int STRIDE_A = K + 8, STRIDE_B = N + 16;  // rows apart by an odd number of 16-byte units: no bank conflicts
  auto* sa = shared.take<uint16_t>(M * STRIDE_A);
  auto* sb = shared.take<uint16_t>(K * STRIDE_B);
  const auto narrow = [](float x) { return KIND == Kind::f16 ? tile::to_f16(x).bits : tile::to_bf16(x).bits; };
  for (int i = tile::thread(); i < M * K; i += tile::block_threads()) sa[i / K * STRIDE_A + i % K] = narrow(a[i]);
  for (int i = tile::thread(); i < K * N; i += tile::block_threads()) sb[i / N * STRIDE_B + i % N] = narrow(b[i]);
  tile::sync();
  const int lane = tile::lane(), row = 16 * tile::warp();
  for (int n = 0; n < N; n += 8) {
    float sum[4] = {};
    if constexpr (KIND == Kind::tf32) {
      for (int k = 0; k < K; k += 8) {
        const int g = lane / 4, c = lane % 4;
        const uint32_t x[4] = {tile::to_tf32(a[(row + g) * K + k + c]), tile::to_tf32(a[(row + g + 8) * K + k + c]),
                               tile::to_tf32(a[(row + g) * K + k + c + 4]), tile::to_tf32(a[(row + g + 8) * K + k + c + 4])};
        const uint32_t y[2] = {tile::to_tf32(b[(k + c) * N + n + g]), tile::to_tf32(b[(k + c + 4) * N + n + g])};
        tile::mma_tf32(sum, x, y);
      }
    } else {
      for (int k = 0; k < K; k += 16) {
        uint32_t x[4], y[2];
        tile::load_matrices(x, sa + (row + lane % 16) * STRIDE_A + k + lane / 16 * 8);
        tile::load_matrices_transposed(y, sb + (k + lane % 16) * STRIDE_B + n);
        KIND == Kind::f16 ? tile::mma_f16(sum, x, y) : tile::mma_bf16(sum, x, y);
      }
    }
    for (int i = 0; i < 4; i++)
      d[(row + tile::accumulator_row(i / 2)) * N + n + tile::accumulator_column() + i % 2] = sum[i];
  }
}

template <Kind KIND>
void check_product(double tolerance) {
  const auto a = normal(M * K), b = normal(K * N);
  const size_t shared = (M * (K + 8) * 2 + 127) / 128 * 128 + (K * (N + 16) * 2 + 127) / 128 * 128;
  for (Schedule schedule : {Schedule::forward, Schedule::reverse}) {
    settings.schedule = schedule;
    tile::twin::statistics.clear();
    std::vector<float> d(M * N, NAN);
    tile::launch("product", product<KIND>, {1, 1, 1}, 64, shared, nullptr, a.data(), b.data(), d.data());
    for (int i = 0; i < M; i++)
      for (int j = 0; j < N; j++) {
        double sum = 0, size = 0;
        for (int k = 0; k < K; k++)
          sum += static_cast<double>(a[i * K + k]) * b[k * N + j], size += std::fabs(a[i * K + k] * b[k * N + j]);
        expect(std::fabs(d[i * N + j] - sum) <= tolerance * size, "a matrix product is wrong");
      }
    const auto& c = tile::twin::statistics["product"];
    expect(c.conflicts == 0, "matrix loads with an odd stride have bank conflicts");
    expect(c.barriers == 1 && c.launches == 1 && c.blocks == 1, "barriers, launches or blocks miscounted");
    expect(c.multiply_adds == M * N * K && c.products == M * N * K / (16 * 8 * (KIND == Kind::tf32 ? 8 : 16)),
           "matrix products miscounted");
    // Of both operands, a once for every column tile.
    expect(c.shared_bytes_read == (KIND == Kind::tf32 ? 0 : N / 8 * (M * K + 2 * K * 8) * 2), "matrix loads miscounted");
    expect(c.shared_bytes_taken == static_cast<int64_t>(shared) && c.shared_bytes_asked == c.shared_bytes_taken,
           "shared memory miscounted");
  }
  settings.schedule = Schedule::forward;
}

// One product of f16: d[0] = c + a[0] b[0] + .. + a[15] b[15], every other element 0.
__global__ void one_sum(const float* a, const float* b, float c, float* d) {
  const int lane = tile::lane(), k = 2 * lane;
  uint32_t x[4] = {}, y[2] = {};
  if (lane < 4)
    for (int i = 0; i < 2; i++) {
      x[2 * i] = tile::pack_f16(a[k + 8 * i], a[k + 8 * i + 1]);
      y[i] = tile::pack_f16(b[k + 8 * i], b[k + 8 * i + 1]);
    }
  float sum[4] = {lane == 0 ? c : 0.0f};
  tile::mma_f16(sum, x, y);
  if (lane == 0) *d = sum[0];
}

// Where the published models of the hardware (host_twin_units.cpp) and plain float sums part.
void check_truncation() {
  constexpr float HOPPER_ULP = 0x1p-25f, AMPERE_ULP = 0x1p-24f;  // of terms beside one of [1, 2)
  // Of products 2^-12 x 2^12 p, the first as `first` x p / first.
  const auto sum = [](int architecture, float c, std::vector<float> products, float first = 0x1p-12f) {
    settings.machine.architecture = architecture;
    products.resize(16);
    std::vector<float> a(16, 0x1p-12f);
    a[0] = first;
    for (int i = 0; i < 16; i++) products[i] /= a[i];
    float d = NAN;
    tile::launch("one_sum", one_sum, {1, 1, 1}, 32, 0, nullptr, a.data(), products.data(), c, &d);
    return d;
  };
  settings.truncating = true;
  for (float sign : {1.0f, -1.0f}) {
    // 16 terms of the last bit that is kept add up, 16 of half of it are all lost.
    for (const auto& [architecture, ulp] : {std::pair<int, float>{90, HOPPER_ULP}, {80, AMPERE_ULP}}) {
      const float kept = sum(architecture, sign, std::vector<float>(16, sign * ulp));
      const float shares = architecture == 90 ? 16 * ulp : 2 * 8 * ulp;
      expect(kept == sign * (1.0f + shares), "terms at the last bit are lost");
      expect(sum(architecture, sign, std::vector<float>(16, sign * ulp / 2)) == sign, "terms below the last bit are kept");
    }
    // The sum is cut off, not rounded: 1 + 3/4 of a last place stays 1.
    expect(sum(90, sign, {sign * 0x1p-24f, sign * 0x1p-25f}) == sign, "a sum is rounded");
    // A product of 2 and more has the exponent of its factors: terms of the last bit beside 1 are kept beside 1.5 x 1.5.
    std::vector<float> terms(16, sign * HOPPER_ULP);
    terms[0] = sign * 2.25f;
    expect(sum(90, 0.0f, terms, 1.5f) == sign * (2.25f + 0x1p-22f), "a product counts as larger than its factors say");
  }
  settings.truncating = false;
  expect(sum(90, 1.0f, {0x1p-24f, 0x1p-25f}) == 1.0f + 0x1p-23f, "without truncation a sum is not a float's");
  settings = {};
}

// ---- lanes, barriers, copies -----------------------------------------------------------------------------------------

__global__ void lanes(int* out) {
  const int lane = tile::lane();
  int* at = out + tile::thread() * 5;
  at[0] = tile::shuffle(lane, 31 - lane);
  at[1] = tile::shuffle_xor(lane, 5);
  at[2] = tile::shuffle_up(lane, 3);
  at[3] = static_cast<int>(tile::ballot(lane % 3 == 0));
  at[4] = static_cast<int>(tile::warp_sum(1.0f) + tile::warp_max(static_cast<float>(lane)));
}

// Warp 0 hands numbers to warp 1 through a named barrier while warp 2 goes its own way.
__global__ void handed(int* out) {
  tile::Shared shared;
  int* box = shared.take<int>(32);
  if (tile::warp() == 0) box[tile::lane()] = tile::lane();
  if (tile::warp() < 2) tile::sync(1, 64);
  if (tile::warp() == 1) out[tile::lane()] = box[31 - tile::lane()];
}

template <bool WAIT, bool BARRIER>
__global__ void copied(const float* from, float* to, int n) {
  tile::Shared shared;
  float* box = shared.take<float>(128 * 4);
  const int i = tile::thread() * 4;
  tile::copy_16(box + i, from + i, i < n);
  tile::commit_copies();
  if (WAIT) tile::wait_copies<0>();
  if (BARRIER) tile::sync();
  for (int j = 0; j < 4; j++) to[i + j] = box[128 * 4 - 1 - i - j];
  tile::wait_copies<0>();
}

template <bool WAIT, bool BARRIER>
bool copies_arrive(Schedule schedule) {
  settings.schedule = schedule;
  const auto from = normal(256);  // half of what is asked for: the rest must be zeros, unread
  std::vector<float> to(512, NAN);
  tile::launch("copied", copied<WAIT, BARRIER>, {1, 1, 1}, 128, 2048, nullptr, from.data(), to.data(), 256);
  settings.schedule = Schedule::forward;
  for (int i = 0; i < 512; i++)
    if (to[511 - i] != (i < 256 ? from[i] : 0.0f)) return false;
  return true;
}

// ---- measuring, several threads, machines ------------------------------------------------------------------------------

__global__ void counting(const float* from) {
  tile::Shared shared;
  float* box = shared.take<float>(4 * 64);
  tile::copy_16(box + 4 * tile::thread(), from + 4 * tile::thread(), tile::thread() < 40);
  tile::commit_copies();
  tile::wait_copies<0>();
  if (tile::lane() == 0) tile::count("warps");
  tile::count("threads", 2);
}

void check_counts() {
  const auto from = normal(160);
  tile::twin::statistics.clear();
  tile::twin::watched = {{"the last ten", reinterpret_cast<const char*>(&from[120]), 160}};
  for (int i = 0; i < 3; i++) tile::launch("counting", counting, {2, 1, 1}, 64, 1024, nullptr, from.data());
  tile::twin::watched.clear();
  const auto& c = tile::twin::statistics.at("counting");
  expect(c.launches == 3 && c.blocks == 6 && c.copies == 6 * 64 && c.copied_bytes == 6 * 640, "copies miscounted");
  expect(c.shared_bytes_written == 6 * 1024, "bytes written to shared memory miscounted");
  expect(c.own.at("warps") == 6 * 2 && c.own.at("threads") == 6 * 128, "a kernel's own counts are wrong");
  expect(c.own.at("bytes of the last ten") == 6 * 160, "bytes of what is watched are wrong");
}

void check_threads() {
  std::vector<std::thread> threads;
  std::vector<int> out(4 * 32);
  tile::twin::statistics.clear();
  for (int i = 0; i < 4; i++)
    threads.emplace_back([&out, i] {
      for (int n = 0; n < 50; n++) tile::launch("handed", handed, {1, 1, 1}, 96, 128, nullptr, &out[32 * i]);
    });
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < 4 * 32; i++) expect(out[i] == 31 - i % 32, "launches of several threads disturb each other");
  expect(tile::twin::statistics["handed"].blocks == 200, "launches of several threads are lost");
}

// ---- planted faults --------------------------------------------------------------------------------------------------

__global__ void diverges() {
  if (tile::thread() < 40) tile::sync();
}
__global__ void two_places() {
  if (tile::lane() < 16) {
    tile::sync_warp();
  } else {
    tile::ballot(true);
  }
}
__global__ void greedy() {
  tile::Shared shared;
  shared.take<float>(33);
}
__global__ void crooked(const float* from) {
  tile::Shared shared;
  tile::copy_16(shared.take<float>(256), from + 1);
}
__global__ void forgotten(const float* from) {
  tile::Shared shared;
  tile::copy_16(shared.take<float>(4 * 32) + 4 * tile::lane(), from);
}

void check_numbers() {
  for (uint32_t bits = 0; bits < 65536; bits++) {
    const tile::f16 half = {static_cast<uint16_t>(bits)};
    const float x = tile::to_float(half);
    if (x == x) expect(tile::to_f16(x).bits == bits, "f16 does not survive a round trip");
    const float y = tile::to_float(tile::bf16{static_cast<uint16_t>(bits)});
    if (y == y) expect(tile::to_bf16(y).bits == bits, "bf16 does not survive a round trip");
  }
  expect(tile::to_f16(1.0f + 0x1p-11f).bits == 0x3c00 && tile::to_f16(1.0f + 3 * 0x1p-11f).bits == 0x3c02, "f16 rounding");
  expect(tile::to_f16(65520.0f).bits == 0x7c00 && tile::to_f16(0x1p-25f).bits == 0, "f16 limits");
  // A tie goes to even from sm_90 on and away from zero before; everything else goes to the nearest on both.
  for (int architecture : {90, 80}) {
    settings.machine.architecture = architecture;
    const auto rounded = [](float x) { return tile::bits_to_float(tile::to_tf32(x)); };
    expect(rounded(1.0f + 0x1p-11f) == (architecture >= 90 ? 1.0f : 1.0f + 0x1p-10f), "tf32 rounding of a tie");
    expect(rounded(-1.0f - 3 * 0x1p-11f) == -1.0f - 0x1p-9f, "tf32 rounding of a tie");
    expect(rounded(1.0f + 0x1p-11f + 0x1p-23f) == 1.0f + 0x1p-10f && rounded(1.0f + 0x1p-12f) == 1.0f, "tf32 rounding");
    expect(std::isnan(rounded(NAN)) && std::isinf(rounded(INFINITY)), "tf32 of what is no number");
  }
  settings = {};
}

}  // namespace

int main() {
  check_numbers();
  check_product<Kind::bf16>(8e-3);
  check_product<Kind::f16>(1e-3);
  check_product<Kind::tf32>(1e-3);
  std::vector<int> out(64 * 5);
  tile::launch("lanes", lanes, {1, 1, 1}, 64, 0, nullptr, out.data());
  for (int i = 0; i < 64; i++) {
    const int lane = i % 32, *at = &out[i * 5];
    expect(at[0] == 31 - lane && at[1] == (lane ^ 5) && at[2] == (lane < 3 ? lane : lane - 3), "a shuffle is wrong");
    expect(static_cast<uint32_t>(at[3]) == 0x49249249u && at[4] == 32 + 31, "a ballot or a reduction is wrong");
  }
  for (Schedule schedule : {Schedule::forward, Schedule::reverse}) {
    settings.schedule = schedule;
    tile::launch("handed", handed, {1, 1, 1}, 96, 128, nullptr, out.data());
    for (int i = 0; i < 32; i++) expect(out[i] == 31 - i, "a named barrier does not order");
    expect(copies_arrive<true, true>(schedule), "an asynchronous copy is wrong");
    expect(!copies_arrive<false, true>(schedule), "a missing wait goes unseen");
  }
  expect(!copies_arrive<true, false>(Schedule::forward) || !copies_arrive<true, false>(Schedule::reverse),
         "a missing barrier goes unseen");
  const auto x = normal(64);
  expect_fault("barrier divergence: thread 0 waits at sync",
               [] { tile::launch("diverges", diverges, {2, 1, 1}, 64, 0, nullptr); });
  expect_fault("divergence: others of the warp", [] { tile::launch("two_places", two_places, {1, 1, 1}, 32, 0, nullptr); });
  expect_fault("256 bytes taken, 128 asked for", [] { tile::launch("greedy", greedy, {1, 1, 1}, 32, 128, nullptr); });
  expect_fault("source: address not aligned to 16",
               [&] { tile::launch("crooked", crooked, {1, 1, 1}, 32, 1024, nullptr, x.data()); });
  expect_fault("never waited for", [&] { tile::launch("forgotten", forgotten, {1, 1, 1}, 32, 512, nullptr, x.data()); });
  settings.machine.block_shared = 99 * 1024;
  expect_fault("102400 bytes of shared memory; a block has at most 101376",
               [] { tile::launch("greedy", greedy, {1, 1, 1}, 32, 100 * 1024, nullptr); });
  settings = {};
  check_truncation();
  check_counts();
  check_threads();
  std::printf("check_host_twin: all hold\n");
  return 0;
}
