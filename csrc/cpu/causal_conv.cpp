// causal_conv on the CPU: scheduling here, arithmetic in causal_conv_kernel.h.
#include "causal_conv.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "parallel.h"

namespace writesae::cpu {
namespace {

constexpr int64_t BLOCK = 512;  // channels of an item: weights and the last W rows stay in the first-level cache at W = 4
constexpr int64_t PART = 128;   // tokens of an item, which reads W - 1 more

}  // namespace

#define WRITESAE_KERNEL "cpu/causal_conv_kernel.h"
#include "cpu/each_isa.h"

void causal_conv(const CausalConvParams& p, const Parallel& parallel) {
#define WRITESAE_KERNELS(set) set::convolve
  const auto convolve = WRITESAE_OF_ISA(WRITESAE_KERNELS);
  // Parts are cut on a grid over the whole row, then at the sequences inside it.
  const int64_t blocks = (p.D + BLOCK - 1) / BLOCK, parts = (p.T + PART - 1) / PART;
  const int64_t worker_size = (2 * p.W + 2) * BLOCK;
  const Buffer memory(worker_size * parallel.threads);
  for_each(parallel, p.B * blocks * parts, [&](int64_t i, int64_t worker) {
    const int64_t b = i / (blocks * parts), block = i / parts % blocks, first = i % parts * PART;
    const int64_t last = std::min(first + PART, p.T);
    if (p.cu_seqlens == nullptr) {
      convolve(p, b, 0, first, last, block * BLOCK, memory + worker * worker_size);
      return;
    }
    const int64_t* next = std::upper_bound(p.cu_seqlens, p.cu_seqlens + p.N + 1, first);
    for (int64_t from = first; from < last; next++) {
      const int64_t to = std::min(*next, last);
      if (from < to) convolve(p, b, next[-1], from, to, block * BLOCK, memory + worker * worker_size);
      from = std::max(from, to);
    }
  });
}

}  // namespace writesae::cpu
