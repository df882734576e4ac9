// The sequences of a call of selective_scan, with the snapshots of each.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "selective_scan.h"

namespace writesae::cpu::selective_scan {

struct Sequence {
  int64_t n, b, origin, length;
  const int64_t *shots, *shots_end;  // numbers of its snapshots, by position
};

class Sequences {
 public:
  explicit Sequences(const SelectiveScanParams& p) : p_(p), shots_(p.P) {
    for (int64_t i = 0; i < p.P; i++) shots_[i] = i;
    std::stable_sort(shots_.begin(), shots_.end(), [&](int64_t x, int64_t y) { return place(x) < place(y); });
  }

  Sequence at(int64_t n) const {
    const bool packed = p_.cu_seqlens != nullptr;
    const auto first = [&](int64_t row) {
      return std::partition_point(shots_.begin(), shots_.end(), [&](int64_t i) { return p_.places[2 * i] < row; }) -
             shots_.begin();
    };
    const int64_t origin = packed ? p_.cu_seqlens[n] : 0, length = packed ? p_.cu_seqlens[n + 1] - origin : p_.T;
    return {n, packed ? 0 : n, origin, length, shots_.data() + first(n), shots_.data() + first(n + 1)};
  }

 private:
  std::array<int64_t, 2> place(int64_t i) const { return {p_.places[2 * i], p_.places[2 * i + 1]}; }

  const SelectiveScanParams& p_;
  std::vector<int64_t> shots_;
};

}  // namespace writesae::cpu::selective_scan
