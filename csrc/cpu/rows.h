// A head's tokens as a stream of rows, one for each rank-1 addition to its state: R writes a token, then its edits.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "encode.h"

namespace writesae::cpu {

// One rank-1 addition to a head's state.
struct Row {
  const void *left, *right;
  Element left_type, right_type;
  float gate;     // what the running sum is multiplied by first: e^g, or 1 for the second and later rows of a token
  int32_t slot;   // the token's place in the block when this is its last row, else -1
  int64_t begin;  // the sequence whose first row this is, else -1
  int64_t end;    // the sequence whose last row this is, else -1
  const float* gates = nullptr;  // channel gates: [K] logarithms of what the state is multiplied by first, null for 1
};

struct Block {
  std::vector<Row> rows;
  std::vector<int64_t> tokens;  // b * T + t of each slot
};

// Whether rows go two and two through a tile, a gate and a read each: two writes a token under channel gates.
inline bool paired(const EncodeParams& p, int64_t tile) { return p.channels && p.R == 2 && tile % 2 == 0; }

// All rows of one head, sequence after sequence. Under channel gates every sequence begins at a multiple of `tile`, rows that
// write nothing before it, and an empty one has such rows too, so that what is carried on is made of its first state. Paired,
// a token has an even number of rows, one that writes nothing before the last where there would be an odd one.
class Stream {
 public:
  Stream(const EncodeParams& p, int64_t head, int64_t tile = 1)
      : p_(p),
        head_(head),
        left_(head / (p.H / p.Hl)),
        tile_(tile),
        paired_(paired(p, tile)) {}

  // Up to `limit` more rows; false when there are none.
  bool next(Block& block, int64_t limit) {
    block.rows.clear();
    block.tokens.clear();
    while (n_ < p_.N && static_cast<int64_t>(block.rows.size()) < limit) {
      const int64_t origin = p_.cu_seqlens != nullptr ? p_.cu_seqlens[n_] : 0;
      const int64_t length = p_.cu_seqlens != nullptr ? p_.cu_seqlens[n_ + 1] - origin : p_.T;
      if (p_.channels && t_ == 0 && sub_ == 0) {
        while (block.rows.size() % tile_ != 0) block.rows.push_back(NOTHING);
        if (static_cast<int64_t>(block.rows.size()) == limit) break;
      }
      if (length == 0) {
        if (p_.channels) {
          block.rows.insert(block.rows.end(), 2, NOTHING);
          block.rows[block.rows.size() - 2].begin = block.rows.back().end = n_;
        }
        n_++;
        continue;
      }
      if (t_ == 0 && sub_ == 0) edit_ = first_edit(p_.edits, n_, head_, 0);
      const int64_t b = p_.cu_seqlens != nullptr ? 0 : n_, t = origin + t_, edit = edit_ + sub_ - p_.R;
      Row row;
      if (sub_ < p_.R) {
        row.left = p_.left.at(b, t, left_, sub_), row.left_type = p_.left.type;
        row.right = p_.right.at(b, t, head_, sub_), row.right_type = p_.right.type;
      } else {
        row.left = p_.edits.left + edit * p_.K, row.right = p_.edits.right + edit * p_.V;
        row.left_type = row.right_type = Element::f32;
      }
      const int64_t place = (b * p_.T + t) * p_.H + head_;
      if (p_.channels) {
        row.gate = 1.0f, row.gates = sub_ == 0 ? p_.decay + place * p_.K : nullptr;
      } else {
        row.gate = sub_ == 0 ? std::exp(p_.decay[place]) : 1.0f;
      }
      row.begin = t_ == 0 && sub_ == 0 ? n_ : -1;
      sub_++;
      const bool last = sub_ >= p_.R && !edit_here(edit_ + sub_ - p_.R);
      row.slot = last ? static_cast<int32_t>(block.tokens.size()) : -1;
      row.end = last && t_ == length - 1 ? n_ : -1;
      if (paired_ && last && sub_ % 2 != 0) block.rows.push_back(NOTHING);
      block.rows.push_back(row);
      if (!last) continue;
      block.tokens.push_back(b * p_.T + t);
      edit_ += sub_ - p_.R;
      sub_ = 0;
      if (++t_ == length) t_ = 0, n_++;
    }
    return !block.rows.empty();
  }

 private:
  static constexpr Row NOTHING = {nullptr, nullptr, Element::f32, Element::f32, 1.0f, -1, -1, -1};

  bool edit_here(int64_t e) const {
    const int64_t* x = p_.edits.index + 4 * e;
    return e < p_.edits.count && x[0] == n_ && x[1] == t_ && x[2] == head_;
  }

  const EncodeParams& p_;
  int64_t head_, left_, tile_;
  bool paired_;
  int64_t n_ = 0, t_ = 0, sub_ = 0, edit_ = 0;
};

}  // namespace writesae::cpu
