// Transposes, for kernels; included after simd.h (no include guard on purpose).

typedef float Four __attribute__((vector_size(16)));
typedef float UnalignedFour __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__clang__)
#define WRITESAE_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t IntFour __attribute__((vector_size(16)));
#define WRITESAE_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, IntFour{i, j, k, l})
#endif

// Four rows of x, ld apart, to four columns of `to`: left alone, compilers gather, six times slower.
inline void transpose_four(const float* x, int64_t ld, float* to, int64_t ld_to) {
  Four row[4];
  for (int i = 0; i < 4; i++) row[i] = *reinterpret_cast<const UnalignedFour*>(x + i * ld);
  const Four a = WRITESAE_SHUFFLE(row[0], row[1], 0, 4, 1, 5), b = WRITESAE_SHUFFLE(row[2], row[3], 0, 4, 1, 5);
  const Four c = WRITESAE_SHUFFLE(row[0], row[1], 2, 6, 3, 7), d = WRITESAE_SHUFFLE(row[2], row[3], 2, 6, 3, 7);
  *reinterpret_cast<UnalignedFour*>(to) = WRITESAE_SHUFFLE(a, b, 0, 1, 4, 5);
  *reinterpret_cast<UnalignedFour*>(to + ld_to) = WRITESAE_SHUFFLE(a, b, 2, 3, 6, 7);
  *reinterpret_cast<UnalignedFour*>(to + 2 * ld_to) = WRITESAE_SHUFFLE(c, d, 0, 1, 4, 5);
  *reinterpret_cast<UnalignedFour*>(to + 3 * ld_to) = WRITESAE_SHUFFLE(c, d, 2, 3, 6, 7);
}
#undef WRITESAE_SHUFFLE

// to[j][i] = from[i][j]; rows and columns multiples of 4.
inline void transpose(int64_t rows, int64_t columns, const float* from, int64_t ld, float* to, int64_t ld_to) {
  for (int64_t j = 0; j < columns; j += 4)
    for (int64_t i = 0; i < rows; i += 4) transpose_four(from + i * ld + j, ld, to + j * ld_to + i, ld_to);
}
