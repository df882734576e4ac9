// The backward's kernel, compiled for each instruction set by selective_scan_backward.cpp (no include guard on purpose).
//
// With h_t the state, a_t its gates, and l_t the gradient of what comes after with respect to the state that token t reads:
//     l_t = C_t d_o_t + a_{t+1} l_{t+1},    d_C_t = sum_c d_o_t h_t,    d_B_t = sum_c u_t l_t,    d_u_t = sum_n B_t l_t
//     w_t = a_t l_t h_{t-1},    d_A = sum_t dt_t w_t,    d_dt_t = sum_n A w_t + x_t d_u_t,    d_x_t = dt_t d_u_t + D d_o_t
// Time is cut into pieces of at most TILE tokens, that end where an edit or a snapshot stands, so that both happen between
// pieces. States run forward once and are left at the pieces' starts; then pieces go from the last to the first, and in each the
// states and gates of its tokens are made once more. Nothing is divided by a gate.

#include "cpu/transpose_kernel.h"

#include "cpu/selective_scan_kernel.h"

inline int64_t backward_memory(int64_t K, int64_t width, int64_t pieces) {
  const int64_t padded = (width + 15) / 16 * 16;
  return block_floats(K, width) + (6 * TILE + 3 + (2 + pieces) * K) * padded + 2 * TILE * K + 4 * TILE +
         (4 * TILE + 1) * K * 16;
}

// Rows of gradients, which may be none.
inline void load_gradients(const View& x, int64_t b, int64_t first, int64_t count, const Block& block, float* to,
                           float* line) {
  if (x.data == nullptr) {
    std::memset(to, 0, count * block.ld * sizeof(float));
  } else {
    load_tile(x, b, first, count, block.channel, block.width, block.ld, block.ld, to, line);
  }
}

template <bool SMALL>
inline void keep_in(const Run& run, float* gates, float* states) {
  for (int64_t t = 0; t < run.count; t++) {
    const Vec dt = load(run.dt + t * run.ld), u = load(run.u + t * run.ld);
    for (int64_t n = 0; n < run.K; n++) {
      const int64_t at = (t * run.K + n) * LANES;
      const Vec a = decay<SMALL>(dt, load(run.rates + n * LANES));
      store(gates + at, a);
      store(states + at + run.K * LANES, a * load(states + at) + u * run.B[t * run.K + n]);
    }
  }
}

// One vector of channels through one piece. In run, o is d_o. gates, states: [count][K][LANES], [count + 1][K][LANES] from the
// state before. l: [K][LANES], after the piece on entry and before it on return, gates included. d_rates: [K][LANES], added to.
// d_B, d_C: [count][K][LANES], added to. d_u, d_dt: [count] rows, written, d_dt by A alone.
inline void reverse(const Run& run, const float* gates, const float* states, float* l, float* d_rates, float* d_B,
                    float* d_C, float* d_u, float* d_dt) {
  const int64_t K = run.K;
  for (int64_t t = run.count - 1; t >= 0; t--) {
    const Vec dt = load(run.dt + t * run.ld), u = load(run.u + t * run.ld), d_o = load(run.o + t * run.ld);
    const float *B = run.B + t * K, *C = run.C + t * K;
    Vec to_u = {}, to_dt = {};
    for (int64_t n = 0; n < K; n++) {
      const int64_t at = (t * K + n) * LANES;
      const Vec here = load(l + n * LANES) + d_o * C[n];
      store(d_C + at, load(d_C + at) + d_o * load(states + at + K * LANES));
      store(d_B + at, load(d_B + at) + u * here);
      to_u += here * B[n];
      const Vec before = here * load(gates + at), w = before * load(states + at);
      store(l + n * LANES, before);
      store(d_rates + n * LANES, load(d_rates + n * LANES) + dt * w);
      to_dt += w * load(run.rates + n * LANES);
    }
    store(d_u + t * run.ld, to_u);
    store(d_dt + t * run.ld, to_dt * 0.693147181f);
  }
}

// to[n] += factor sum_c l[n][c] row[c] over the channels of a block
inline void add_products(const Block& block, const float* l, const float* row, float factor, float* to) {
  for (int64_t n = 0; n < block.K; n++) {
    Vec total = {};
    for (int64_t v = 0; v < block.vectors; v++) total += load(l + (v * block.K + n) * LANES) * load(row + v * LANES);
    to[n] += factor * sum(total);
  }
}

// The gradient of an edit that added left right^T to a state whose gradient is l + C d_o^T.
inline void edit_gradient(const SelectiveScanBackwardParams& p, const Block& block, int64_t e, const float* l,
                          const float* C, const float* d_o, float* row, float* d_left) {
  const int64_t K = block.K;
  const float* left = p.in.edits.left + e * K;
  load_right(block, p.in.edits, p.in.V, e, row);
  Vec reach = {};
  for (int64_t c = 0; c < block.ld; c += LANES) reach += load(row + c) * load(d_o + c);
  const float read = sum(reach);
  for (int64_t n = 0; n < K; n++) d_left[n] += C[n] * read;
  add_products(block, l, row, 1, d_left);
  float direct = 0;
  for (int64_t n = 0; n < K; n++) direct += left[n] * C[n];
  for (int64_t v = 0; v < block.vectors; v++) {
    Vec total = load(d_o + v * LANES) * direct;
    for (int64_t n = 0; n < K; n++) total += load(l + (v * K + n) * LANES) * left[n];
    store(row + v * LANES, total);
  }
  std::memcpy(p.d_edit_right + e * p.in.V + block.channel, row, block.width * sizeof(float));
}

// A block of channels through all sequences. d_rates and d_skip are written, `to` is added to.
inline void backward_block(const SelectiveScanBackwardParams& p, const Sequences& sequences, const Pieces& pieces,
                           int64_t channel, int64_t width, const Sums& to, float* memory) {
  const SelectiveScanParams& in = p.in;
  const int64_t K = in.K, V = in.V;
  const Block block = open_block(in, channel, width, memory);
  const int64_t ld = block.ld, size = K * ld;
  float* const dt = memory + block_floats(K, width);
  float* const x = dt + TILE * ld;
  float* const u = x + TILE * ld;
  float* const d_o = u + TILE * ld;
  float* const d_u = d_o + TILE * ld;
  float* const d_dt = d_u + TILE * ld;
  float* const row = d_dt + TILE * ld;
  float* const skip = row + ld;
  float* const d_skip = skip + ld;
  float* const l = d_skip + ld;
  float* const d_rates = l + size;
  float* const starts = d_rates + size;  // [pieces][vectors][K][LANES]
  float* const B = starts + pieces.most * size;
  float* const C = B + TILE * K;
  float* const line = C + TILE * K;
  float* const gates = line + 4 * TILE;
  float* const states = gates + TILE * K * LANES;
  float* const d_B = states + (TILE + 1) * K * LANES;
  float* const d_C = d_B + TILE * K * LANES;
  std::memset(d_rates, 0, size * sizeof(float));
  std::memset(d_skip, 0, ld * sizeof(float));
  for (int64_t c = 0; c < ld; c++) skip[c] = c < width && in.skip != nullptr ? in.skip[channel + c] : 0.0f;

  for (int64_t n = 0; n < in.N; n++) {
    const Sequence s = sequences.at(n);
    const EditRange range = edits_of(in.edits, n, 0);
    const int64_t *const ends = pieces.of(n), count = pieces.count(n);
    // What a piece is made of, tokens [first, last). Returns its first edit.
    const auto load_piece = [&](int64_t first, int64_t last) {
      load_tile(in.dt, s.b, s.origin + first, last - first, channel, width, ld, ld, dt, line);
      load_tile(in.x, s.b, s.origin + first, last - first, channel, width, ld, ld, x, line);
      for (int64_t i = 0; i < (last - first) * ld; i += LANES) store(u + i, load(dt + i) * load(x + i));
      for (int64_t t = first; t < last; t++) {
        convert_in(in.write.type, in.write.at(s.b, s.origin + t, 0), B + (t - first) * K, K);
        convert_in(in.read.type, in.read.at(s.b, s.origin + t, 0), C + (t - first) * K, K);
      }
      return first_edit(in.edits, n, 0, last - 1);  // edits stand at last tokens
    };
    const auto run_of = [&](int64_t first, int64_t last, int64_t v, float* state) {
      return Run{K,    last - first, ld, dt + v * LANES, u + v * LANES, B, C, block.rates + v * K * LANES, d_o + v * LANES,
                 state};
    };

    load_state(block, in.initial_state == nullptr ? nullptr : in.initial_state + n * K * V, V);
    for (int64_t i = 0; i < count; i++) {
      const int64_t first = i == 0 ? 0 : ends[i - 1], last = ends[i];
      const int64_t end = last - 1 - first;
      std::memcpy(starts + i * size, block.state, size * sizeof(float));
      if (i == count - 1) break;  // what comes after is nobody's start
      const int64_t edit = load_piece(first, last);
      bool kept = true;
      for (int64_t e = edit; e < range.end && position(in.edits, e) == last - 1; e++) {
        if (in.edits.kind(e).removes()) std::memset(u + end * ld, 0, ld * sizeof(float));
        kept = kept && !in.edits.kind(e).removes_after();
      }
      for (int64_t v = 0; v < block.vectors; v++)
        advance<false>(run_of(first, last, v, block.state + v * K * LANES), load(block.bound + v * LANES));
      for (int64_t e = edit; e < range.end && position(in.edits, e) == last - 1; e++) {
        if (!in.edits.kind(e).adds()) continue;
        load_right(block, in.edits, V, e, row);
        add_outer(block, block.state, 1, in.edits.left + e * K, row);
      }
      if (!kept) add_outer(block, block.state, -1, B + end * K, u + end * ld);
    }

    load_state(block, p.d_final_state == nullptr ? nullptr : p.d_final_state + n * K * V, V);
    std::memcpy(l, block.state, size * sizeof(float));
    const int64_t* shot = s.shots_end;
    for (int64_t i = count - 1; i >= 0; i--) {
      const int64_t first = i == 0 ? 0 : ends[i - 1], last = ends[i], tokens = last - first, end = tokens - 1;
      const int64_t edit = load_piece(first, last);
      load_gradients(p.d_o, s.b, s.origin + first, tokens, block, d_o, line);
      for (; shot > s.shots && in.places[2 * shot[-1] + 1] == last - 1; shot--) {
        if (p.d_snapshots == nullptr) continue;
        load_state(block, p.d_snapshots + shot[-1] * K * V, V);
        for (int64_t j = 0; j < size; j += LANES) store(l + j, load(l + j) + load(block.state + j));
      }
      bool native = true, kept = true;
      for (int64_t e = edit; e < range.end && position(in.edits, e) == last - 1; e++) {
        native = native && !in.edits.kind(e).removes();
        kept = kept && !in.edits.kind(e).removes_after();
        if (!in.edits.kind(e).adds()) continue;
        const bool after = in.edits.kind(e).after();
        if (after) {
          std::memset(d_u, 0, ld * sizeof(float));  // a row of zeros: it is not read
          edit_gradient(p, block, e, l, C + end * K, d_u, row, to.d_left + e * K);
        } else {
          edit_gradient(p, block, e, l, C + end * K, d_o + end * ld, row, to.d_left + e * K);
        }
      }
      if (!native) std::memset(u + end * ld, 0, ld * sizeof(float));
      // A write removed after its read: what becomes of it later is no part of its gradient.
      float* const gone = row;
      for (int64_t c = 0; c < ld; c += LANES) {
        Vec total = {};
        for (int64_t k = 0; k < K && !kept; k++) total += load(l + (c / LANES * K + k) * LANES) * B[end * K + k];
        store(gone + c, total);
      }
      float* const sums_B = to.d_B + (s.b * in.T + s.origin + first) * K;
      float* const sums_C = to.d_C + (s.b * in.T + s.origin + first) * K;
      if (!kept) add_products(block, l, u + end * ld, -1, sums_B + end * K);
      std::memset(d_B, 0, tokens * K * LANES * sizeof(float));
      std::memset(d_C, 0, tokens * K * LANES * sizeof(float));
      for (int64_t v = 0; v < block.vectors; v++) {
        const Run run = run_of(first, last, v, nullptr);
        std::memcpy(states, starts + i * size + v * K * LANES, K * LANES * sizeof(float));
        if (small_exponents(run.dt, ld, tokens, load(block.bound + v * LANES))) {
          keep_in<true>(run, gates, states);
        } else {
          keep_in<false>(run, gates, states);
        }
        for (int64_t e = edit; e < range.end && position(in.edits, e) == last - 1; e++) {
          if (!in.edits.kind(e).adds() || in.edits.kind(e).after()) continue;
          const int64_t c = v * LANES, here = std::min<int64_t>(LANES, width - c);
          float right[LANES] = {};
          std::memcpy(right, in.edits.right + e * V + channel + c, here * sizeof(float));
          float* const read = states + tokens * K * LANES;
          for (int64_t k = 0; k < K; k++)
            store(read + k * LANES, load(read + k * LANES) + load(right) * in.edits.left[e * K + k]);
        }
        reverse(run, gates, states, l + v * K * LANES, d_rates + v * K * LANES, d_B, d_C, d_u + v * LANES, d_dt + v * LANES);
      }
      for (int64_t j = 0; j < tokens * K; j++)
        sums_B[j] += sum(load(d_B + j * LANES)), sums_C[j] += sum(load(d_C + j * LANES));

      for (int64_t c = 0; c < ld; c += LANES) store(d_u + end * ld + c, load(d_u + end * ld + c) - load(gone + c));
      if (p.d_right.data != nullptr) {
        load_gradients(p.d_right, s.b, s.origin + first, tokens, block, u, line);  // u is done with
        for (int64_t j = 0; j < tokens * ld; j += LANES) store(d_u + j, load(d_u + j) + load(u + j));
      }
      if (!native) std::memset(d_u + end * ld, 0, ld * sizeof(float));
      for (int64_t t = 0; t < tokens; t++) {
        for (int64_t c = 0; c < ld; c += LANES) {
          const int64_t at = t * ld + c;
          const Vec d = load(d_u + at), given = load(x + at);
          store(d_skip + c, load(d_skip + c) + given * load(d_o + at));
          store(d_dt + at, load(d_dt + at) + given * d);
          store(d_u + at, load(dt + at) * d + load(skip + c) * load(d_o + at));
        }
        const int64_t at = (s.b * in.T + s.origin + first + t) * V + channel;
        convert_out(in.x.type, d_u + t * ld, static_cast<char*>(p.d_x) + at * element_size(in.x.type), width);
        convert_out(in.dt.type, d_dt + t * ld, static_cast<char*>(p.d_dt) + at * element_size(in.dt.type), width);
      }
    }
    store_state(block, l, p.d_initial_state + n * K * V, V);
  }
  for (int64_t c = 0; c < width; c++) {
    p.d_skip[channel + c] = d_skip[c];
    for (int64_t n = 0; n < K; n++) p.d_rates[(channel + c) * K + n] = d_rates[(c / LANES * K + n) * LANES + c % LANES];
  }
}
