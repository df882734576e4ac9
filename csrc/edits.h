// Edits of a call as kernels see them, on the host and on a device: raw pointers, no torch, and no write rule's business.
#pragma once

#include <cstdint>

namespace writesae {

#if defined(__CUDACC__)
#define WRITESAE_ANYWHERE __host__ __device__ __forceinline__
#else
#define WRITESAE_ANYWHERE inline
#endif

// What an edit does, and when; numbered as in writesae/edits.py, `code` = kind + AFTERWARDS when. One that acts after its
// token has read the state leaves the token's output as without it: a native write that is removed after the read is made,
// read once, and gone.
struct EditKind {
  enum Kind : int64_t { ADD = 0, DELETE = 1, REPLACE = 2 };
  enum When : int64_t { BEFORE = 0, AFTER = 1 };
  static constexpr int64_t AFTERWARDS = 4;

  int64_t code;
  WRITESAE_ANYWHERE bool adds() const { return (code & 3) != DELETE; }
  WRITESAE_ANYWHERE bool after() const { return (code & AFTERWARDS) != 0; }
  WRITESAE_ANYWHERE bool removes() const { return (code & 3) != ADD && !after(); }
  WRITESAE_ANYWHERE bool removes_after() const { return (code & 3) != ADD && after(); }
  bool known() const { return code >= 0 && code <= REPLACE + AFTERWARDS * AFTER && (code & 3) <= REPLACE; }
};

// Edits of one call, sorted by (row, head, position), stable.
struct EditList {
  int64_t count = 0;
  const int64_t* index = nullptr;  // [E, 4]  (row, position, head, code of a kind)
  const float* left = nullptr;     // [E, K]
  const float* right = nullptr;    // [E, V]
  WRITESAE_ANYWHERE EditKind kind(int64_t e) const { return {index[4 * e + 3]}; }
};

// The first edit at or after (row, head, position), counted in `Index`.
template <class Index = int64_t>
WRITESAE_ANYWHERE Index first_edit(const EditList& edits, int64_t row, int64_t head, int64_t position) {
  Index low = 0, high = static_cast<Index>(edits.count);
  while (low < high) {
    const Index middle = (low + high) / 2;
    const int64_t* x = edits.index + 4 * static_cast<int64_t>(middle);
    const bool before = x[0] < row || (x[0] == row && (x[2] < head || (x[2] == head && x[1] < position)));
    if (before) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Edits [begin, end).
struct EditRange {
  int64_t begin, end;
};

// Those of (row, head) at one position.
WRITESAE_ANYWHERE EditRange edits_at(const EditList& edits, int64_t row, int64_t head, int64_t position) {
  if (edits.count == 0) return {0, 0};
  return {first_edit(edits, row, head, position), first_edit(edits, row, head, position + 1)};
}

// Those of (row, head), wherever they stand.
WRITESAE_ANYWHERE EditRange edits_of(const EditList& edits, int64_t row, int64_t head) {
  return {first_edit(edits, row, head, INT64_MIN), first_edit(edits, row, head + 1, INT64_MIN)};
}

}  // namespace writesae
