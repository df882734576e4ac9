// Channel gates, S_t = Diag(e^g_t) S_{t-1} + sum_r left_r right_r^T: no sum that runs along activations, v^T Diag(e^g) S w is
// none of them. What runs is y_i = S w_i, K numbers an atom, and v_i . y_i is read off it. Written once and compiled for each
// instruction set (no include guard on purpose; encode_kernel.h includes it).
//
// Of a tile of MT rows the products right . w are taken first and stay in registers. Then channel by channel: y of 16 atoms
// is loaded once, taken through all rows of the tile, adding each row's part of v . y to its sum, and stored. Three
// operations a row and channel (gate, write, read), so (3 K + V) F multiply-adds a row and head where states take K V F: at
// K = V = 64 a 16th. With C tokens a chunk instead of a walk, a read from the chunk's start and one of every earlier token in
// it cost K (3 + C) / 2 a token and K V / C or K to go on: more, whatever C.
//
// Of two writes a token the second needs no gate, and the first is not read: rows then go in pairs, and a token costs
// (4 K + 2 V) F.
//
// A tile never reaches over the start of a sequence (`Stream`), where y begins anew.

// e^g of the rows of a tile to [K][MT], 1 where a row has no gate. `row` holds round_up(K, 32) floats.
inline void pack_gates(const EncodeParams& p, const Block& block, int64_t tile, float* row, float* gates) {
  for (int i = 0; i < MT; i++) {
    const int64_t at = tile * MT + i;
    const float* from = at < static_cast<int64_t>(block.rows.size()) ? block.rows[at].gates : nullptr;
    for (int64_t j = 0; j < round_up(p.K, LANES); j += LANES) {
      for (int64_t l = j; l < j + LANES; l++) row[l] = from != nullptr && l < p.K ? from[l] : 0;
      const Vec x = load(row + j), e = x < Vec{} - 87.0f ? Vec{} : exponential(x);
      store(row + j, x == x ? e : x);
    }
    for (int64_t j = 0; j < p.K; j++) gates[j * MT + i] = row[j];
  }
}

// y [r][K][16] = S w of a sequence's first state [K, V], or 0. w [r][V][16].
inline void start_channels(const EncodeParams& p, int64_t h, int64_t sequence, const float* w, float* y) {
  if (p.states == nullptr) {
    std::memset(y, 0, p.rank * p.K * PANEL * sizeof(float));
    return;
  }
  const float* state = p.states + (sequence * p.Hs + h) * p.K * p.V;
  for (int64_t r = 0; r < p.rank; r++, w += p.V * PANEL)
    for (int64_t k = 0; k < p.K; k += MT) {
      const float* rows[MT];
      for (int i = 0; i < MT; i++) rows[i] = state + (k + i < p.K ? k + i : p.K - 1) * p.V;
      Vec total[MT][NV];
      for (int i = 0; i < MT; i++)
        for (int n = 0; n < NV; n++) total[i][n] = Vec{};
      for (int64_t j = 0; j < p.V; j++)
        for (int n = 0; n < NV; n++) {
          const Vec atom = load(w + j * PANEL + n * LANES);
          for (int i = 0; i < MT; i++) total[i][n] += rows[i][j] * atom;
        }
      for (int i = 0; i < MT && k + i < p.K; i++) store_panel(total[i], y + (r * p.K + k + i) * PANEL);
    }
}

// A tile of rows through y [K][16] of LANES atoms: sums_i += v . y after row i, PAIRED after every second row. c: right_i . w.
template <bool PAIRED>
inline void walk_channels(int64_t K, const float* v, const float* left, const float* gates, const Vec (&c)[MT], float* y,
                          Vec (&sums)[MT]) {
  for (int64_t k = 0; k < K; k++, v += PANEL, y += PANEL, left += MT, gates += MT) {
    const Vec atom = load(v);
    Vec s = load(y);
    for (int i = PAIRED; i < MT; i += 1 + PAIRED) {
      s = s * gates[i - PAIRED] + c[i - PAIRED] * left[i - PAIRED];
      if (PAIRED) s += c[i] * left[i];
      sums[i] += atom * s;
    }
    store(y, s);
  }
}

// As run_panel. y [r][K][16] between blocks; gates as pack_gates leaves them.
inline void run_panel_channels(const EncodeParams& p, const Block& block, int64_t h, int64_t panel, const float* v,
                               const float* w, const float* left, const float* right, const float* gates, const float* bias,
                               float* y, int32_t* keys, int64_t stride) {
  const int64_t count = block.rows.size(), first = panel * PANEL;
  const int64_t width = p.F - first < PANEL ? p.F - first : PANEL;
  const bool two = paired(p, MT);
  for (int64_t start = 0; start < count; start += MT, left += p.K * MT, right += p.V * MT, gates += p.K * MT) {
    if (block.rows[start].begin >= 0) start_channels(p, h, block.rows[start].begin, w, y);
    alignas(64) float total[MT][PANEL] = {};
    for (int64_t r = 0; r < p.rank; r++) {
      Vec on_right[MT][NV];
      multiply(w + r * p.V * PANEL, right, p.V, on_right);
      for (int n = 0; n < NV; n++) {
        Vec c[MT], sums[MT];
        for (int i = 0; i < MT; i++) c[i] = on_right[i][n], sums[i] = load(total[i] + n * LANES);
        const float* const atoms = v + r * p.K * PANEL + n * LANES;
        float* const states = y + r * p.K * PANEL + n * LANES;
        if (two) {
          walk_channels<true>(p.K, atoms, left, gates, c, states, sums);
        } else {
          walk_channels<false>(p.K, atoms, left, gates, c, states, sums);
        }
        for (int i = 0; i < MT; i++) store(total[i] + n * LANES, sums[i]);
      }
    }
    for (int64_t i = start; i < start + MT && i < count; i++) {
      const Row& row = block.rows[i];
      const float* activation = total[i - start];
      for (int n = 0; n < NV && row.slot >= 0; n++)
        store_int(keys + row.slot * stride + first + n * LANES,
                  to_key(load(activation + n * LANES) + load(bias + n * LANES)));
      if (row.end >= 0) std::memcpy(p.carry_out + (row.end * p.Hs + h) * p.F + first, activation, width * sizeof(float));
    }
  }
}
