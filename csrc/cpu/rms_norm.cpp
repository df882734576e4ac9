// rms_norm on the CPU: scheduling here, arithmetic in rms_norm_kernel.h.
#include "rms_norm.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "parallel.h"

namespace writesae::cpu {
namespace {

constexpr int64_t PART = 1 << 14;   // elements of an item
constexpr int64_t ALONE = 1 << 15;  // elements that one thread is done with before another wakes

}  // namespace

#define WRITESAE_KERNEL "cpu/rms_norm_kernel.h"
#include "cpu/each_isa.h"

void rms_norm(const RmsNormParams& p, const Parallel& parallel) {
#define WRITESAE_KERNELS(set) set::normalise
  const auto normalise = WRITESAE_OF_ISA(WRITESAE_KERNELS);
  const Parallel used = p.N * p.D <= ALONE ? Parallel{1, nullptr} : parallel;
  const int64_t rows = std::max<int64_t>(1, PART / p.D), padded = round_up(p.D, 16);
  const Buffer memory(3 * padded * used.threads);
  for_each(used, (p.N + rows - 1) / rows, [&](int64_t i, int64_t worker) {
    normalise(p, i * rows, std::min((i + 1) * rows, p.N), memory + worker * 3 * padded);
  });
}

}  // namespace writesae::cpu
