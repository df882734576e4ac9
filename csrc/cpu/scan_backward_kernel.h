// The arithmetic of a scan's backward, written once and compiled for each instruction set by scan_backward.h (no include guard
// on purpose; simd.h, Item and Piece come before). `Form` is what it is compiled for: see scan_form.h.
//
// A piece is a run of L <= C = 64 tokens of one head that ends where an edit or a snapshot stands. With S the state before
// it, D the adjoint of the state after it, gates a_j, G_j = a_0 ... a_j, D_ji = a_{i+1} ... a_j and E_i = a_{i+1} ... a_{L-1}
// (products of gates, never quotients or differences of sums: a closed gate gives 0), its increments U from the forward:
//     (I + (tril(K K^T, -1) o D)^T diag(beta)) dU = dR + E K D + (tril(Q K^T) o D)^T dO      one triangular solve
//     dV = beta dU                      dQ = G dO S^T + (tril(dO U^T) o D) K
//     dK = E U D^T - G beta dU S^T + (tril(dO U^T) o D)^T Q - (F + F^T) K,   F = beta tril(dU U^T, -1) o D
//     D <- G_L D + Q^T (G dO) - K^T (G beta dU)
// dbeta and dg fall out of products that are there already. Nothing is divided: dbeta = dU . (V - what was read), not u / beta.
// A rule that does not read has no K K^T, no F, and nothing of beta dU in dK and D. With a gate of each channel, G, E and D
// stand inside the products over K: scan_backward_channels_kernel.h. A low-rank erase: scan_backward_low_rank_kernel.h.
//
// Multiply-adds of the delta rule, a token and head at K = V = 128: 8 products with a whole state (two of them rebuild S from
// U), 131 k, and about 3.5 C (K + V) / 2 = 29 k inside the piece, against 49 k of the forward. C = 64 keeps the transposes of
// S and D, the only work that is not a product, under a tenth.
//
// Predicted on one Zen 4 core at 75 of its 93 GFLOP/s: 4.3 us a token and head. Measured, one thread, least CPU time of 5 at
// T = 2,048 on a machine in use: 4.6 (8 heads), 4.9 (16), 5.5 (1, in two column blocks). A profile has a fifth of the time
// in copies of rows that lie a token apart, which nothing prefetches yet.

#include "cpu/scan_backward_products_kernel.h"
#include "cpu/scan_gates_kernel.h"
#include "cpu/transpose_kernel.h"

// ---- one piece -------------------------------------------------------------------------------------------------------

// Scratch of a thread, and the sizes it was laid out for. Rows of K are `ld_k` floats apart, rows of V `ld_v`.
struct Work {
  int64_t K, V, pk, pv, ld_k, ld_v;            // V: width of the column block; pk, pv: sizes padded to 16
  float *k, *q, *x, *y, *z;                    // [C][ld_k]
  float *u, *o, *du, *dw;                      // [C][ld_v]: U, dO, dU, -beta dU
  float *kt, *qt;                              // [pk][PC]
  float *ut, *ot, *dut;                        // [pv][PC]
  float *st, *dt;                              // [pv][ld_k]: S^T, D^T
  float *reach, *kk, *qk, *e, *f, *et;         // [C][PC]
  float* d;                                    // [pk][ld_v]: D
  float* line;                                 // a row of an input, converted
  float* states;                               // [pieces][pk][ld_v]: S before each piece
  float gate[C], beta[C], since[C], until[C];  // a_j, beta_j, G_j, E_j
  // With a gate of each channel, [C][ld_k]: a_j, G_j, E_j, E_j k_j, d_g_j.
  float *gates, *sinces, *untils, *k_end, *d_gates;
  // With a low-rank erase, of a and b what the others are of q and k, and of R what they are of U.
  float *a, *b, *b_end, *xa, *zb;  // [C][ld_k]
  float *r, *dr;                   // [C][ld_v]: R, dR
  float *bt, *rt, *drt;            // [pk][PC], [pv][PC]
  float *qb, *ab, *eb, *fb;        // [C][PC]

  // With memory == nullptr, only counts. Returns the floats taken.
  template <class Form>
  int64_t layout(int64_t key, int64_t value, int64_t pieces, float* memory) {
    K = key, V = value, pk = round_up(key, 16), pv = round_up(value, 16), ld_k = pk + 16, ld_v = pv + 16;
    int64_t used = 0;
    const auto take = [&](int64_t count) {
      float* piece = memory == nullptr ? nullptr : memory + used;
      used += round_up(count, 16);
      return piece;
    };
    for (float** m : {&k, &q, &x, &y, &z}) *m = take(C * ld_k);
    for (float** m : {&u, &o, &du, &dw}) *m = take(C * ld_v);
    for (float** m : {&kt, &qt}) *m = take(pk * PC);
    for (float** m : {&ut, &ot, &dut}) *m = take(pv * PC);
    for (float** m : {&st, &dt}) *m = take(pv * ld_k);
    for (float** m : {&reach, &kk, &qk, &e, &f, &et}) *m = take(C * PC);
    for (float** m : {&gates, &sinces, &untils, &k_end, &d_gates}) *m = take(Form::CHANNEL ? C * ld_k : 0);
    for (float** m : {&a, &b, &b_end, &xa, &zb}) *m = take(Form::LOW_RANK ? C * ld_k : 0);
    for (float** m : {&r, &dr}) *m = take(Form::LOW_RANK ? C * ld_v : 0);
    for (float** m : {&rt, &drt}) *m = take(Form::LOW_RANK ? pv * PC : 0);
    for (float** m : {&qb, &ab, &eb, &fb}) *m = take(Form::LOW_RANK ? C * PC : 0);
    bt = take(Form::LOW_RANK ? pk * PC : 0);
    d = take(pk * ld_v), line = take(std::max(pk, pv)), states = take(pieces * pk * ld_v);
    return used;
  }
};

inline void zero(float* x, int64_t n) { std::memset(x, 0, n * sizeof(float)); }

// [K, width] of a dense [K, V] matrix to the padded layout, zero without a source; and back.
inline void load_state(const Work& w, const float* from, int64_t V, float* to) {
  for (int64_t i = 0; i < w.pk; i++, to += w.ld_v) {
    const bool real = i < w.K && from != nullptr;
    if (real) std::memcpy(to, from + i * V, w.V * sizeof(float));
    zero(to + (real ? w.V : 0), w.pv - (real ? w.V : 0));
  }
}

inline void store_state(const Work& w, const float* from, int64_t V, float* to) {
  for (int64_t i = 0; i < w.K; i++) std::memcpy(to + i * V, from + i * w.ld_v, w.V * sizeof(float));
}

// The columns of the block of `count` rows of x, a [B, T, H, V] tensor, to `rows`, padded with zeros to `padded` rows.
inline void load_values(const Work& w, const Item& item, const View& x, int64_t t, int64_t count, int64_t padded,
                        float* rows) {
  for (int64_t j = 0; j < padded; j++, rows += w.ld_v) {
    const bool real = j < count && x.data != nullptr;
    if (real) convert_in(x.type, x.at(item.b, t + j, item.h, item.column), rows, w.V);
    zero(rows + (real ? w.V : 0), w.pv - (real ? w.V : 0));
  }
}

// a_j, G_j and E_j of a piece from its gates.
template <class Form>
inline void load_gates(Work& w, const Params& p, const Item& item, const Piece& piece, int64_t padded) {
  const int64_t L = piece.length, t = item.origin + piece.start;
  // A native write that is removed after its read reaches its own token's output, and nothing else.
  bool removed = false;
  for (int64_t e = piece.edit; e < piece.edit_end; e++) removed = removed || p.in.edits.kind(e).removes_after();
  if constexpr (Form::CHANNEL) {
    const int64_t ld = w.ld_k, size = w.pk;
    const auto fill = [&](float* row, float x) {
      for (int64_t i = 0; i < size; i++) row[i] = x;
    };
    for (int64_t j = 0; j < padded; j++) {
      float* const row = w.gates + j * ld;
      if (j < L) {
        read_gates(p.in.g, item.b, t + j, item.h, w.K, size, row);
      } else {
        fill(row, 1);
      }
      if (j == 0) {
        std::memcpy(w.sinces, row, size * sizeof(float));
      } else {
        multiply_rows(w.sinces + (j - 1) * ld, row, size, w.sinces + j * ld);
      }
    }
    fill(w.untils + (padded - 1) * ld, 1);
    for (int64_t j = padded - 1; j > 0; j--)
      multiply_rows(w.untils + j * ld, w.gates + j * ld, size, w.untils + (j - 1) * ld);
    if (removed) zero(w.untils + (L - 1) * ld, size);
    for (int64_t j = 0; j < padded; j++) multiply_rows(w.untils + j * ld, w.k + j * ld, size, w.k_end + j * ld);
  } else {
    for (int64_t j = 0; j < padded; j++) w.gate[j] = j < L ? std::exp(read(p.in.g, item.b, t + j, item.h)) : 1.0f;
    float total = 1;
    for (int64_t j = 0; j < padded; j++) w.since[j] = total *= w.gate[j];
    total = 1;
    for (int64_t j = padded - 1; j >= 0; j--) {
      w.until[j] = total;
      total *= w.gate[j];
    }
    if (removed) w.until[L - 1] = 0;
  }
}

// a, b, R and E_i b_i of a piece whose gates are loaded.
inline void load_erase(Work& w, const Params& p, const Item& item, const Piece& piece, int64_t padded) {
  const int64_t L = piece.length, t = item.origin + piece.start;
  for (int64_t j = 0; j < padded; j++) {
    float *const a = w.a + j * w.ld_k, *const b = w.b + j * w.ld_k;
    if (j < L) {
      read_row(p.in.a, item.b, t + j, item.h, w.K, w.pk, false, 1.0f, a);
      read_row(p.in.b, item.b, t + j, item.h, w.K, w.pk, false, 1.0f, b);
    } else {
      zero(a, w.pk), zero(b, w.pk);
    }
    multiply_rows(w.untils + j * w.ld_k, b, w.pk, w.b_end + j * w.ld_k);
  }
  // E is 1 at the last token; untils is 0 there where the native write is removed after its read, but the erase stays.
  std::memcpy(w.b_end + (L - 1) * w.ld_k, w.b + (L - 1) * w.ld_k, w.pk * sizeof(float));
  load_values(w, item, p.erased, t, L, padded, w.r);
}

// k, beta, gates and U of a piece (a, b, R), which is all the recurrence of the state needs. Returns the padded length.
template <class Form>
inline int64_t load_piece(Work& w, const Params& p, const Item& item, const Piece& piece) {
  const int64_t L = piece.length, padded = round_up(L, 8), t = item.origin + piece.start, hk = item.h / (p.in.H / p.in.Hk);
  for (int64_t j = 0; j < padded; j++) {
    if (j < L) {
      read_row(p.in.k, item.b, t + j, hk, w.K, w.pk, p.in.use_qk_l2norm, 1.0f, w.k + j * w.ld_k);
    } else {
      zero(w.k + j * w.ld_k, w.pk);
    }
    w.beta[j] = j < L ? read(p.in.beta, item.b, t + j, item.h) : 0.0f;
  }
  load_gates<Form>(w, p, item, piece, padded);
  load_values(w, item, p.right, t, L, padded, w.u);
  if constexpr (Form::LOW_RANK) load_erase(w, p, item, piece, padded);
  return padded;
}

// x <- G_L x, of a state or its adjoint.
template <class Form>
inline void decay_state(const Work& w, int64_t padded, const float* x, float* to) {
  for (int64_t i = 0; i < w.pk; i++) {
    const float gate = Form::CHANNEL ? w.sinces[(padded - 1) * w.ld_k + i] : w.since[padded - 1];
    for (int64_t c = 0; c < w.pv; c += LANES) store(to + i * w.ld_v + c, load(x + i * w.ld_v + c) * gate);
  }
}

// The state after a piece that load_piece has loaded. Spoils U.
template <class Form>
inline void advance(Work& w, const Params& p, const Item& item, const Piece& piece, int64_t padded, const float* from,
                    float* to) {
  decay_state<Form>(w, padded, from, to);
  for (int64_t j = 0; j < padded && !Form::CHANNEL; j++) scale_row(w.u + j * w.ld_v, w.until[j], w.pv);
  multiply(Form::CHANNEL ? w.k_end : w.k, w.ld_k, w.u, w.ld_v, padded, to, w.ld_v, w.pk, w.pv, true);
  if constexpr (Form::LOW_RANK) multiply(w.b_end, w.ld_k, w.r, w.ld_v, padded, to, w.ld_v, w.pk, w.pv, true);
  for (int64_t e = piece.edit; e < piece.edit_end; e++) {
    if (!p.in.edits.kind(e).adds()) continue;
    const float *left = p.in.edits.left + e * w.K, *right = p.in.edits.right + e * p.in.V + item.column;
    for (int64_t i = 0; i < w.K; i++)
      for (int64_t c = 0; c < w.V; c++) to[i * w.ld_v + c] += left[i] * right[c];
  }
}

// Runs the state over whole pieces: dense [K, V] in (null: zero) and out. `from` may be `to`.
template <class Form>
inline void sweep(const Params& p, const Item& item, const Piece* pieces, int64_t count, const float* from, float* to,
                  float* memory) {
  Work w;
  w.layout<Form>(p.in.K, item.width, 2, memory);
  const int64_t size = w.pk * w.ld_v;
  load_state(w, from, p.in.V, w.states);
  for (int64_t i = 0; i < count; i++) {
    const int64_t padded = load_piece<Form>(w, p, item, pieces[i]);
    advance<Form>(w, p, item, pieces[i], padded, w.states + i % 2 * size, w.states + (i + 1) % 2 * size);
  }
  store_state(w, w.states + count % 2 * size, p.in.V, to);
}

// What snapshots and edits at the last token of a piece take from and give to the adjoint of the state there.
inline void reverse_edits(Work& w, const Params& p, const Item& item, const Piece& piece) {
  const int64_t last = piece.length - 1, V = p.in.V;
  for (int64_t i = piece.shot; i < piece.shot_end && p.d_snapshots != nullptr; i++) {
    const float* from = p.d_snapshots + (item.shots[i] * p.in.H + item.h) * w.K * V + item.column;
    for (int64_t row = 0; row < w.K; row++)
      for (int64_t c = 0; c < w.V; c++) w.d[row * w.ld_v + c] += from[row * V + c];
  }
  const float *q = w.q + last * w.ld_k, *o = w.o + last * w.ld_v;
  for (int64_t e = piece.edit; e < piece.edit_end; e++) {
    const float *left = p.in.edits.left + e * w.K, *right = p.in.edits.right + e * V + item.column;
    float* d_left = p.d_edit_left + (e * item.blocks + item.block) * w.K;
    float* d_right = p.d_edit_right + e * V + item.column;
    zero(d_left, w.K), zero(d_right, w.V);
    if (!p.in.edits.kind(e).adds()) continue;
    const bool seen = !p.in.edits.kind(e).after();  // by the token's own query
    float read = 0, pq = 0;
    for (int64_t c = 0; c < w.V; c++) read += right[c] * o[c];
    if (!seen) read = 0;
    for (int64_t i = 0; i < w.K; i++) {
      const float* row = w.d + i * w.ld_v;
      float on_row = 0;
      for (int64_t c = 0; c < w.V; c++) {
        on_row += row[c] * right[c];
        d_right[c] += left[i] * row[c];
      }
      d_left[i] = on_row + q[i] * read;
      pq += left[i] * q[i];
    }
    for (int64_t c = 0; c < w.V && seen; c++) d_right[c] += pq * o[c];
  }
}

// dU by back substitution, blocks of 8 rows, where the rule reads; beside it -beta dU. On entry du holds the right-hand side.
template <class Form>
inline void solve(Work& w, int64_t padded, int64_t deleted) {
  for (int64_t first = padded - 8; first >= 0; first -= 8) {
    const int64_t next = first + 8;
    if constexpr (Form::READS)
      multiply(w.kk + next * PC + first, PC, w.dw + next * w.ld_v, w.ld_v, padded - next, w.du + first * w.ld_v, w.ld_v, 8,
               w.pv, true);
    for (int64_t i = next - 1; i >= first; i--) {
      float *du = w.du + i * w.ld_v, *dw = w.dw + i * w.ld_v;
      for (int64_t j = i + 1; j < next && Form::READS; j++) add_scaled(du, w.dw + j * w.ld_v, w.kk[j * PC + i], w.pv);
      if (i == deleted) zero(du, w.pv);  // no native write: nothing it was made of has a gradient
      for (int64_t c = 0; c < w.pv; c += LANES) store(dw + c, load(du + c) * -w.beta[i]);
    }
  }
}

// dbeta, dg of the piece's tokens to rows of `partial`; turns e and f into what dQ and dK take.
template <class Form>
inline void reverse_scalars(Work& w, const Params& p, const Item& item, const Piece& piece, int64_t padded, const float* s,
                            float* partial, int64_t stride) {
  const int64_t L = piece.length, t = item.origin + piece.start;
  float whole = 0;  // G_L <S, D>
  for (int64_t i = 0; i < w.pk; i++) whole += dot(s + i * w.ld_v, w.d + i * w.ld_v, w.pv);
  whole *= w.since[padded - 1];
  float on_start[C] = {}, on_end[C] = {}, between[C] = {};
  for (int64_t j = 0; j < L; j++) {
    const float* k = w.k + j * w.ld_k;
    zero(w.line, w.pv);
    convert_in(p.in.v.type, p.in.v.at(item.b, t + j, item.h, item.column), w.line, w.V);
    if constexpr (Form::READS) {
      const float read = dot(k, w.y + j * w.ld_k, w.pk);
      float d_beta = dot(w.du + j * w.ld_v, w.line, w.pv) - w.since[j] * read;
      for (int64_t i = 0; i < j; i++) d_beta -= w.kk[j * PC + i] * w.f[j * PC + i];
      partial[j * stride + 1] = d_beta;
      on_start[j] = w.since[j] * (dot(w.q + j * w.ld_k, w.x + j * w.ld_k, w.pk) - w.beta[j] * read);
    } else {
      partial[j * stride + 1] = dot(w.du + j * w.ld_v, w.line, w.pv);
      on_start[j] = w.since[j] * dot(w.q + j * w.ld_k, w.x + j * w.ld_k, w.pk);
    }
    on_end[j] = w.until[j] * dot(k, w.z + j * w.ld_k, w.pk);
  }
  // dg_l: everything that decays through token l. Sums of such terms only, so that a strong gate keeps its own precision.
  float later = 0;
  for (int64_t l = L - 1; l >= 0; l--) {
    later += on_start[l];
    float sum = whole + later;
    for (int64_t i = 0; i < l; i++) {
      float on_pair = w.qk[l * PC + i] * w.e[l * PC + i];
      if constexpr (Form::READS) on_pair -= w.beta[l] * w.kk[l * PC + i] * w.f[l * PC + i];
      between[i] += on_pair;
      sum += on_end[i] + between[i];
    }
    partial[l * stride] = sum;
  }
  for (int64_t j = 0; j < padded; j++) {
    const int64_t end = j / STEP * STEP + STEP;
    for (int64_t i = 0; i <= j; i++) {
      w.e[j * PC + i] *= w.reach[j * PC + i];
      if constexpr (Form::READS) w.f[j * PC + i] *= -w.beta[j] * w.reach[j * PC + i];
    }
    for (int64_t i = j + 1; i < end && i < padded; i++) w.e[j * PC + i] = 0;
    if constexpr (!Form::READS) continue;
    w.f[j * PC + j] = 0;
    for (int64_t i = 0; i < j; i++) w.f[i * PC + j] = w.f[j * PC + i];
  }
}

// The transposes of keys and queries, and their products, gated: kk strictly lower, qk lower, in steps.
template <class Form>
inline void head_products(Work& w, int64_t padded) {
  transpose(padded, w.pk, w.k, w.ld_k, w.kt, PC), transpose(padded, w.pk, w.q, w.ld_k, w.qt, PC);
  if constexpr (Form::READS) multiply_lower(w.kt, w.kt, w.pk, padded, w.kk);
  multiply_lower(w.qt, w.kt, w.pk, padded, w.qk);
  for (int64_t j = 0; j < padded; j++) {
    float* row = w.reach + j * PC;
    for (int64_t i = 0; i < j; i++) row[i] = row[i - PC] * w.gate[j];
    row[j] = 1;
    const int64_t end = j / STEP * STEP + STEP;
    for (int64_t i = 0; i < j; i++) {
      if constexpr (Form::READS) w.kk[j * PC + i] *= row[i];
      w.qk[j * PC + i] *= row[i];
    }
    for (int64_t i = j + 1; i < end; i++) w.qk[j * PC + i] = 0;
    for (int64_t i = j; i < end && Form::READS; i++) w.kk[j * PC + i] = 0;
  }
}

// From the products with the states and inside the piece to dQ in x and dK in z.
template <class Form>
inline void reverse_rows(Work& w, int64_t padded) {
  for (int64_t j = 0; j < padded; j++) {
    scale_row(w.x + j * w.ld_k, w.since[j], w.pk);
    scale_row(w.z + j * w.ld_k, w.until[j], w.pk);
    if constexpr (Form::READS) add_scaled(w.z + j * w.ld_k, w.y + j * w.ld_k, -w.since[j] * w.beta[j], w.pk);
  }
  transpose(padded, padded, w.e, PC, w.et, PC);
  add_upper_transposed(w.et, w.k, w.ld_k, padded, w.x, w.pk);
  add_lower_transposed(w.e, w.q, w.ld_k, padded, w.z, w.pk);
  if constexpr (Form::READS) multiply(w.f, PC, w.k, w.ld_k, padded, w.z, w.ld_k, padded, w.pk, true);
}

#include "cpu/scan_backward_channels_kernel.h"
#include "cpu/scan_backward_low_rank_kernel.h"

// One piece, from the state before it and the adjoint w.d of the state after it, which becomes that of the state before.
template <class Form>
inline void reverse_piece(Work& w, const Params& p, const Item& item, const Piece& piece, const float* s, float* partial,
                          int64_t stride) {
  const int64_t t = item.origin + piece.start, L = piece.length, hk = item.h / (p.in.H / p.in.Hk);
  const int64_t padded = load_piece<Form>(w, p, item, piece);
  for (int64_t j = 0; j < padded; j++) {
    if (j < L) {
      read_row(p.in.q, item.b, t + j, hk, w.K, w.pk, p.in.use_qk_l2norm, p.in.scale, w.q + j * w.ld_k);
    } else {
      zero(w.q + j * w.ld_k, w.pk);
    }
  }
  load_values(w, item, p.d_o, t, L, padded, w.o);
  reverse_edits(w, p, item, piece);
  int64_t deleted = -1;
  for (int64_t e = piece.edit; e < piece.edit_end; e++)
    if (p.in.edits.kind(e).removes()) deleted = L - 1;

  transpose(padded, w.pv, w.u, w.ld_v, w.ut, PC), transpose(padded, w.pv, w.o, w.ld_v, w.ot, PC);
  if constexpr (Form::LOW_RANK) {
    low_rank_products(w, L, padded);
  } else if constexpr (Form::CHANNEL) {
    channel_products<Form>(w, L, padded);
  } else {
    head_products<Form>(w, padded);
  }
  multiply(w.kt, PC, w.d, w.ld_v, w.pk, w.du, w.ld_v, padded, w.pv, false);
  load_values(w, item, p.d_right, t, L, padded, w.dw);
  for (int64_t j = 0; j < padded; j++)
    for (int64_t c = 0; c < w.pv; c += LANES)
      store(w.du + j * w.ld_v + c,
            load(w.du + j * w.ld_v + c) * (Form::CHANNEL ? 1.0f : w.until[j]) + load(w.dw + j * w.ld_v + c));
  add_lower_transposed(w.qk, w.o, w.ld_v, padded, w.du, w.pv);
  if constexpr (Form::LOW_RANK) solve_erase(w, p, item, t, L, padded);
  solve<Form>(w, padded, deleted);
  for (int64_t j = 0; j < L; j++) {
    const int64_t at = ((item.b * p.in.T + t + j) * p.in.H + item.h) * p.in.V + item.column;
    for (int64_t c = 0; c < w.pv; c += LANES) store(w.line + c, load(w.dw + j * w.ld_v + c) * -1.0f);
    convert_out(p.in.v.type, w.line, static_cast<char*>(p.d_v) + at * element_size(p.in.v.type), w.V);
  }

  if constexpr (Form::READS) transpose(padded, w.pv, w.du, w.ld_v, w.dut, PC);
  transpose(w.pk, w.pv, s, w.ld_v, w.st, w.ld_k), transpose(w.pk, w.pv, w.d, w.ld_v, w.dt, w.ld_k);
  multiply(w.ot, PC, w.st, w.ld_k, w.pv, w.x, w.ld_k, padded, w.pk, false);
  if constexpr (Form::READS) multiply(w.dut, PC, w.st, w.ld_k, w.pv, w.y, w.ld_k, padded, w.pk, false);
  multiply(w.ut, PC, w.dt, w.ld_k, w.pv, w.z, w.ld_k, padded, w.pk, false);
  multiply_lower(w.ot, w.ut, w.pv, padded, w.e);
  if constexpr (Form::READS) multiply_lower(w.dut, w.ut, w.pv, padded, w.f);
  if constexpr (Form::LOW_RANK) {
    reverse_low_rank(w, p, item, piece, padded, s, partial, stride);
  } else if constexpr (Form::CHANNEL) {
    reverse_channels<Form>(w, p, item, piece, padded, s, partial, stride);
  } else {
    reverse_scalars<Form>(w, p, item, piece, padded, s, partial, stride);
    reverse_rows<Form>(w, padded);
  }
  for (int64_t e = piece.edit; e < piece.edit_end; e++) {
    if (!p.in.edits.kind(e).adds() || p.in.edits.kind(e).after()) continue;
    const float *left = p.in.edits.left + e * w.K, *right = p.in.edits.right + e * p.in.V + item.column;
    float read = 0;
    for (int64_t c = 0; c < w.V; c++) read += right[c] * w.o[(L - 1) * w.ld_v + c];
    for (int64_t i = 0; i < w.K; i++) w.x[(L - 1) * w.ld_k + i] += read * left[i];
  }
  for (int64_t j = 0; j < L; j++) {
    std::memcpy(partial + j * stride + 16, w.x + j * w.ld_k, w.pk * sizeof(float));
    std::memcpy(partial + j * stride + 16 + w.pk, w.z + j * w.ld_k, w.pk * sizeof(float));
    if constexpr (Form::CHANNEL)
      std::memcpy(partial + j * stride + 16 + 2 * w.pk, w.d_gates + j * w.ld_k, w.pk * sizeof(float));
    if constexpr (Form::LOW_RANK) {
      std::memcpy(partial + j * stride + 16 + 3 * w.pk, w.xa + j * w.ld_k, w.pk * sizeof(float));
      std::memcpy(partial + j * stride + 16 + 4 * w.pk, w.zb + j * w.ld_k, w.pk * sizeof(float));
    }
  }

  for (int64_t j = 0; j < padded; j++) {
    if constexpr (Form::CHANNEL) {
      multiply_rows(w.q + j * w.ld_k, w.sinces + j * w.ld_k, w.pk, w.q + j * w.ld_k);
      if constexpr (Form::LOW_RANK)
        if (j > 0) multiply_rows(w.a + j * w.ld_k, w.sinces + (j - 1) * w.ld_k, w.pk, w.a + j * w.ld_k);
      if constexpr (Form::READS) multiply_rows(w.k + j * w.ld_k, w.sinces + j * w.ld_k, w.pk, w.k + j * w.ld_k);
    } else {
      scale_row(w.o + j * w.ld_v, w.since[j], w.pv);
      if constexpr (Form::READS) scale_row(w.dw + j * w.ld_v, w.since[j], w.pv);
    }
  }
  decay_state<Form>(w, padded, w.d, w.d);
  multiply(w.q, w.ld_k, w.o, w.ld_v, padded, w.d, w.ld_v, w.pk, w.pv, true);
  if constexpr (Form::LOW_RANK) multiply(w.a, w.ld_k, w.dr, w.ld_v, padded, w.d, w.ld_v, w.pk, w.pv, true);
  if constexpr (Form::READS) multiply(w.k, w.ld_k, w.dw, w.ld_v, padded, w.d, w.ld_v, w.pk, w.pv, true);
}

// The pieces of one segment of one head's column block, last to first. `start`: state before the segment; `d_end` and
// `d_start`: adjoints after and before it (dense [K, V]; null: zero; they may be the same). Row (token - segment's first) *
// stride of `partial` gets [dg, dbeta, ..., dq (16 on), dk, dg of channels, da, db]: of used queries and keys, summed by
// `finish`.
template <class Form>
inline void reverse(const Params& p, const Item& item, const Piece* pieces, int64_t count, const float* start,
                    const float* d_end, float* d_start, float* partial, int64_t stride, float* memory) {
  Work w;
  w.layout<Form>(p.in.K, item.width, count, memory);
  const int64_t size = w.pk * w.ld_v;
  load_state(w, start, p.in.V, w.states);
  for (int64_t i = 0; i + 1 < count; i++) {
    const int64_t padded = load_piece<Form>(w, p, item, pieces[i]);
    advance<Form>(w, p, item, pieces[i], padded, w.states + i * size, w.states + (i + 1) * size);
  }
  load_state(w, d_end, p.in.V, w.d);
  for (int64_t i = count - 1; i >= 0; i--)
    reverse_piece<Form>(w, p, item, pieces[i], w.states + i * size, partial + (pieces[i].start - pieces[0].start) * stride,
                        stride);
  store_state(w, w.d, p.in.V, d_start);
}

// Floats of scratch that `sweep` and `reverse` need.
template <class Form>
inline int64_t memory_size(int64_t K, int64_t width, int64_t pieces) {
  return Work().layout<Form>(K, width, pieces, nullptr);
}

// ---- from parts to gradients -----------------------------------------------------------------------------------------

// The gradient of a row as it came in, from that of the row as used (normalised when asked, times scale), in place.
inline void unread_row(const View& x, int64_t a, int64_t b, int64_t c, int64_t K, int64_t padded, bool normalise,
                       float scale, float* raw, float* d) {
  if (!normalise) {
    scale_row(d, scale, padded);
    return;
  }
  convert_in(x.type, x.at(a, b, c), raw, K);
  zero(raw + K, padded - K);
  const float inverse = 1.0f / std::sqrt(dot(raw, raw, padded) + 1e-6f);
  scale_row(raw, inverse, padded);
  const float along = dot(raw, d, padded);
  for (int64_t i = 0; i < padded; i += LANES) store(d + i, (load(d + i) - along * load(raw + i)) * (inverse * scale));
}

// One token of key head hk: parts [value head of the group][block][stride] summed in that order. memory: 6 padded rows.
template <class Form>
inline void finish(const Params& p, int64_t b, int64_t t, int64_t hk, const float* parts, int64_t blocks, int64_t stride,
                   float* memory) {
  const int64_t K = p.in.K, padded = round_up(K, 16), group = p.in.H / p.in.Hk, row = (b * p.in.T + t) * p.in.Hk + hk;
  float *dq = memory, *dk = memory + padded, *raw = memory + 2 * padded, *dg = memory + 3 * padded;
  float *da = dg + padded, *db = da + padded;
  zero(dq, padded), zero(dk, padded);
  if (p.d_left != nullptr) std::memcpy(dk, p.d_left + row * K, K * sizeof(float));
  for (int64_t i = 0; i < group; i++) {
    float scalars[2] = {0, 0};
    if constexpr (Form::CHANNEL) zero(dg, padded);
    if constexpr (Form::LOW_RANK) zero(da, padded), zero(db, padded);
    for (int64_t c = 0; c < blocks; c++, parts += stride) {
      scalars[0] += parts[0], scalars[1] += parts[1];
      add_scaled(dq, parts + 16, 1.0f, padded);
      add_scaled(dk, parts + 16 + padded, 1.0f, padded);
      if constexpr (Form::CHANNEL) add_scaled(dg, parts + 16 + 2 * padded, 1.0f, padded);
      if constexpr (Form::LOW_RANK) {
        add_scaled(da, parts + 16 + 3 * padded, 1.0f, padded);
        add_scaled(db, parts + 16 + 4 * padded, 1.0f, padded);
      }
    }
    const int64_t at = row * group + i;
    if constexpr (Form::LOW_RANK) {
      convert_out(p.in.a.type, da, static_cast<char*>(p.d_a) + at * K * element_size(p.in.a.type), K);
      convert_out(p.in.b.type, db, static_cast<char*>(p.d_b) + at * K * element_size(p.in.b.type), K);
    }
    const int64_t gates = Form::CHANNEL ? K : 1;
    convert_out(p.in.g.type, Form::CHANNEL ? dg : scalars,
                static_cast<char*>(p.d_g) + at * gates * element_size(p.in.g.type), gates);
    convert_out(p.in.beta.type, scalars + 1, static_cast<char*>(p.d_beta) + at * element_size(p.in.beta.type), 1);
  }
  unread_row(p.in.q, b, t, hk, K, padded, p.in.use_qk_l2norm, p.in.scale, raw, dq);
  unread_row(p.in.k, b, t, hk, K, padded, p.in.use_qk_l2norm, 1.0f, raw, dk);
  convert_out(p.in.q.type, dq, static_cast<char*>(p.d_q) + row * K * element_size(p.in.q.type), K);
  convert_out(p.in.k.type, dk, static_cast<char*>(p.d_k) + row * K * element_size(p.in.k.type), K);
}
