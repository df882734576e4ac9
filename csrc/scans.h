// Every write rule that is a scan, for the tables of operators.
#pragma once

#include "dplr.h"
#include "gated_delta_rule.h"
#include "ssd.h"

namespace writesae {

// f(a rule) for each, as scan_operators.h takes them.
template <class F>
void for_each_scan(const F& f) {
  f(GatedDeltaRule{});
  f(Ssd{});
  f(Dplr{});
}

}  // namespace writesae
