// The kernels of a scan (scan.h), written once and compiled for each instruction set by scan_forward.h (no include guard on
// purpose). `Form` is what they are compiled for: see scan_form.h.
//
// Given k, q, beta and g, the value columns of a head do not meet: a column block of the state, [K, W] with W = 32 floats on
// AVX-512 (16 KB at K = 128, inside the first-level cache), runs through all tokens by itself. So an item of work is
// (sequence, head, column block), and one head alone already feeds several threads.
//
// Tokens go in micro-chunks of C = 4, so that the block is read and written once for four tokens. With S the state before
// the chunk, a_j the gates, G_j = a_0 ... a_j and D_ji = a_{i+1} ... a_j (products of gates, never a quotient; diagonal
// matrices with a gate a channel), and without what the middle takes away where the rule does not read:
//     u_j = beta_j (v_j - S^T G_j k_j - sum_{i<j}  (k_i . D_ji k_j) u_i)
//     o_j =               S^T G_j q_j + sum_{i<=j} (k_i . D_ji q_j) u_i
//     S  <- G_3 S + sum_i D_3i k_i u_i^T
// The last line of one chunk and the products S^T k, S^T q of the next are a single pass over the rows of S (`advance`):
// of the delta rule 3 multiply-adds a state element and token and one load and one store for four tokens, 98 kFLOP a token
// and head at 128 x 128 where the chunked form with C = 64 takes 164. Everything of K alone (normalising, gates of channels,
// the dot products) is done once per key head, or value head with a gate a channel, and tile of tokens by `prepare`.
//
// Predicted for the delta rule on one Zen 4 core (GEMM: 93 GFLOP/s): 26 vector operations a row for 24 useful ones, so 86;
// less about 10 % for `prepare` and the triangular part: 77. Measured, one thread, CPU time: 80 with one head at T = 2,048,
// 55-60 with 16 heads on a machine that others kept busy, where a token's row is 8 KB from the next one's: cache misses on
// v and o took 29 % of the time there before lines were prefetched, and 8 % after. transformers' chunked fallback: 5.0-6.0 times the
// CPU time.
//
// A low-rank erase is a second write of each token, b_j r_j^T, and the rows a_j take the place of the keys that read. They
// stand before their token's gate, D_j-1,i being the decay up to there:
//     r_j = S^T G_j-1 a_j + sum_{i<j}  (a_j . D_j-1,i b_i) r_i + (a_j . D_j-1,i k_i) u_i
//     o_j = S^T G_j q_j   + sum_{i<=j} (q_j . D_ji b_i) r_i    + (q_j . D_ji k_i) u_i
//     S  <- G_3 S + sum_i D_3i (b_i r_i^T + k_i u_i^T)
//
// A micro-chunk that holds an edit or a snapshot goes token by token (`token`); the others pay nothing for it.

#include "cpu/scan_gates_kernel.h"
#include "cpu/scan_prepare_kernel.h"

// r, o and u of four tokens take 12 registers a vector of columns: two vectors fit 32 registers, one fits 16.
#if defined(__aarch64__)
constexpr int VECTORS = 2;
#else
constexpr int VECTORS = LANES == 16 ? 2 : 1;
#endif

constexpr int64_t PASS = 64;  // rows of the state that stay in the first-level cache from a write to a reading

// Element i of a prepared row (step ROWS) or of a plain row (step 1).
inline float element(const float* row, int64_t step, int64_t i) { return row[i / 16 * 16 * step + i % 16]; }

// ---- one column block ----------------------------------------------------------------------------------------------

// What of the last micro-chunk has not been put into the state yet.
template <class Form, int NV>
struct Pending {
  float gate;                   // G_3, where it is a head's
  const float* prepared;        // its rows
  Vec u[Form::WRITES * C][NV];  // D_3i u_i, or u_i where the rows have D_3i; then r_i of a low-rank erase
};

// Lines of memory to bring near during a pass, one a row of the state: all at once would take every line that a core can wait
// for, and what the pass itself reads would queue behind them.
struct Lines {
  static constexpr int64_t MOST = 128;
  int64_t count = 0;
  const char* at[MOST];

  void add(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes && count < MOST; i += 64) at[count++] = static_cast<const char*>(from) + i;
  }
};

// Row of the pending increment i, counted from that of k_0: those of b come after G_3.
inline constexpr int row_of(int i) { return i < C ? i : i + 1; }

// S <- G_3 S + sum_i D_3i k_i u_i^T for the pending chunk, and r_j = S^T k_j (where the rule reads; S^T a_j), o_j = S^T q_j for
// the next, in one pass. With a low-rank erase in two over each PASS rows, since its writes and readings do not fit the
// registers together.
template <class Form, int NV>
inline void advance(float* state, int64_t K, const Pending<Form, NV>& pending, const float* next, const Lines& lines,
                    Vec (&r)[C][NV], Vec (&o)[C][NV]) {
  constexpr int SKIP = 16 * (ROWS<Form> - 1), INCREMENTS = Form::WRITES * C;
  Vec u[INCREMENTS][NV], rk[C][NV], oq[C][NV];
  for (int j = 0; j < INCREMENTS; j++)
    for (int n = 0; n < NV; n++) u[j][n] = pending.u[j][n];
  for (int j = 0; j < C; j++)
    for (int n = 0; n < NV; n++) rk[j][n] = oq[j][n] = Vec{};
  const float gate = pending.gate;
  const float* past = pending.prepared + (Form::CHANNEL ? 2 * C * 16 : 0);
  const char *const *line = lines.at, *const *const lines_end = lines.at + lines.count;
  const auto write = [&](Vec(&s)[NV]) {
    if (line < lines_end) __builtin_prefetch(*line++, 0, 2);
    for (int n = 0; n < NV; n++) s[n] = load(state + n * LANES) * (Form::CHANNEL ? past[C * 16] : gate);
    for (int j = 0; j < INCREMENTS; j++)
      for (int n = 0; n < NV; n++) s[n] += past[row_of(j) * 16] * u[j][n];
    for (int n = 0; n < NV; n++) store(state + n * LANES, s[n]);
  };
  const auto read = [&](const Vec(&s)[NV]) {
    for (int j = 0; j < C; j++)
      for (int n = 0; n < NV; n++) {
        if constexpr (Form::READS || Form::LOW_RANK) rk[j][n] += next[j * 16] * s[n];
        oq[j][n] += next[(C + j) * 16] * s[n];
      }
  };
  if constexpr (Form::LOW_RANK) {
    for (int64_t first = 0; first < K; first += PASS) {
      const int64_t last = K - first < PASS ? K : first + PASS;
      float* const rows = state;
      Vec s[NV];
      for (int64_t i = first; i < last; i += 16, past += SKIP)
        for (const float* end = past + (last - i < 16 ? last - i : 16); past < end; past++, state += NV * LANES) write(s);
      state = rows;
      for (int64_t i = first; i < last; i += 16, next += SKIP)
        for (const float* end = next + (last - i < 16 ? last - i : 16); next < end; next++, state += NV * LANES) {
          for (int n = 0; n < NV; n++) s[n] = load(state + n * LANES);
          read(s);
        }
    }
  } else {
    for (int64_t i = 0; i < K; i += 16, past += SKIP, next += SKIP)
      for (const float* end = past + (K - i < 16 ? K - i : 16); past < end; past++, next++, state += NV * LANES) {
        Vec s[NV];
        write(s);
        read(s);
      }
  }
  for (; line < lines_end; line++) __builtin_prefetch(*line, 0, 2);
  for (int j = 0; j < C; j++)
    for (int n = 0; n < NV; n++) {
      r[j][n] = rk[j][n];
      o[j][n] = oq[j][n];
    }
}

template <class Form, int NV>
inline void flush(float* state, int64_t K, Pending<Form, NV>& pending, const float* nothing) {
  const float* past = pending.prepared + (Form::CHANNEL ? 2 * C * 16 : 0);
  for (int64_t i = 0; i < K; i++)
    for (int n = 0; n < NV; n++) {
      const float gate = Form::CHANNEL ? element(past + C * 16, ROWS<Form>, i) : pending.gate;
      Vec s = load(state + (i * NV + n) * LANES) * gate;
      for (int j = 0; j < Form::WRITES * C; j++) s += element(past + row_of(j) * 16, ROWS<Form>, i) * pending.u[j][n];
      store(state + (i * NV + n) * LANES, s);
    }
  pending = {1.0f, nothing, {}};
}

// What a token brings: keys, queries, and a and b of a low-rank erase, laid out as `element` says with this step; gates of the
// channels, or the one of the head.
struct TokenRows {
  const float *k, *q, *gates, *a, *b;
  int64_t step;
};

// One token on a block of the state: rows `row` floats apart. Edits [first, last) act on it. Returns the increment in u, what
// a low-rank erase reads in r, and the reading in o. `side` holds NV * LANES floats. Always inline: a step's `step` is 1, and
// rows a constant apart are worth a tenth of its time.
template <class Form, int NV>
[[gnu::always_inline]] inline void token(float* state, int64_t row, int64_t K, int64_t V, const TokenRows& x, float beta,
                                         const Vec* v, const EditList& edits, int64_t first, int64_t last, int64_t column,
                                         int64_t width, float* side, Vec* u, Vec* r, Vec* o) {
  const float *k = x.k, *q = x.q, *gates = x.gates;
  const int64_t step = x.step;
  // A gate of the head multiplies what was read, one of a channel what is read.
  const float gate = Form::CHANNEL ? 1.0f : gates[0];
  Vec rk[NV] = {}, oq[NV] = {};
  float kq = 0, bq = 0;
  for (int64_t i = 0; i < K; i++) {
    for (int n = 0; n < NV; n++) {
      Vec s = load(state + i * row + n * LANES);
      if constexpr (Form::LOW_RANK) rk[n] += element(x.a, step, i) * s;
      if constexpr (Form::CHANNEL) s *= gates[i];
      if constexpr (Form::READS) rk[n] += element(k, step, i) * s;
      oq[n] += element(q, step, i) * s;
    }
    kq += element(k, step, i) * element(q, step, i);
    if constexpr (Form::LOW_RANK) bq += element(x.b, step, i) * element(q, step, i);
  }
  bool native = true, kept = true;
  for (int64_t e = first; e < last; e++) {
    native = native && !edits.kind(e).removes();
    kept = kept && !edits.kind(e).removes_after();
  }
  for (int n = 0; n < NV; n++) {
    u[n] = native ? beta * (Form::READS ? v[n] - gate * rk[n] : v[n]) : Vec{};
    o[n] = gate * oq[n] + kq * u[n];
    if constexpr (Form::LOW_RANK) r[n] = rk[n], o[n] += bq * rk[n];
  }
  for (int64_t i = 0; i < K; i++)
    for (int n = 0; n < NV; n++) {
      float* at = state + i * row + n * LANES;
      Vec s = load(at) * (Form::CHANNEL ? gates[i] : gate);
      if constexpr (Form::LOW_RANK) s += element(x.b, step, i) * rk[n];
      store(at, kept ? s + element(k, step, i) * u[n] : s);
    }
  for (int64_t e = first; e < last; e++) {
    if (!edits.kind(e).adds()) continue;
    const float* left = edits.left + e * K;
    for (int64_t c = 0; c < NV * LANES; c++) side[c] = c < width ? edits.right[e * V + column + c] : 0.0f;
    float pq = 0;
    for (int64_t i = 0; i < K; i++) {
      pq += left[i] * element(q, step, i);
      for (int n = 0; n < NV; n++) {
        float* at = state + i * row + n * LANES;
        store(at, load(at) + left[i] * load(side + n * LANES));
      }
    }
    for (int n = 0; n < NV && !edits.kind(e).after(); n++) o[n] += pq * load(side + n * LANES);
  }
}

template <int NV>
inline void copy_block(float* block, float* state, int64_t K, int64_t V, int64_t width, bool out) {
  for (int64_t i = 0; i < K; i++, block += NV * LANES, state += V) {
    if (out) {
      std::memcpy(state, block, width * sizeof(float));
    } else {
      std::memcpy(block, state, width * sizeof(float));
      for (int64_t c = width; c < NV * LANES; c++) block[c] = 0;
    }
  }
}

// The first `width` columns of x, converted. `line` holds NV * LANES floats.
template <int NV>
inline void write(const Vec* x, Element type, void* to, int64_t width, float* line) {
  if (type == Element::f32 && width == NV * LANES) {
    for (int n = 0; n < NV; n++) store(static_cast<float*>(to) + n * LANES, x[n]);
    return;
  }
  for (int n = 0; n < NV; n++) store(line + n * LANES, x[n]);
  convert_out(type, line, to, width);
}

// What a block will want of memory after the chunk at `start`: the lines that the next chunk's values come from and its results
// go to, and with item.ahead its share of the rows that `prepare` reads so many tokens later. A token's row lies far from the
// next token's, where no hardware prefetcher looks.
template <class Form>
inline void collect(const ScanParams& p, const Item& item, int64_t start, int64_t column, int64_t width, Lines& lines) {
  lines.count = 0;
  for (int64_t t = start + C; t < start + 2 * C && t < item.until; t++) {
    const int64_t at = ((item.b * p.T + item.origin + t) * p.H + item.h) * p.V + column;
    lines.add(p.v.at(item.b, item.origin + t, item.h, column), width * element_size(p.v.type));
    lines.add(static_cast<const char*>(p.o) + at * element_size(p.o_type), width * element_size(p.o_type));
    for (const float* written : {p.right, Form::LOW_RANK ? p.erased : nullptr})
      if (written != nullptr) lines.add(written + at, width * sizeof(float));
  }
  if (item.ahead == 0) return;
  const int64_t hk = item.h / (p.H / p.Hk);
  const View* const rows[] = {&p.k, &p.q, &p.g, &p.a, &p.b};
  for (int64_t t = start + item.ahead; t < start + item.ahead + C && t < item.until; t++)
    for (int64_t i = (t + item.block) % item.blocks; i < (Form::LOW_RANK ? 5 : 3); i += item.blocks)
      lines.add(rows[i]->at(item.b, item.origin + t, i < 2 ? hk : item.h), p.K * element_size(rows[i]->type));
}

// Floats of scratch of `run_block` on blocks of `width` columns.
template <class Form>
inline int64_t block_memory(int64_t K, int64_t width) {
  const int64_t padded = round_up_16(K), pending = (Form::WRITES * C + 1) * width + 16;
  return pending + (K + 2 * C + 1) * width + padded * (ROWS<Form> + (Form::CHANNEL ? 3 : 0) + (Form::LOW_RANK ? 2 : 0));
}

// memory: [what is pending | K * W state | a chunk of nothing, prepared | 2 * C * W values and results | W edit side | 3 rows
// of one token, with a gate a channel, and 2 more with a low-rank erase], 64-byte aligned. From a call that does not store the
// state to the next, which does not load it, the memory stays as it is, and the last chunk's prepared rows.
template <class Form, int NV>
inline void run_block(const ScanParams& p, Item item, int64_t column, float* memory) {
  constexpr int W = NV * LANES;
  static_assert(sizeof(Pending<Form, NV>) <= ((Form::WRITES * C + 1) * W + 16) * sizeof(float));
  const int64_t K = p.K, V = p.V, padded = round_up_16(K), width = V - column < W ? V - column : W;
  Pending<Form, NV>& kept = *reinterpret_cast<Pending<Form, NV>*>(memory);
  float* state = memory + round_up_16(((Form::WRITES * C + 1) * W));
  float* nothing = state + K * W;
  float* values = nothing + padded * ROWS<Form>;
  float* results = values + C * W;
  float* side = results + C * W;
  float* alone = side + W;
  float* carried = p.final_state + (item.n * p.H + item.h) * K * V + column;
  if (item.load) {
    for (int64_t i = 0; i < padded * ROWS<Form>; i++) nothing[i] = Form::CHANNEL && i / 16 % ROWS<Form> == 3 * C ? 1 : 0;
    kept = {1.0f, nothing, {}};
    if (item.first > 0) {
      copy_block<NV>(state, carried, K, V, width, false);
    } else if (p.initial_state != nullptr) {
      const float* start = p.initial_state + (item.n * p.H + item.h) * K * V + column;
      copy_block<NV>(state, const_cast<float*>(start), K, V, width, false);
    } else {
      for (int64_t i = 0; i < K * W; i++) state[i] = 0;
    }
  }
  Pending<Form, NV> pending = kept;
  Lines lines;
  const float* prepared = item.prepared;
  const float* dots = item.dots;
  for (int64_t start = item.first; start < item.last;
       start += C, prepared += padded * ROWS<Form>, dots += DOTS<Form> * C * C) {
    collect<Form>(p, item, start, column, width, lines);
    const int count = item.last - start < C ? static_cast<int>(item.last - start) : C;
    const float* gate = item.gate + (start - item.first);
    const float* beta = item.beta + (start - item.first);
    Vec v[C][NV];
    for (int j = 0; j < C; j++) {
      float* row = values + j * W;
      if (j < count && width == W && p.v.type == Element::f32) {
        const float* from = static_cast<const float*>(p.v.at(item.b, item.origin + start + j, item.h, column));
        for (int n = 0; n < NV; n++) v[j][n] = load(from + n * LANES);
        continue;
      }
      for (int64_t c = j < count ? width : 0; c < W; c++) row[c] = 0;
      if (j < count) convert_in(p.v.type, p.v.at(item.b, item.origin + start + j, item.h, column), row, width);
      for (int n = 0; n < NV; n++) v[j][n] = load(row + n * LANES);
    }
    Vec u[C][NV], r[C][NV], o[C][NV];
    const bool edited = item.edit < item.edit_end && p.edits.index[item.edit * 4 + 1] < start + count;
    const bool wanted = item.shots < item.shots_end && p.places[*item.shots * 2 + 1] < start + count;
    if (edited || wanted) {
      flush<Form, NV>(state, K, pending, nothing);
      for (int j = 0; j < count; j++) {
        int64_t edit = item.edit;
        while (edit < item.edit_end && p.edits.index[edit * 4 + 1] == start + j) edit++;
        TokenRows rows = {prepared + j * 16, prepared + (C + j) * 16, gate + j, nullptr, nullptr, ROWS<Form>};
        if constexpr (Form::CHANNEL) {  // what is prepared has the gates of earlier tokens in it
          const int64_t t = item.origin + start + j, hk = item.h / (p.H / p.Hk);
          read_row(p.k, item.b, t, hk, K, padded, p.use_qk_l2norm, 1.0f, alone);
          read_row(p.q, item.b, t, hk, K, padded, p.use_qk_l2norm, p.scale, alone + padded);
          read_gates(p.g, item.b, t, item.h, K, padded, alone + 2 * padded);
          rows = {alone, alone + padded, alone + 2 * padded, alone + 3 * padded, alone + 4 * padded, 1};
          if constexpr (Form::LOW_RANK) {
            read_row(p.a, item.b, t, item.h, K, padded, false, 1.0f, alone + 3 * padded);
            read_row(p.b, item.b, t, item.h, K, padded, false, 1.0f, alone + 4 * padded);
          }
        }
        token<Form, NV>(state, W, K, V, rows, beta[j], v[j], p.edits, item.edit, edit, column, width, side, u[j], r[j],
                        o[j]);
        item.edit = edit;
        for (; item.shots < item.shots_end && p.places[*item.shots * 2 + 1] == start + j; item.shots++)
          copy_block<NV>(state, p.snapshots + (*item.shots * p.H + item.h) * K * V + column, K, V, width, true);
      }
    } else {
      advance<Form, NV>(state, K, pending, prepared, lines, r, o);
      float since[C];  // D_ji for the present j, where it is a head's; a gate past the end counts as 1, a beta as 0
      float total = 1;
      for (int j = 0; j < C; j++) {
        const float a = j < count && !Form::CHANNEL ? gate[j] : 1.0f;
        const float b = j < count ? beta[j] : 0.0f;
        total *= a;
        for (int i = 0; i < j; i++) since[i] *= a;
        since[j] = 1;
        for (int n = 0; n < NV; n++) {
          Vec rest = v[j][n];
          if constexpr (Form::READS) rest -= total * r[j][n];
          Vec out = total * o[j][n];
          if constexpr (Form::LOW_RANK) {
            for (int i = 0; i < j; i++) {
              r[j][n] += dots[j * C + i] * u[i][n] + dots[2 * C * C + j * C + i] * r[i][n];
              out += dots[3 * C * C + j * C + i] * r[i][n];
            }
            out += dots[3 * C * C + j * C + j] * r[j][n];
          }
          for (int i = 0; i < j; i++) {
            if constexpr (Form::READS) rest -= (since[i] * dots[j * C + i]) * u[i][n];
            out += (since[i] * dots[C * C + j * C + i]) * u[i][n];
          }
          u[j][n] = b * rest;
          o[j][n] = out + dots[C * C + j * C + j] * u[j][n];
        }
      }
      pending.gate = total;
      pending.prepared = prepared;
      for (int i = 0; i < C; i++)
        for (int n = 0; n < NV; n++) {
          pending.u[i][n] = since[i] * u[i][n];
          if constexpr (Form::LOW_RANK) pending.u[C + i][n] = r[i][n];
        }
    }
    for (int j = 0; j < count; j++) {
      const int64_t at = ((item.b * p.T + item.origin + start + j) * p.H + item.h) * V + column;
      write<NV>(o[j], p.o_type, static_cast<char*>(p.o) + at * element_size(p.o_type), width, results);
      if (p.right != nullptr) write<NV>(u[j], Element::f32, p.right + at, width, results);
      if (Form::LOW_RANK && p.erased != nullptr) write<NV>(r[j], Element::f32, p.erased + at, width, results);
    }
  }
  if (!item.store) {
    kept = pending;
    return;
  }
  flush<Form, NV>(state, K, pending, nothing);
  copy_block<NV>(state, carried, K, V, width, true);
}

template <class Form>
inline void run_columns(const ScanParams& p, const Item& item, int64_t column, int vectors, float* memory) {
  // A narrow last block takes single vectors.
  if (VECTORS == 2 && vectors == 2 && p.V - column > LANES) return run_block<Form, VECTORS>(p, item, column, memory);
  run_block<Form, 1>(p, item, column, memory);
}

// ---- one token -----------------------------------------------------------------------------------------------------

// All columns of (row b, value head h). memory: 3 padded rows of K, 5 with a low-rank erase, W edit side, and a [K, W] block
// for a ragged end.
template <class Form>
inline void step_head(const ScanStepParams& p, int64_t b, int64_t h, int64_t first, int64_t last, float* memory) {
  constexpr int W = VECTORS * LANES;
  const int64_t K = p.K, V = p.V, padded = round_up_16(K), hk = h / (p.H / p.Hk);
  float* k = memory;
  float* q = k + padded;
  float* gates = q + padded;
  float *a = gates + padded, *erase = a + padded;
  float* side = Form::LOW_RANK ? erase + padded : a;
  float* block = side + W;
  read_row(p.k, b, hk, 0, K, padded, p.use_qk_l2norm, 1.0f, k);
  read_row(p.q, b, hk, 0, K, padded, p.use_qk_l2norm, p.scale, q);
  if (p.left != nullptr && h % (p.H / p.Hk) == 0) std::memcpy(p.left + (b * p.Hk + hk) * K, k, K * sizeof(float));
  if constexpr (Form::CHANNEL) {
    read_gates(p.g, b, h, 0, K, padded, gates);
  } else {
    gates[0] = std::exp(read(p.g, b, h, 0));
  }
  if constexpr (Form::LOW_RANK) {
    read_row(p.a, b, h, 0, K, padded, false, 1.0f, a);
    read_row(p.b, b, h, 0, K, padded, false, 1.0f, erase);
  }
  const TokenRows rows = {k, q, gates, a, erase, 1};
  const float beta = read(p.beta, b, h, 0);
  for (int64_t column = 0; column < V; column += W) {
    const int64_t width = V - column < W ? V - column : W, at = (b * p.H + h) * V + column;
    float* state = p.state + (b * p.H + h) * K * V + column;
    alignas(64) float line[W] = {};
    convert_in(p.v.type, p.v.at(b, h, column), line, width);
    Vec v[VECTORS], u[VECTORS], r[VECTORS], o[VECTORS];
    for (int n = 0; n < VECTORS; n++) v[n] = load(line + n * LANES);
    if (width == W) {
      token<Form, VECTORS>(state, V, K, V, rows, beta, v, p.edits, first, last, column, width, side, u, r, o);
    } else {
      copy_block<VECTORS>(block, state, K, V, width, false);
      token<Form, VECTORS>(block, W, K, V, rows, beta, v, p.edits, first, last, column, width, side, u, r, o);
      copy_block<VECTORS>(block, state, K, V, width, true);
    }
    write<VECTORS>(o, p.o_type, static_cast<char*>(p.o) + at * element_size(p.o_type), width, line);
    if (p.right != nullptr) write<VECTORS>(u, Element::f32, p.right + at, width, line);
    if (Form::LOW_RANK && p.erased != nullptr) write<VECTORS>(r, Element::f32, p.erased + at, width, line);
  }
}
