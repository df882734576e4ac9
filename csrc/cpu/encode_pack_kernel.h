// Packing of atoms, written once and compiled for each instruction set by encode.cpp (no include guard on purpose).
//
// A row and an atom are `steps(size)` floats deep. With WRITESAE_PAIRS a step is a pair of bfloat16 (whole tiles of AMX, 16
// steps, with zeros at the end); else it is one float, rounded to bfloat16 first where that is asked for.

#include "cpu/transpose_kernel.h"

inline void round_to_bfloat(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i++) x[i] = from_bfloat(to_bfloat(x[i]));
}

#if WRITESAE_PAIRS
inline int64_t steps(int64_t size) { return pair_steps(size); }

// `size` elements to steps(size) pairs, zeros past the end. `line` holds `size` floats.
inline void put_row(Element type, const void* from, int64_t size, bool, float* line, float* to) {
  convert_in(type, from, line, size);
  uint16_t* half = reinterpret_cast<uint16_t*>(to);
  for (int64_t i = 0; i < size; i++) half[i] = to_bfloat(line[i]);
  std::memset(half + size, 0, (2 * steps(size) - size) * sizeof(uint16_t));
}
#else
inline int64_t steps(int64_t size) { return size; }

inline void put_row(Element type, const void* from, int64_t size, bool bf16, float*, float* to) {
  convert_in(type, from, to, size);
  if (bf16) round_to_bfloat(to, size);
}
#endif

// Atoms 16 panel .. 16 panel + 15 of head slot h of x [Hs, F, r, size] to [r][steps(size)][16], zeros past F.
// `rows` holds SCRATCH_ROWS rows.
inline void pack_panel(const View& x, int64_t h, int64_t panel, int64_t F, int64_t rank, int64_t size, bool bf16,
                       float* rows, float* to) {
  const int64_t depth = steps(size);
  for (int64_t r = 0; r < rank; r++, to += depth * PANEL) {
    for (int f = 0; f < PANEL; f++) {
      const int64_t feature = panel * PANEL + f;
      if (feature < F) {
        put_row(x.type, x.at(h, feature, r), size, bf16, rows + PANEL * depth, rows + f * depth);
      } else {
        std::memset(rows + f * depth, 0, depth * sizeof(float));
      }
    }
    int64_t i = 0;
    for (; i + 4 <= depth; i += 4)
      for (int f = 0; f < PANEL; f += 4) transpose_four(rows + f * depth + i, depth, to + i * PANEL + f, PANEL);
    for (; i < depth; i++)
      for (int f = 0; f < PANEL; f++) to[i * PANEL + f] = rows[f * depth + i];
  }
}
