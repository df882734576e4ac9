// The arithmetic, written once and compiled for each instruction set by sae_training.cpp (no include guard on purpose).
//
// A chunk is 32 rows of one head. Its codes name u distinct features, far fewer than 32 k because a state remembers; only
// they are touched. With the state S_0 before the chunk and rows (l_s, r_s), S_t = gamma_t S_0 + sum_s D_ts l_s r_s^T, so
// for the gradients g_i(t) of the activations v_i^T S_t w_i, with G_i(s) = sum_t g_i(t) D_ts and c_i = sum_t g_i(t) gamma_t,
//   dv_i = c_i S_0 w_i + sum_s G_i(s) (r_s . w_i) l_s,    dw_i = c_i S_0^T v_i + sum_s G_i(s) (v_i . l_s) r_s.
// Nothing is carried from chunk to chunk but the state, and every sum is a small matrix product: see gemm.h.
//
// Ways to the same sums, FLOP a token at K = V = 128, F = 2,048, k = 32, for one pair of factors (encoder or decoder):
//   reverse scan of G over the whole sequence, dense in F: 4 (K + V) F = 2.1 M, whatever the codes;
//   S_t w_i and S_t^T v_i for every firing: 4 K V k = 2.1 M, whatever the codes;
//   this: u (4 K V / 32 + 4 (K + V)) = 3,072 u: 0.56 M at u = 183 (measured, states that forget 5 % a token), 0.31 M at
//   u = 101 (1 %), 1.3 M at u = 425 (25 %). Longer chunks save on the state and lose on u: 16, 32 and 64 are within 10 %.
// The Gram matrices of the codes' atoms: 4 k^2 (K + V) = 1.05 M a token on its own; tokens are taken together while their
// common atoms make that cheaper (0.7 M).

#include "cpu/gemm.h"
#include "cpu/transpose_kernel.h"

// ---- loading ---------------------------------------------------------------------------------------------------------

inline void load_padded(Element type, const void* from, int64_t size, int64_t padded, float* to) {
  convert_in(type, from, to, size);
  for (int64_t i = size; i < padded; i++) to[i] = 0;
}

inline void pointers(float* first, int64_t stride, int64_t count, float** to) {
  for (int64_t i = 0; i < count; i++) to[i] = first + i * stride;
}

// Rows, their decays, and at a sequence's start the state.
inline void load_chunk(const SaeTrainingParams& p, int64_t h, const Block& block, const Chunk& chunk, Work& w) {
  const EncodeParams& e = p.rows;
  if (chunk.begin >= 0) {
    w.fresh = p.initial == nullptr;
    w.reach = 1;
    std::memset(w.state, 0, w.Kp * w.ldv * sizeof(float));
    std::memset(w.state_t, 0, w.Vp * w.ldk * sizeof(float));
    if (!w.fresh) {
      const float* from = p.initial + (chunk.begin * e.H + e.heads[h]) * e.K * e.V;
      for (int64_t i = 0; i < e.K; i++) std::memcpy(w.state + i * w.ldv, from + i * e.V, e.V * sizeof(float));
      transpose(w.Kp, w.Vp, w.state, w.ldv, w.state_t, w.ldk);
    }
  }
  float* left = w.left();
  float* right = w.right();
  for (int64_t s = 0; s < CHUNK; s++) {
    if (s < chunk.count) {
      const Row& row = block.rows[chunk.first + s];
      load_padded(row.left_type, row.left, e.K, w.Kp, left + s * w.ldk);
      load_padded(row.right_type, row.right, e.V, w.Vp, right + s * w.ldv);
    } else {
      std::memset(left + s * w.ldk, 0, w.Kp * sizeof(float));
      std::memset(right + s * w.ldv, 0, w.Vp * sizeof(float));
    }
  }
  transpose(CHUNK, w.Kp, left, w.ldk, w.left_t, CHUNK);
  transpose(CHUNK, w.Vp, right, w.ldv, w.right_t, CHUNK);
  float product = 1;
  std::memset(w.decay, 0, CHUNK * CHUNK * sizeof(float));
  for (int64_t t = 0; t < CHUNK; t++) {
    w.gamma[t] = 0;
    if (t >= chunk.count) continue;
    const float gate = block.rows[chunk.first + t].gate;
    for (int64_t s = 0; s < t; s++) w.decay[t * CHUNK + s] = w.decay[(t - 1) * CHUNK + s] * gate;
    w.decay[t * CHUNK + t] = 1;
    w.gamma[t] = product *= gate;
  }
  transpose(CHUNK, CHUNK, w.decay, CHUNK, w.decay_t, CHUNK);
}

// The state after the chunk's rows, and its transpose.
inline void advance(const Chunk& chunk, Work& w) {
  const float* last = w.decay + (chunk.count - 1) * CHUNK;
  const float keep = w.fresh ? 0.0f : w.gamma[chunk.count - 1];
  const auto side = [&](const float* columns, int64_t rows, const float* other, int64_t ld, int64_t width, float* to) {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t s = 0; s < CHUNK; s += LANES)
        store(w.scaled + i * CHUNK + s, load(columns + i * CHUNK + s) * load(last + s));
    pointers(to, ld, rows, w.rows);
    gemm(rows, width, CHUNK, w.scaled, CHUNK, other, ld, w.rows, keep);
  };
  side(w.left_t, w.Kp, w.right(), w.ldv, w.Vp, w.state);
  side(w.right_t, w.Vp, w.left(), w.ldk, w.Kp, w.state_t);
  w.fresh = false;
  w.reach *= w.gamma[chunk.count - 1];
}

// ---- the codes -------------------------------------------------------------------------------------------------------

// The chunk's features and, for each, what its tokens have there: codes [u r][CHUNK] (values, or with `grad` gradients).
inline void collect(const SaeTrainingParams& p, int64_t h, const Block& block, const Chunk& chunk, Work& w) {
  const EncodeParams& e = p.rows;
  const float* given = p.decoder ? p.values : p.grad;
  w.features.clear();
  for (int64_t t = 0; t < CHUNK; t++) {
    w.token[t] = -1;
    w.weight[t] = 0;
    if (t >= chunk.count || block.rows[chunk.first + t].slot < 0) continue;
    const int64_t place = block.tokens[block.rows[chunk.first + t].slot] * e.Hs + h;
    w.weight[t] = p.weight != nullptr ? p.weight[place] : 1.0f;
    if (w.weight[t] == 0) continue;
    w.token[t] = place;
    for (int64_t j = 0; j < e.m; j++) {
      const float x = given[place * e.m + j];
      int32_t& id = w.slot[t * e.m + j];
      id = -1;
      if (x == 0 && p.d_values == nullptr) continue;  // no share in anything
      const int32_t f = static_cast<int32_t>(e.at[place * e.m + j]);
      if (w.local[f] < 0) {
        w.local[f] = static_cast<int32_t>(w.features.size());
        w.features.push_back(f);
        std::memset(w.codes + w.local[f] * e.rank * CHUNK, 0, e.rank * CHUNK * sizeof(float));
      }
      id = w.local[f];
      for (int64_t r = 0; r < e.rank; r++) w.codes[(id * e.rank + r) * CHUNK + t] += x;
    }
  }
  for (const int32_t f : w.features) w.local[f] = -1;
}

// Factors of the chunk's features to v [u r][lav] and w [u r][law], and their products with the rows.
inline void gather(const SaeTrainingParams& p, int64_t h, const View& v, const View& u, Work& w) {
  const EncodeParams& e = p.rows;
  int64_t n = 0;
  for (const int32_t f : w.features)
    for (int64_t r = 0; r < e.rank; r++, n++) {
      load_padded(v.type, v.at(h, f, r), e.K, w.Kp, w.v + n * w.lav);
      load_padded(u.type, u.at(h, f, r), e.V, w.Vp, w.w + n * w.law);
    }
  pointers(w.on_left, CHUNK, n, w.rows);
  gemm(n, CHUNK, w.Kp, w.v, w.lav, w.left_t, CHUNK, w.rows, 0);
  pointers(w.on_right, CHUNK, n, w.rows);
  gemm(n, CHUNK, w.Vp, w.w, w.law, w.right_t, CHUNK, w.rows, 0);
}

inline int64_t atoms(const SaeTrainingParams& p, const Work& w) { return w.features.size() * p.rows.rank; }

// g [n][CHUNK] to G = g D in place of `g`, and c; G times the products goes behind the factors, c into them.
inline void adjoint(int64_t n, float* g, Work& w) {
  pointers(w.spread, CHUNK, n, w.rows);
  gemm(n, CHUNK, CHUNK, g, CHUNK, w.decay, CHUNK, w.rows, 0);
  for (int64_t i = 0; i < n; i++) {
    Vec total = {};
    float* v = w.v + i * w.lav + w.Kp;
    float* u = w.w + i * w.law + w.Vp;
    for (int64_t s = 0; s < CHUNK; s += LANES) {
      total += load(g + i * CHUNK + s) * load(w.gamma + s);
      const Vec x = load(w.spread + i * CHUNK + s);
      store(v + s, x * load(w.on_left + i * CHUNK + s));
      store(u + s, x * load(w.on_right + i * CHUNK + s));
    }
    w.anchor[i] = sum(total);
  }
}

inline void scale_rows(int64_t n, int64_t width, const float* by, float* x, int64_t ld) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < width; j += LANES) store(x + i * ld + j, load(x + i * ld + j) * by[i]);
}

// Rows of a sum over features that the chunk's atoms own.
inline void sum_rows(const SaeTrainingParams& p, float* sum, int64_t ld, Work& w) {
  float** to = w.rows;
  for (const int32_t f : w.features)
    for (int64_t r = 0; r < p.rows.rank; r++) *to++ = sum + (f * p.rows.rank + r) * ld;
}

// ---- the encoder's gradient ------------------------------------------------------------------------------------------

inline void encoder(const SaeTrainingParams& p, int64_t h, int64_t sequence, float* g, Work& w, const Sums& sums) {
  const int64_t n = atoms(p, w), rank = p.rows.rank;
  gather(p, h, p.rows.v_enc, p.rows.w_enc, w);
  adjoint(n, g, w);
  // [c w | G Q] times [S_0^T; left] and [c v | G P] times [S_0; right]; without the state where there is none yet.
  const int64_t skip_v = w.fresh ? w.Vp : 0, skip_w = w.fresh ? w.Kp : 0;
  if (!w.fresh) {
    scale_rows(n, w.Kp, w.anchor, w.v, w.lav);
    scale_rows(n, w.Vp, w.anchor, w.w, w.law);
  }
  sum_rows(p, sums.dv_enc, w.Kp, w);
  gemm(n, w.Kp, w.Vp + CHUNK - skip_v, w.w + skip_v, w.law, w.state_t + skip_v * w.ldk, w.ldk, w.rows, 1);
  sum_rows(p, sums.dw_enc, w.Vp, w);
  gemm(n, w.Vp, w.Kp + CHUNK - skip_w, w.v + skip_w, w.lav, w.state + skip_w * w.ldv, w.ldv, w.rows, 1);
  for (size_t i = 0; i < w.features.size(); i++) {
    const int64_t f = w.features[i];
    if (p.db_enc != nullptr)
      for (int64_t t = 0; t < CHUNK; t++) sums.db_enc[f] += g[i * rank * CHUNK + t];
    if (p.d_carry != nullptr) p.d_carry[(sequence * p.rows.Hs + h) * p.rows.F + f] += w.anchor[i * rank] * w.reach;
  }
}

// ---- the decoder -----------------------------------------------------------------------------------------------------

// ||S_t - M||^2 of the chunk's rows into `distance`, by the recurrences of ||S||^2 and <M, S>.
inline void distances(const SaeTrainingParams& p, const Block& block, const Chunk& chunk, Work& w) {
  const int64_t count = chunk.count;
  float* left = w.left();
  const float* right = w.right();
  if (w.restart) {
    w.norm = w.product = 0;
    for (int64_t i = 0; i < w.Kp && !w.fresh; i++)
      for (int64_t j = 0; j < w.Vp; j += LANES) {
        const Vec x = load(w.state + i * w.ldv + j);
        w.norm += sum(x * x);
        if (p.offset != nullptr) w.product += sum(x * load(w.offset + i * w.ldv + j));
      }
    w.restart = false;
  }
  // (l_s . l_t)(r_s . r_t), and l_s^T S_0 r_s, l_s^T M r_s.
  alignas(64) float pairs[CHUNK * CHUNK], on_right[CHUNK * CHUNK];
  pointers(pairs, CHUNK, CHUNK, w.rows);
  gemm(CHUNK, CHUNK, w.Kp, left, w.ldk, w.left_t, CHUNK, w.rows, 0);
  pointers(on_right, CHUNK, CHUNK, w.rows);
  gemm(CHUNK, CHUNK, w.Vp, right, w.ldv, w.right_t, CHUNK, w.rows, 0);
  for (int64_t i = 0; i < CHUNK * CHUNK; i++) pairs[i] *= on_right[i];
  float on_state[CHUNK] = {}, on_offset[CHUNK] = {};
  const auto form = [&](const float* matrix, float* to) {
    pointers(w.scaled, w.ldv, CHUNK, w.rows);
    gemm(CHUNK, w.Vp, w.Kp, left, w.ldk, matrix, w.ldv, w.rows, 0);
    for (int64_t s = 0; s < count; s++) to[s] = dot(w.scaled + s * w.ldv, right + s * w.ldv, w.Vp);
  };
  if (!w.fresh) form(w.state, on_state);
  if (p.offset != nullptr) form(w.offset, on_offset);
  for (int64_t t = 0; t < count; t++) {
    const double gate = block.rows[chunk.first + t].gate;
    double before = (t > 0 ? w.gamma[t - 1] : 1.0f) * on_state[t];  // l_t^T S r_t, S the state before this row
    for (int64_t s = 0; s < t; s++) before += w.decay[(t - 1) * CHUNK + s] * pairs[s * CHUNK + t];
    w.norm = gate * gate * w.norm + 2 * gate * before + pairs[t * CHUNK + t];
    w.product = gate * w.product + on_offset[t];
    w.distance[t] = w.norm - 2 * w.product + w.offset_norm;
  }
}

// x x^T of x [count][size], rows up to `width` zero: the columns of a tile down to its diagonal, the rest mirrored.
inline void gram_matrix(int64_t count, int64_t width, int64_t size, const float* x, int64_t ld, float* out, Work& w) {
  transpose(width, size, x, ld, w.group_t, w.ldg);
  for (int64_t at = 0; at < width; at += 2 * LANES) {
    const int64_t columns = width - at < 2 * LANES ? width - at : 2 * LANES;
    const int64_t rows = count < at + columns ? count : at + columns;
    pointers(out + at, w.ldg, rows, w.rows);
    gemm(rows, columns, size, x, ld, w.group_t + at, w.ldg, w.rows, 0);
    transpose(at, columns, out + at, w.ldg, out + at * w.ldg, w.ldg);
  }
}

// Tokens [first, last) together: Gram matrices of the atoms they use, `made` += Gram a, and their share of the gradient.
inline void gram(int64_t first, int64_t last, int64_t count, bool gradients, Work& w) {
  const int64_t width = (count + 15) / 16 * 16;
  for (int64_t i = 0; i < count; i++) {
    std::memcpy(w.group_v + i * w.ldk, w.v + w.member[i] * w.lav, w.Kp * sizeof(float));
    std::memcpy(w.group_w + i * w.ldv, w.w + w.member[i] * w.law, w.Vp * sizeof(float));
  }
  for (int64_t i = count; i < width; i++) {
    std::memset(w.group_v + i * w.ldk, 0, w.Kp * sizeof(float));
    std::memset(w.group_w + i * w.ldv, 0, w.Vp * sizeof(float));
  }
  gram_matrix(count, width, w.Kp, w.group_v, w.ldk, w.gram_v, w);
  gram_matrix(count, width, w.Vp, w.group_w, w.ldv, w.gram_w, w);
  // Codes both ways round: [count][16] and [tokens][width].
  std::memset(w.code_columns, 0, width * GROUP * sizeof(float));
  std::memset(w.code_rows, 0, GROUP * w.ldg * sizeof(float));
  for (int64_t i = 0; i < count; i++)
    for (int64_t t = first; t < last; t++) {
      const float x = w.codes[w.member[i] * CHUNK + t];
      w.code_columns[i * GROUP + t - first] = x;
      w.code_rows[(t - first) * w.ldg + i] = x;
    }
  for (int64_t i = 0; i < count; i++)
    for (int64_t j = 0; j < width; j += LANES)
      store(w.mixed + i * w.ldg + j, load(w.gram_v + i * w.ldg + j) * load(w.gram_w + i * w.ldg + j));
  alignas(64) float out[GROUP];
  for (int64_t i = 0; i < count; i++) w.rows[i] = w.made_columns + i * GROUP;
  gemm(count, GROUP, width, w.mixed, w.ldg, w.code_columns, GROUP, w.rows, 0);
  for (int64_t i = 0; i < count; i++) {
    std::memcpy(out, w.made_columns + i * GROUP, sizeof(out));
    for (int64_t t = first; t < last; t++) w.made[w.member[i] * CHUNK + t] = out[t - first];
  }
  if (!gradients) return;
  // B = sum_t 2 weight_t a a^T; dv += (B o gram_w) v, dw += (B o gram_v) w.
  for (int64_t i = 0; i < count; i++)
    for (int64_t t = first; t < last; t++) w.code_columns[i * GROUP + t - first] *= 2 * w.weight[t];
  pointers(w.mixed, w.ldg, count, w.rows);
  gemm(count, width, last - first, w.code_columns, GROUP, w.code_rows, w.ldg, w.rows, 0);
  for (int64_t i = 0; i < count; i++)
    for (int64_t j = 0; j < width; j += LANES) {
      const Vec b = load(w.mixed + i * w.ldg + j);
      float* of_v = w.gram_v + i * w.ldg + j;
      float* of_w = w.gram_w + i * w.ldg + j;
      store(of_v, b * load(of_v));
      store(of_w, b * load(of_w));
    }
  for (int64_t i = 0; i < count; i++) w.rows[i] = w.dv + w.member[i] * w.Kp;
  gemm(count, w.Kp, count, w.gram_w, w.ldg, w.group_v, w.ldk, w.rows, 1);
  for (int64_t i = 0; i < count; i++) w.rows[i] = w.dw + w.member[i] * w.Vp;
  gemm(count, w.Vp, count, w.gram_v, w.ldg, w.group_w, w.ldv, w.rows, 1);
}

// All tokens of the chunk, in groups that grow while that makes a token cheaper.
inline void grams(const SaeTrainingParams& p, Work& w) {
  const int64_t m = p.rows.m, rank = p.rows.rank, n = atoms(p, w);
  std::memset(w.seen, 0, n * sizeof(int32_t));
  const auto cost = [](int64_t u) { return static_cast<double>(u + 32) * u; };  // products, and what grows with u alone
  int64_t first = 0, count = 0, used = 0;
  for (int64_t t = 0; t <= CHUNK; t++) {
    if (t < CHUNK && w.token[t] < 0) continue;
    int64_t fresh = 0;
    for (int64_t j = 0; t < CHUNK && j < m; j++) {
      const int32_t id = w.slot[t * m + j];
      if (id < 0 || w.seen[id * rank] != 0) continue;
      for (int64_t r = 0; r < rank; r++) {
        w.seen[id * rank + r] = 1;
        w.member[count + fresh++] = id * rank + r;
      }
    }
    const bool join = t < CHUNK && t - first < GROUP && count + fresh <= w.group_limit &&
                      (used == 0 || cost(count + fresh) * used <= cost(count) * (used + 1));
    if (!join) {
      if (count > 0) gram(first, t < first + GROUP ? t : first + GROUP, count, p.gradients, w);
      if (t == CHUNK) return;
      std::memset(w.seen, 0, n * sizeof(int32_t));
      first = t, used = count = 0;
      t--;  // this token again, as the first of the next group
      continue;
    }
    if (used == 0) first = t;
    used++;
    count += fresh;
  }
}

inline void decoder(const SaeTrainingParams& p, int64_t h, const Block& block, const Chunk& chunk, Work& w,
                    const Sums& sums) {
  const EncodeParams& e = p.rows;
  const int64_t n = atoms(p, w), rank = e.rank;
  distances(p, block, chunk, w);
  gather(p, h, p.v_dec, p.w_dec, w);
  // on_state = <v w^T, S_t>: the rows' share by the decayed sum, the old state's by S_0 w, kept for the gradient.
  for (int64_t i = 0; i < n * CHUNK; i += LANES) store(w.spread + i, load(w.on_left + i) * load(w.on_right + i));
  pointers(w.on_state, CHUNK, n, w.rows);
  gemm(n, CHUNK, CHUNK, w.spread, CHUNK, w.decay_t, CHUNK, w.rows, 0);
  if (!w.fresh) {
    pointers(w.image, w.Kp, n, w.rows);
    gemm(n, w.Kp, w.Vp, w.w, w.law, w.state_t, w.ldk, w.rows, 0);
    for (int64_t i = 0; i < n; i++) {
      const float x = dot(w.v + i * w.lav, w.image + i * w.Kp, w.Kp);
      for (int64_t t = 0; t < CHUNK; t += LANES)
        store(w.on_state + i * CHUNK + t, load(w.on_state + i * CHUNK + t) + x * load(w.gamma + t));
    }
  }
  if (p.gradients) {
    std::memset(w.dv, 0, n * w.Kp * sizeof(float));
    std::memset(w.dw, 0, n * w.Vp * sizeof(float));
    if (p.encoder) std::memset(w.grad, 0, n * CHUNK * sizeof(float));
  }
  grams(p, w);
  for (int64_t t = 0; t < CHUNK; t++) {
    const int64_t place = w.token[t];
    if (place < 0) continue;
    double error = w.distance[t];
    for (int64_t j = 0; j < e.m; j++) {
      const int32_t id = w.slot[t * e.m + j];
      if (id < 0) continue;
      const int64_t f = w.features[id];
      float made = 0, wanted = p.on_offset != nullptr ? -p.on_offset[h * e.F + f] : 0;
      for (int64_t r = 0; r < rank; r++) {
        made += w.made[(id * rank + r) * CHUNK + t];
        wanted += w.on_state[(id * rank + r) * CHUNK + t];
      }
      const float a = p.values[place * e.m + j], slope = 2 * w.weight[t] * (made - wanted);
      error += static_cast<double>(a) * (made - 2 * wanted);
      if (p.d_values != nullptr) p.d_values[place * e.m + j] = slope;
      if (p.gradients && p.encoder && a > 0)
        for (int64_t r = 0; r < rank; r++) w.grad[(id * rank + r) * CHUNK + t] += slope;
    }
    p.error[place] = static_cast<float>(error);
  }
  if (!p.gradients) return;
  alignas(64) float twice[CHUNK];
  for (int64_t t = 0; t < CHUNK; t++) twice[t] = -2 * w.weight[t];
  for (int64_t i = 0; i < n; i++) {
    Vec total = {};
    for (int64_t t = 0; t < CHUNK; t += LANES) {
      const Vec x = load(w.codes + i * CHUNK + t) * load(twice + t);
      store(w.codes + i * CHUNK + t, x);
      total += x;
    }
    if (i % rank == 0) sums.usage[w.features[i / rank]] -= 0.5f * sum(total);
  }
  adjoint(n, w.codes, w);
  pointers(w.dv, w.Kp, n, w.rows);
  gemm(n, w.Kp, CHUNK, w.w + w.Vp, w.law, w.left(), w.ldk, w.rows, 1);
  const int64_t skip = w.fresh ? w.Kp : 0;
  if (!w.fresh) scale_rows(n, w.Kp, w.anchor, w.v, w.lav);
  sum_rows(p, sums.dw_dec, w.Vp, w);
  gemm(n, w.Vp, w.Kp + CHUNK - skip, w.v + skip, w.lav, w.state + skip * w.ldv, w.ldv, w.rows, 1);
  for (int64_t i = 0; i < n; i++) {
    const int64_t atom = static_cast<int64_t>(w.features[i / rank]) * rank + i % rank;
    float* dv = sums.dv_dec + atom * w.Kp;
    float* dw = sums.dw_dec + atom * w.Vp;
    for (int64_t j = 0; j < w.Kp; j += LANES) {
      Vec x = load(dv + j) + load(w.dv + i * w.Kp + j);
      if (!w.fresh) x += w.anchor[i] * load(w.image + i * w.Kp + j);
      store(dv + j, x);
    }
    for (int64_t j = 0; j < w.Vp; j += LANES) store(dw + j, load(dw + j) + load(w.dw + i * w.Vp + j));
  }
  // sum_t weight_t S_t = sum over rows of their whole later weight times l r^T.
  for (int64_t i = 0; i < w.Kp; i++)
    for (int64_t s = 0; s < CHUNK; s++)
      w.scaled[i * CHUNK + s] = s < chunk.count ? w.left_t[i * CHUNK + s] * w.later[chunk.first + s] : 0.0f;
  pointers(sums.state_sum, w.ldv, w.Kp, w.rows);
  gemm(w.Kp, w.Vp, CHUNK, w.scaled, CHUNK, w.right(), w.ldv, w.rows, 1);
  if (chunk.begin >= 0 && !w.fresh) {
    const float share = block.rows[chunk.first].gate * w.later[chunk.first];
    for (int64_t i = 0; i < w.Kp; i++)
      for (int64_t j = 0; j < w.Vp; j += LANES) {
        float* to = sums.state_sum + i * w.ldv + j;
        store(to, load(to) + share * load(w.state + i * w.ldv + j));
      }
  }
}

// ---- a chunk ---------------------------------------------------------------------------------------------------------

inline void run_chunk(const SaeTrainingParams& p, int64_t h, const Block& block, const Chunk& chunk, Work& w,
                      const Sums& sums) {
  load_chunk(p, h, block, chunk, w);
  collect(p, h, block, chunk, w);
  if (p.decoder) {
    decoder(p, h, block, chunk, w, sums);
    if (p.encoder && !w.features.empty()) encoder(p, h, chunk.sequence, w.grad, w, sums);
  } else if (!w.features.empty()) {
    encoder(p, h, chunk.sequence, w.codes, w, sums);
  }
  advance(chunk, w);
}

inline void skip_chunk(const SaeTrainingParams& p, int64_t h, const Block& block, const Chunk& chunk, Work& w) {
  load_chunk(p, h, block, chunk, w);
  advance(chunk, w);
}
