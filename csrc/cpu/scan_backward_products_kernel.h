// Matrix products of a piece, of the form a^T b, on operands that lie in cache; part of scan_backward_kernel.h, where C and
// simd.h come from.

constexpr int NV = 2;
constexpr int MT = LANES == 16 ? 8 : 4;  // rows of a register tile: MT x NV accumulators, NV + 1 more registers
constexpr int64_t PC = C + 16;           // floats between rows of C: no power of two, which would share cache sets

// c[m][:] (+)= sum over rows x of a[x][m] b[x][:], for MT values of m and N vectors.
template <int N>
inline void tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows, float* c, int64_t ldc, bool add) {
  Vec sum[MT][N];
  for (int i = 0; i < MT; i++)
    for (int n = 0; n < N; n++) sum[i][n] = add ? load(c + i * ldc + n * LANES) : Vec{};
  for (int64_t x = 0; x < rows; x++, a += lda, b += ldb) {
    Vec y[N];
    for (int n = 0; n < N; n++) y[n] = load(b + n * LANES);
    for (int i = 0; i < MT; i++)
      for (int n = 0; n < N; n++) sum[i][n] += a[i] * y[n];
  }
  for (int i = 0; i < MT; i++)
    for (int n = 0; n < N; n++) store(c + i * ldc + n * LANES, sum[i][n]);
}

// c [M, n] (+)= a^T b with a [rows, M] and b [rows, n]; M a multiple of MT, n of 16 (which NV vectors may not divide).
inline void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows, float* c, int64_t ldc,
                     int64_t M, int64_t n, bool add) {
  int64_t at = 0;
  for (; at + NV * LANES <= n; at += NV * LANES)
    for (int64_t m = 0; m < M; m += MT) tile<NV>(a + m, lda, b + at, ldb, rows, c + m * ldc + at, ldc, add);
  for (; at < n; at += LANES)
    for (int64_t m = 0; m < M; m += MT) tile<1>(a + m, lda, b + at, ldb, rows, c + m * ldc + at, ldc, add);
}

constexpr int64_t STEP = 16;  // rows that share one limit in a triangular product

// The lower triangle (in steps, so a little more) of c [L, L] = a^T b with a, b [rows, L].
inline void multiply_lower(const float* a, const float* b, int64_t rows, int64_t L, float* c) {
  for (int64_t m = 0; m < L; m += STEP)
    multiply(a + m, PC, b, PC, rows, c + m * PC, PC, L - m < STEP ? L - m : STEP, m + STEP, false);
}

// c [L, n] += t^T b with t [L, L] lower triangular, b [L, n].
inline void add_lower_transposed(const float* t, const float* b, int64_t ld, int64_t L, float* c, int64_t n) {
  for (int64_t m = 0; m < L; m += STEP)
    multiply(t + m * PC + m, PC, b + m * ld, ld, L - m, c + m * ld, ld, L - m < STEP ? L - m : STEP, n, true);
}

// c [L, n] += t^T b with t [L, L] upper triangular.
inline void add_upper_transposed(const float* t, const float* b, int64_t ld, int64_t L, float* c, int64_t n) {
  for (int64_t m = 0; m < L; m += STEP) {
    const int64_t rows = L - m < STEP ? L - m : STEP;
    multiply(t + m, PC, b, ld, m + rows, c + m * ld, ld, rows, n, true);
  }
}

inline void scale_row(float* x, float by, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) store(x + i, load(x + i) * by);
}

inline void add_scaled(float* x, const float* y, float by, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) store(x + i, load(x + i) + by * load(y + i));
}
