// Where the first increment that is not finite stands, on the CPU: see first_nonfinite in scan.h. After a call, from its final
// states, so that increments (16 MB of 2,048 tokens of 16 heads at V = 128) are read again only of heads that have broken.
#pragma once

#include <cstdint>
#include <cstring>

#include "edits.h"

namespace writesae::cpu {

inline bool all_finite(const float* x, int64_t n) {
  constexpr int32_t EXPONENT = 0x7f800000;
  int32_t most = 0;
  for (int64_t i = 0; i < n; i++) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= EXPONENT;
    most = bits > most ? bits : most;
  }
  return most != EXPONENT;
}

// A call's increments. to: [B] of the answer.
struct Increments {
  int64_t B, T, H, V;
  const float *right, *erased;  // [B, T, H, V]; erased null without a low-rank erase
  int64_t* to;

  bool finite(int64_t b, int64_t t, int64_t h) const {
    const int64_t at = ((b * T + t) * H + h) * V;
    return all_finite(right + at, V) && (erased == nullptr || all_finite(erased + at, V));
  }
  void look(int64_t b, int64_t t, int64_t h) const {
    const int64_t at = t * H + h;
    if ((to[b] < 0 || at < to[b]) && !finite(b, t, h)) to[b] = at;
  }
};

// Looks at every increment, of one token a row.
inline void note_first_nonfinite(const Increments& x) {
  for (int64_t b = 0; b < x.B; b++) {
    x.to[b] = -1;
    for (int64_t t = 0; t < x.T; t++)
      for (int64_t h = 0; h < x.H; h++) x.look(b, t, h);
  }
}

// states: [N, H, K, V] after the last token. A row of a head's is enough, the column of a broken state being so throughout.
inline void note_first_nonfinite(const Increments& x, int64_t N, const int64_t* cu_seqlens, const EditList& edits, int64_t K,
                                 const float* states) {
  if (x.T == 1) return note_first_nonfinite(x);
  for (int64_t b = 0; b < x.B; b++) x.to[b] = -1;
  for (int64_t n = 0; n < N; n++) {
    const int64_t b = cu_seqlens == nullptr ? n : 0;
    const int64_t begin = cu_seqlens == nullptr ? 0 : cu_seqlens[n], end = cu_seqlens == nullptr ? x.T : cu_seqlens[n + 1];
    for (int64_t h = 0; h < x.H; h++) {
      if (all_finite(states + (n * x.H + h) * K * x.V, x.V)) continue;
      int64_t t = begin;
      while (t < end && x.finite(b, t, h)) t++;
      if (t < end) x.look(b, t, h);
    }
  }
  for (int64_t e = 0; e < edits.count; e++) {  // a write that does not stay leaves nothing in the state
    const int64_t* place = edits.index + 4 * e;
    if (!edits.kind(e).removes_after()) continue;
    if (cu_seqlens == nullptr) {
      x.look(place[0], place[1], place[2]);
    } else {
      x.look(0, cu_seqlens[place[0]] + place[1], place[2]);
    }
  }
}

}  // namespace writesae::cpu
