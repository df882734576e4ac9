// Small matrix products on operands that lie in cache. No include guard on purpose: see simd.h, which must stand before it.
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
