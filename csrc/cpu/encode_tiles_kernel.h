// run_panel on tiles of 16 rows: those of AMX, or plain loops in their place (no include guard on purpose; `Tiles` and the
// namespace `base`, whose running sum is used, are defined by encode.cpp before each inclusion).
//
// A tile of atoms is 16 pairs of bfloat16 deep and 16 atoms wide, which is what pack_panel makes for AVX-512's dot product
// of pairs too; a tile of rows is 16 rows of 16 pairs, as they lie. One product takes 16 cycles where AVX-512 takes 256
// (multiply-adds of pairs, one a cycle), so the running sums become the larger part and nothing is gained by keeping more
// than one sum tile busy.

constexpr int MT = 16;

// Rows [tile * 16, tile * 16 + 16) of a block to [16][steps(K)] and [16][steps(V)] pairs, zeros past its end.
inline void pack_rows(const EncodeParams& p, const Block& block, int64_t tile, float* row, float* left, float* right) {
  const int64_t k_steps = pair_steps(p.K), v_steps = pair_steps(p.V);
  for (int i = 0; i < MT; i++, left += k_steps, right += v_steps) {
    const int64_t at = tile * MT + i;
    if (at >= static_cast<int64_t>(block.rows.size())) {
      std::memset(left, 0, k_steps * sizeof(float));
      std::memset(right, 0, v_steps * sizeof(float));
      continue;
    }
    const Row& x = block.rows[at];
    pairs::put_row(x.left_type, x.left, p.K, true, row, left);
    pairs::put_row(x.right_type, x.right, p.V, true, row, right);
  }
}

// out [16][16] = 16 rows of `steps` pairs times 16 atoms.
inline void multiply(const float* atoms, const float* rows, int64_t steps, Tiles& tiles, float (*out)[PANEL]) {
  tiles.zero();
  for (int64_t j = 0; j < steps; j += 16) tiles.multiply_add(rows + j, steps, atoms + j * PANEL);
  tiles.store(out[0]);
}

inline void run_panel(const EncodeParams& p, const Block& block, int64_t h, int64_t panel, const float* v, const float* w,
                      const float* left, const float* right, const float* bias, float* carry, int32_t* keys,
                      int64_t stride) {
  const int64_t count = block.rows.size(), first = panel * PANEL;
  const int64_t width = p.F - first < PANEL ? p.F - first : PANEL;
  const int64_t k_steps = pair_steps(p.K), v_steps = pair_steps(p.V);
  base::Vec a[base::NV];
  base::load_panel(carry, a);
  Tiles tiles;
  tiles.begin();
  for (int64_t start = 0; start < count; start += MT, left += k_steps * MT, right += v_steps * MT) {
    alignas(64) float product[MT][PANEL], on_left[MT][PANEL], on_right[MT][PANEL];
    for (int64_t r = 0; r < p.rank; r++) {
      multiply(v + r * k_steps * PANEL, left, k_steps, tiles, on_left);
      multiply(w + r * v_steps * PANEL, right, v_steps, tiles, on_right);
      for (int i = 0; i < MT; i++)
        for (int f = 0; f < PANEL; f++) {
          const float x = on_left[i][f] * on_right[i][f];
          product[i][f] = r == 0 ? x : product[i][f] + x;
        }
    }
    for (int64_t i = start; i < start + MT && i < count; i++)
      base::accumulate(p, block.rows[i], h, first, width, product[i - start], bias, a, keys, stride);
  }
  tiles.end();
  base::store_panel(a, carry);
}
