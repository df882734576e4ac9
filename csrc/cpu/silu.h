// silu(x) = x / (1 + e^-x) on vectors; included by kernels after simd.h (no include guard on purpose).

typedef int32_t IntVec __attribute__((vector_size(WRITESAE_LANES * 4)));

// e^x within 2 units in the last place, x limited to where neither e^x nor 1 / e^x overflows (a NaN gives anything).
inline Vec exponential(Vec x) {
  const Vec low = Vec{} - 87.0f, high = Vec{} + 87.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec magic = Vec{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which lies in the low bits
  const Vec shifted = x * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return (Vec)((IntVec)p + (((IntVec)shifted - (IntVec)magic) << 23));
}

inline Vec silu(Vec x) { return x / (exponential(-x) + 1.0f); }
