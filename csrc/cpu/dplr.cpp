// dplr on the CPU: with a low-rank erase, or without a and b a rule that only adds.
#include "dplr.h"

#include "cpu/scan_backward.h"
#include "cpu/scan_forward.h"

namespace writesae::cpu::dplr {
namespace {

template <bool ERASES>
struct Rule {
  static constexpr bool READS = false;
  static constexpr bool LOW_RANK = ERASES;
};

}  // namespace

void forward(const ScanParams& p, const Parallel& parallel) {
  if (p.a.data != nullptr) return scan::forward<Rule<true>>(p, parallel);
  scan::forward<Rule<false>>(p, parallel);
}

void backward(const ScanBackwardParams& p, const Parallel& parallel) {
  if (p.in.a.data != nullptr) return scan_backward::backward<Rule<true>>(p, parallel);
  scan_backward::backward<Rule<false>>(p, parallel);
}

void step(const ScanStepParams& p, const Parallel& parallel) {
  if (p.a.data != nullptr) return scan::step<Rule<true>>(p, parallel);
  scan::step<Rule<false>>(p, parallel);
}

}  // namespace writesae::cpu::dplr
