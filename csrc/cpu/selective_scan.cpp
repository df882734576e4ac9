// selective_scan on the CPU: scheduling here, arithmetic in selective_scan_kernel.h.
#include "selective_scan.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/first_nonfinite.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/selective_scan_sequences.h"
#include "parallel.h"

namespace writesae::cpu::selective_scan {
namespace {

constexpr int64_t WIDTH = 128;  // channels of an item, a multiple of 16; fewer where threads would be left without work

#define WRITESAE_KERNEL "cpu/selective_scan_forward_kernel.h"
#include "cpu/each_isa.h"

}  // namespace

void forward(const SelectiveScanParams& p, const Parallel& parallel) {
#define WRITESAE_KERNELS(set) set::forward_block
  const auto forward_block = WRITESAE_OF_ISA(WRITESAE_KERNELS);
  const Sequences sequences(p);
  int64_t width = WIDTH;
  while (width > 16 && p.N * ((p.V + width - 1) / width) < 2 * parallel.threads) width /= 2;
  const int64_t blocks = (p.V + width - 1) / width, size = round_up(portable::forward_memory(p.K, width), 16);
  const Buffer memory(size * parallel.threads);
  for_each(parallel, p.N * blocks, [&](int64_t i, int64_t worker) {
    const int64_t channel = i % blocks * width;
    forward_block(p, sequences.at(i / blocks), channel, std::min(width, p.V - channel), memory + worker * size);
  });
  if (p.first_nonfinite == nullptr) return;
  note_first_nonfinite({p.B, p.T, 1, p.V, p.right, nullptr, p.first_nonfinite}, p.N, p.cu_seqlens, p.edits, p.K,
                       p.final_state);
}

}  // namespace writesae::cpu::selective_scan
