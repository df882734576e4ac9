// Gates of channels, for the kernels of a scan and of its backward; included after simd.h (no include guard on purpose).
#include "cpu/silu.h"

// e^g of each channel of (a, b, c); 1 in the padding.
inline void read_gates(const View& g, int64_t a, int64_t b, int64_t c, int64_t K, int64_t padded, float* row) {
  const float* const from = float_row(g, a, b, c, K, padded, row);
  for (int64_t i = 0; i < padded; i += LANES) {
    const Vec x = load(from + i);
    const Vec e = x < Vec{} - 87.0f ? Vec{} : exponential(x);
    store(row + i, x == x ? e : x);
  }
}

inline void multiply_rows(const float* x, const float* y, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += LANES) store(to + i, load(x + i) * load(y + i));
}
