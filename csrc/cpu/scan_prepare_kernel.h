// What a scan's walk (scan_kernel.h, which includes this; no include guard on purpose) reads of the keys, queries, gates and
// low-rank factors of a head: rows of micro-chunks of C tokens, and their products. One pass over the channels: a vector of
// each of a chunk's rows is read where it lies, multiplied by its gates and written where the walk reads it, and all products
// of the chunk add up in registers.

constexpr int C = 4;

// Rows of a micro-chunk that `prepare` makes: of the keys and queries; with a gate a channel G_j k_j, G_j q_j, D_3j k_j and
// G_3, so that the walk multiplies by no other gate; with a low-rank erase G_j-1 a_j, G_j q_j, D_3j k_j, G_3 and D_3j b_j.
template <class Form>
constexpr int ROWS = (Form::CHANNEL ? 3 * C + 1 : 2 * C) + (Form::LOW_RANK ? C : 0);

// Products of a micro-chunk, matrices of [C][C]: of the keys with what reads (keys, or a) and with the queries; of b the same.
template <class Form>
constexpr int DOTS = 2 * Form::WRITES;

inline int64_t round_up_16(int64_t K) { return (K + 15) / 16 * 16; }

// Rows of scratch of `prepare`: inputs that are not floats in rows of whole vectors, gates, and zeros.
template <class Form>
constexpr int SCRATCH_ROWS = ((Form::LOW_RANK ? 4 : 2) + (Form::CHANNEL ? 1 : 0)) * C + 1;

// The rows of a micro-chunk, padded to 16 channels. k and q are to be multiplied by their scales.
struct ChunkRows {
  const float *k[C], *q[C], *a[C], *b[C];
  const float* gates;  // [C][padded]  e^g
  float k_scale[C], q_scale[C];
};

// Sums over the lanes of 16 vectors, as `sum` adds them up; that of x[n] lies at sum_place(n).
#if WRITESAE_LANES == 16
typedef int32_t LaneIndex __attribute__((vector_size(64)));
#if defined(__clang__)
#define WRITESAE_LANES_OF(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define WRITESAE_LANES_OF(x, y, ...) __builtin_shuffle(x, y, LaneIndex{__VA_ARGS__})
#endif
inline constexpr int sum_place(int n) { return n % 4 * 4 + n / 4; }
inline void sum_16(Vec (&x)[16], float* to) {
  for (int n = 0; n < 8; n++)
    x[n] = WRITESAE_LANES_OF(x[2 * n], x[2 * n + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           WRITESAE_LANES_OF(x[2 * n], x[2 * n + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int n = 0; n < 4; n++)
    x[n] = WRITESAE_LANES_OF(x[2 * n], x[2 * n + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           WRITESAE_LANES_OF(x[2 * n], x[2 * n + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  for (int pairs = 2; pairs >= 1; pairs /= 2)
    for (int n = 0; n < pairs; n++)
      x[n] = WRITESAE_LANES_OF(x[2 * n], x[2 * n + 1], 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
             WRITESAE_LANES_OF(x[2 * n], x[2 * n + 1], 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
  store(to, x[0]);
}
#undef WRITESAE_LANES_OF
#else
inline constexpr int sum_place(int n) { return n; }
inline void sum_16(Vec (&x)[16], float* to) {
  for (int n = 0; n < 16; n++) to[n] = sum(x[n]);
}
#endif

// The places among 16 sums of the product of row i with query j, i <= j < C, and with what reads at j, i < j.
inline constexpr int query_sum(int i, int j) { return i * C - i * (i - 1) / 2 + j - i; }
inline constexpr int reader_sum(int i, int j) { return C * (C + 1) / 2 + i * (C - 1) - i * (i - 1) / 2 + j - i - 1; }

template <bool READERS>
inline void store_dots(Vec (&sums)[16], float* dots) {
  alignas(64) float totals[16];
  sum_16(sums, totals);
  for (int i = 0; i < C; i++)
    for (int j = i; j < C; j++) {
      if (READERS && j > i) dots[j * C + i] = totals[sum_place(reader_sum(i, j))];
      dots[C * C + j * C + i] = totals[sum_place(query_sum(i, j))];
    }
}

// to: [K / 16][ROWS][16]. With a low-rank erase in two passes, of k and of b: both their sums do not fit the registers.
template <class Form>
inline void prepare_chunk(const ChunkRows& x, int64_t padded, float* prepared, float* dots) {
  constexpr int KEYS = Form::CHANNEL ? 2 * C : 0, TOTAL = 3 * C;  // places of the rows k and G_3
  constexpr bool READERS = Form::READS || Form::LOW_RANK;
  Vec sums[16] = {};
  for (int64_t c = 0; c < padded; c += LANES) {
    float* const to = prepared + c / 16 * 16 * ROWS<Form> + c % 16;
    Vec k[C], q[C], reader[C], gate[C];
    for (int j = 0; j < C; j++) {
      k[j] = load(x.k[j] + c) * x.k_scale[j];
      q[j] = load(x.q[j] + c) * x.q_scale[j];
      reader[j] = Form::LOW_RANK ? load(x.a[j] + c) : k[j];
      if constexpr (Form::CHANNEL) gate[j] = load(x.gates + j * padded + c);
    }
    Vec total = Vec{} + 1.0f;
    for (int j = 0; j < C; j++) {
      if constexpr (Form::LOW_RANK) store(to + j * 16, total * reader[j]);
      if constexpr (Form::CHANNEL) total *= gate[j];
      if constexpr (Form::CHANNEL && Form::READS) store(to + j * 16, total * reader[j]);
      store(to + (C + j) * 16, Form::CHANNEL ? total * q[j] : q[j]);
    }
    if constexpr (Form::CHANNEL) store(to + TOTAL * 16, total);
    for (int i = 0; i < C; i++) {
      Vec faded = k[i];  // D_ji k_i
      for (int j = i; j < C; j++) {
        if (Form::LOW_RANK && j > i) sums[reader_sum(i, j)] += faded * reader[j];
        if (Form::CHANNEL && j > i) faded *= gate[j];
        if (Form::READS && j > i) sums[reader_sum(i, j)] += faded * reader[j];
        sums[query_sum(i, j)] += faded * q[j];
      }
      store(to + (KEYS + i) * 16, faded);
    }
  }
  store_dots<READERS>(sums, dots);
  if constexpr (Form::LOW_RANK) {
    for (Vec& s : sums) s = Vec{};
    for (int64_t c = 0; c < padded; c += LANES) {
      float* const to = prepared + c / 16 * 16 * ROWS<Form> + (TOTAL + 1) * 16 + c % 16;
      Vec q[C], a[C], gate[C];
      for (int j = 0; j < C; j++) {
        q[j] = load(x.q[j] + c) * x.q_scale[j];
        a[j] = load(x.a[j] + c), gate[j] = load(x.gates + j * padded + c);
      }
      for (int i = 0; i < C; i++) {
        Vec faded = load(x.b[i] + c);
        for (int j = i; j < C; j++) {
          if (j > i) sums[reader_sum(i, j)] += faded * a[j];
          if (j > i) faded *= gate[j];
          sums[query_sum(i, j)] += faded * q[j];
        }
        store(to + i * 16, faded);
      }
    }
    store_dots<true>(sums, dots + 2 * C * C);
  }
}

inline void prefetch_row(const View& x, int64_t a, int64_t b, int64_t c, int64_t n) {
  const char* from = static_cast<const char*>(x.at(a, b, c));
  for (int64_t byte = 0; byte < n * element_size(x.type); byte += 64) __builtin_prefetch(from + byte, 0);
}

// Tokens [first, last) of a head: of the keys, or of the values with a gate a channel. first is a multiple of C within the
// sequence that starts at row b, token `origin`.
//   rows      scratch, of SCRATCH_ROWS rows
//   prepared  [chunk][K / 16][ROWS][16]: in pieces of 16 (zero past the end), so that one pointer and constant offsets
//             reach all of them
//   dots      [chunk][DOTS][C][C]: k_i . D_ji k_j where the rule reads, or D_j-1,i a_j, and k_i . D_ji q_j; without D where
//             the gate is a head's; then of b_i
//   cold      whether the rows must come from memory: a key head's next row lies a whole token away, where no hardware
//             prefetcher looks
template <class Form>
inline void prepare(const ScanParams& p, int64_t b, int64_t origin, int64_t first, int64_t last, int64_t head, bool cold,
                    float* rows, float* prepared, float* dots) {
  const int64_t K = p.K, padded = round_up_16(K), group = Form::CHANNEL ? p.H / p.Hk : 1, hk = head / group;
  float *const zeros = rows, *const gates = zeros + padded, *const copies = gates + (Form::CHANNEL ? C : 0) * padded;
  for (int64_t i = 0; i < padded; i++) zeros[i] = 0;
  const auto scale_of = [&](const float* row, float scale) {
    return p.use_qk_l2norm ? scale * (1.0f / std::sqrt(dot(row, row, padded) + 1e-6f)) : scale;
  };
  for (int64_t start = first; start < last; start += C, prepared += padded * ROWS<Form>, dots += DOTS<Form> * C * C) {
    ChunkRows x;
    x.gates = gates;
    for (int j = 0; j < C; j++) {
      x.k_scale[j] = x.q_scale[j] = 1;
      if (start + j >= last) {
        x.k[j] = x.q[j] = x.a[j] = x.b[j] = zeros;
        for (int64_t i = 0; i < padded && Form::CHANNEL; i++) gates[j * padded + i] = 1;
        continue;
      }
      const int64_t t = origin + start + j;
      if (cold && start + j + C < last) {
        prefetch_row(p.k, b, t + C, hk, K);
        prefetch_row(p.q, b, t + C, hk, K);
        if constexpr (Form::CHANNEL) prefetch_row(p.g, b, t + C, head, K);
        if constexpr (Form::LOW_RANK) prefetch_row(p.a, b, t + C, head, K), prefetch_row(p.b, b, t + C, head, K);
      }
      x.k[j] = float_row(p.k, b, t, hk, K, padded, copies + j * padded);
      x.q[j] = float_row(p.q, b, t, hk, K, padded, copies + (C + j) * padded);
      x.k_scale[j] = scale_of(x.k[j], 1.0f), x.q_scale[j] = scale_of(x.q[j], p.scale);
      if constexpr (Form::CHANNEL) read_gates(p.g, b, t, head, K, padded, gates + j * padded);
      if constexpr (Form::LOW_RANK) {
        x.a[j] = float_row(p.a, b, t, head, K, padded, copies + (2 * C + j) * padded);
        x.b[j] = float_row(p.b, b, t, head, K, padded, copies + (3 * C + j) * padded);
      }
      if (p.left != nullptr && head % group == 0) {
        float* const left = p.left + ((b * p.T + t) * p.Hk + hk) * K;
        for (int64_t i = 0; i < K; i++) left[i] = x.k[j][i] * x.k_scale[j];
      }
    }
    prepare_chunk<Form>(x, padded, prepared, dots);
  }
}
