// The product of encode on Hopper's units, under the twin: sizes that do and do not fill tiles, both ways to share the work,
// one block and two, both orders; and that faults put into the kernel are found.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cuda/encode_product_hopper.cuh"

namespace {

namespace tile = writesae::tile;
using tile::twin::Schedule;
using writesae::EncodeProductParams;
using writesae::cuda::product::Fault;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "check_cuda_encode_product_hopper: %s\n", what.c_str());
  std::exit(1);
}

std::vector<tile::bf16> normal(int64_t n) {
  static std::mt19937 generator(0);
  std::normal_distribution<float> distribution;
  std::vector<tile::bf16> x(n);
  for (auto& value : x) value = tile::to_bf16(distribution(generator));
  return x;
}

// Whether all is right in the order that is set. Rows lie `gap` numbers further apart than they are long.
template <class Run>
bool right(int64_t F, int64_t T, int64_t K, int64_t gap, const Run& run) {
  // As long as the rows need: the address sanitizer sees what is read past the last.
  const auto v = normal((F - 1) * (K + gap) + K), left = normal((T - 1) * (K + gap) + K);
  std::vector<float> out(F * T, NAN);
  run(EncodeProductParams{F, T, K, v.data(), left.data(), K + gap, K + gap, out.data()});
  for (int64_t f = 0; f < F; f++)
    for (int64_t t = 0; t < T; t++) {
      double sum = 0, size = 1e-30;
      for (int64_t k = 0; k < K; k++) {
        const double one = double{tile::to_float(v[f * (K + gap) + k])} * tile::to_float(left[t * (K + gap) + k]);
        sum += one, size += std::fabs(one);
      }
      if (!(std::fabs(out[f * T + t] - sum) <= 1e-6 * size)) return false;
    }
  return true;
}

// With few processors a block has many tiles, so that the ring of stages goes round.
template <int CLUSTER, bool PING_PONG>
void check_sizes() {
  const struct {
    int64_t F, T, K, gap;
    int processors;
  } sizes[] = {{64, 128, 64, 0, 132}, {1, 1, 8, 0, 132},     {200, 131, 72, 0, 132}, {331, 257, 128, 8, 3},
               {130, 60, 20, 4, 1},   {300, 130, 256, 0, 1}, {700, 9, 64, 0, 1},     {260, 129, 136, 0, 2}};
  for (Schedule schedule : {Schedule::forward, Schedule::reverse}) {
    tile::twin::settings.schedule = schedule;
    for (const auto& size : sizes)
      expect(right(size.F, size.T, size.K, size.gap,
                   [&](const EncodeProductParams& p) {
                     writesae::cuda::product::run<CLUSTER, PING_PONG>(p, size.processors, nullptr);
                   }),
             "wrong at F = " + std::to_string(size.F) + ", T = " + std::to_string(size.T) + ", K = " +
                 std::to_string(size.K) + (PING_PONG ? ", ping-pong" : "") + ", clusters of " + std::to_string(CLUSTER));
  }
  tile::twin::settings.schedule = Schedule::forward;
}

// Found: a fault by name, or a wrong result, in at least one order. `part`: of the name, "" for a wrong result.
template <int CLUSTER, bool PING_PONG, Fault FAULT>
void expect_found(const char* what, const std::string& part) {
  bool found = false;
  std::string seen;
  for (Schedule schedule : {Schedule::forward, Schedule::reverse}) {
    tile::twin::settings.schedule = schedule;
    try {
      const bool same = right(300, 130, 256, 0, [](const EncodeProductParams& p) {
        writesae::cuda::product::run<CLUSTER, PING_PONG, FAULT>(p, 1, nullptr);
      });
      found = found || (part.empty() && !same);
    } catch (const std::runtime_error& error) {
      found = found || (!part.empty() && std::string(error.what()).find(part) != std::string::npos);
      seen += std::string(error.what()) + "; ";
    }
  }
  tile::twin::settings.schedule = Schedule::forward;
  expect(found, std::string(what) + " goes unseen: expected \"" + part + "\", got \"" + seen + "\"");
}

}  // namespace

int main() {
  check_sizes<1, false>();
  check_sizes<1, true>();
  check_sizes<2, false>();
  check_sizes<2, true>();
  expect_found<1, false, Fault::no_fence_of_barriers>("a missing fence", "a barrier that copies do not know of");
  expect_found<2, true, Fault::no_fence_of_barriers>("a missing fence", "a barrier that copies do not know of");
  expect_found<1, true, Fault::wrong_parity>("a wrong parity", "is the target of a copy that is under way");
  expect_found<2, false, Fault::wrong_parity>("a wrong parity", "is the target of a copy that is under way");
  expect_found<1, false, Fault::other_swizzle>("another swizzle", "");
  expect_found<1, false, Fault::released_early>("a stage released early", "over an operand of a product");
  expect_found<2, true, Fault::released_early>("a stage released early", "over an operand of a product");
  expect_found<1, true, Fault::no_last_wait>("a missing wait", "over an operand of a product");
  expect_found<2, false, Fault::no_last_meeting>("a block that ends too early", "of the cluster has ended");
  std::printf("check_cuda_encode_product_hopper: all hold\n");
  return 0;
}
