// Small matrix products on operands that lie in cache, and a transpose. No include guard on purpose: see simd.h, which must
// stand before it.
//
// C = beta C + A B, row-major, n a multiple of 16. A register tile of ROWS x 2 vectors: a step of k is two loads of B and
// one broadcast of A a row, so the multiply-adds decide (24 of them against 14 loads with AVX-512). A is read where it
// lies: its rows are gathered atoms. A tile's columns of B stay in the first cache as long as B's rows are not a multiple
// of 2 KB apart, which is why callers pad them.

constexpr int ROWS = LANES == 16 ? 12 : 6;

template <int M, int N>
inline void gemm_tile(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* const* c, int64_t at,
                      float beta) {
  Vec total[M][N];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) total[i][j] = Vec{};
  for (int64_t x = 0; x < k; x++) {
    Vec right[N];
    for (int j = 0; j < N; j++) right[j] = load(b + x * ldb + j * LANES);
    for (int i = 0; i < M; i++)
      for (int j = 0; j < N; j++) total[i][j] += a[i * lda + x] * right[j];
  }
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) {
      float* to = c[i] + at + j * LANES;
      store(to, beta == 0 ? total[i][j] : total[i][j] + beta * load(to));
    }
}

template <int N, int M = ROWS - 1>
inline void gemm_rest(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* const* c,
                      int64_t at, float beta) {
  if constexpr (M > 0) {
    if (m == M) {
      gemm_tile<M, N>(k, a, lda, b, ldb, c, at, beta);
    } else {
      gemm_rest<N, M - 1>(m, k, a, lda, b, ldb, c, at, beta);
    }
  }
}

template <int N>
inline void gemm_columns(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* const* c,
                         int64_t at, float beta) {
  int64_t i = 0;
  for (; i + ROWS <= m; i += ROWS) gemm_tile<ROWS, N>(k, a + i * lda, lda, b, ldb, c + i, at, beta);
  gemm_rest<N>(m - i, k, a + i * lda, lda, b, ldb, c + i, at, beta);
}

// a [m][lda], b [k][ldb], c: pointers to m rows of n floats.
inline void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* const* c,
                 float beta) {
  int64_t at = 0;
  for (; at + 2 * LANES <= n; at += 2 * LANES) gemm_columns<2>(m, k, a, lda, b + at, ldb, c, at, beta);
  if (at < n) gemm_columns<1>(m, k, a, lda, b + at, ldb, c, at, beta);
}

typedef float Four __attribute__((vector_size(16)));
typedef float UnalignedFour __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__clang__)
#define WRITESAE_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t IntFour __attribute__((vector_size(16)));
#define WRITESAE_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, IntFour{i, j, k, l})
#endif

// to[j][i] = from[i][j]; rows and columns multiples of 4.
inline void transpose(int64_t rows, int64_t columns, const float* from, int64_t ldf, float* to, int64_t ldt) {
  for (int64_t j = 0; j < columns; j += 4)
    for (int64_t i = 0; i < rows; i += 4) {
      Four row[4];
      for (int64_t x = 0; x < 4; x++) row[x] = *reinterpret_cast<const UnalignedFour*>(from + (i + x) * ldf + j);
      const Four a = WRITESAE_SHUFFLE(row[0], row[1], 0, 4, 1, 5), b = WRITESAE_SHUFFLE(row[2], row[3], 0, 4, 1, 5);
      const Four c = WRITESAE_SHUFFLE(row[0], row[1], 2, 6, 3, 7), d = WRITESAE_SHUFFLE(row[2], row[3], 2, 6, 3, 7);
      float* out = to + j * ldt + i;
      *reinterpret_cast<UnalignedFour*>(out) = WRITESAE_SHUFFLE(a, b, 0, 1, 4, 5);
      *reinterpret_cast<UnalignedFour*>(out + ldt) = WRITESAE_SHUFFLE(a, b, 2, 3, 6, 7);
      *reinterpret_cast<UnalignedFour*>(out + 2 * ldt) = WRITESAE_SHUFFLE(c, d, 0, 1, 4, 5);
      *reinterpret_cast<UnalignedFour*>(out + 3 * ldt) = WRITESAE_SHUFFLE(c, d, 2, 3, 6, 7);
    }
}
#undef WRITESAE_SHUFFLE
