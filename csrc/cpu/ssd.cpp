// ssd on the CPU: a rule that only adds.
#include "ssd.h"

#include "cpu/scan_backward.h"
#include "cpu/scan_forward.h"

namespace writesae::cpu::ssd {
namespace {

struct Rule {
  static constexpr bool READS = false;
  static constexpr bool LOW_RANK = false;
};

}  // namespace

void forward(const ScanParams& p, const Parallel& parallel) { scan::forward<Rule>(p, parallel); }
void backward(const ScanBackwardParams& p, const Parallel& parallel) { scan_backward::backward<Rule>(p, parallel); }
void step(const ScanStepParams& p, const Parallel& parallel) { scan::step<Rule>(p, parallel); }

}  // namespace writesae::cpu::ssd
