// The arithmetic, written once and compiled for each instruction set by encode.cpp (no include guard on purpose).
//
// A head's tokens become a stream of rows, one for each rank-1 addition to its state: R writes a token, then its edits.
// `run_panel` takes a block of rows through a panel of 16 atoms: products of MT rows at a time in registers (12
// accumulators, each step of K one load of atoms and MT broadcasts), then the decayed running sum over those rows, so
// that the carry never leaves registers inside a block. It stores not floats but sortable integers (`to_key`), which
// makes selection a matter of integers: NaN is the largest key, -0 cannot occur. Keys of atoms past F are garbage until
// `Plan::select` overwrites them.
//
// Predicted a token and head at K = V = 128, F = 2048, k = 32: 1.05 MFLOP, 32.8 k AVX-512 multiply-adds, one a cycle
// here (Zen 4), so 11 us at 3 GHz; selection, two readings of 8 KB of keys, 5 % more. Measured on one thread, least
// processor time at T = 1,024: 12.1 us (13.7 while the carry went through memory between rows and every candidate of the
// selection was packed before it was known to be one); with bfloat16 pairs 7.4 us, where the products alone need 5.6.

#include "cpu/encode_pack_kernel.h"
#include "cpu/silu.h"

constexpr int NV = PANEL / LANES;
constexpr int MT = 12 / NV;  // rows of a register tile
typedef int32_t UnalignedIntVec __attribute__((vector_size(WRITESAE_LANES * 4), aligned(4), may_alias));
typedef int64_t LongVec __attribute__((vector_size(WRITESAE_LANES * 4)));
typedef int64_t UnalignedLongVec __attribute__((vector_size(WRITESAE_LANES * 4), aligned(8), may_alias));

inline IntVec load_int(const int32_t* p) { return *reinterpret_cast<const UnalignedIntVec*>(p); }
inline void store_int(int32_t* p, IntVec x) { *reinterpret_cast<UnalignedIntVec*>(p) = x; }

// ---- keys ------------------------------------------------------------------------------------------------------------

inline IntVec to_key(Vec x) {
  const IntVec bits = (IntVec)x;
  const IntVec key = bits ^ ((bits >> 31) & 0x7fffffff);
  return x == x ? key : IntVec{} + 0x7fffffff;
}

inline float from_key(int32_t key) { return bits_to_float(static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff))); }

inline int32_t to_key_scalar(float x) {
  const int32_t bits = static_cast<int32_t>(float_to_bits(x + 0.0f));  // + 0: no -0
  return x == x ? bits ^ ((bits >> 31) & 0x7fffffff) : 0x7fffffff;
}

// ---- packing (the rest of it in encode_pack_kernel.h) ----------------------------------------------------------------

// Rows [tile * MT, tile * MT + MT) of a block to [steps(K)][MT] and [steps(V)][MT], zeros past its end. `row` holds two.
inline void pack_rows(const EncodeParams& p, const Block& block, int64_t tile, float* row, float* left, float* right) {
  const auto put = [&](Element type, const void* from, int64_t size, int i, float* to) {
    const int64_t depth = steps(size);
    if (from != nullptr) {
      put_row(type, from, size, p.bf16, row + depth, row);
    } else {
      std::memset(row, 0, depth * sizeof(float));
    }
    for (int64_t j = 0; j < depth; j++) to[j * MT + i] = row[j];
  };
  for (int i = 0; i < MT; i++) {
    const int64_t at = tile * MT + i;
    const Row x = at < static_cast<int64_t>(block.rows.size()) ? block.rows[at] : Row{};
    put(x.left_type, x.left, p.K, i, left);
    put(x.right_type, x.right, p.V, i, right);
  }
}

// ---- products and running sums ---------------------------------------------------------------------------------------

// acc_i = sum_j rows[j][i] atoms[j][:] over `depth` steps
#if WRITESAE_PAIRS
inline void multiply(const float* atoms, const float* rows, int64_t depth, Vec (&acc)[MT][NV]) {
  __m512 sum[MT];
  for (int i = 0; i < MT; i++) sum[i] = _mm512_setzero_ps();
  for (int64_t j = 0; j < depth; j++, atoms += PANEL, rows += MT) {
    const __m512bh atom = (__m512bh)_mm512_loadu_si512(atoms);
    for (int i = 0; i < MT; i++)
      sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)_mm512_set1_epi32(static_cast<int>(float_to_bits(rows[i]))), atom);
  }
  for (int i = 0; i < MT; i++) acc[i][0] = (Vec)sum[i];
}
#else
inline void multiply(const float* atoms, const float* rows, int64_t depth, Vec (&acc)[MT][NV]) {
  Vec sum[MT][NV];
  for (int i = 0; i < MT; i++)
    for (int n = 0; n < NV; n++) sum[i][n] = Vec{};
  for (int64_t j = 0; j < depth; j++, atoms += PANEL, rows += MT) {
    Vec atom[NV];
    for (int n = 0; n < NV; n++) atom[n] = load(atoms + n * LANES);
    for (int i = 0; i < MT; i++)
      for (int n = 0; n < NV; n++) sum[i][n] += rows[i] * atom[n];
  }
  for (int i = 0; i < MT; i++)
    for (int n = 0; n < NV; n++) acc[i][n] = sum[i][n];
}
#endif

inline void load_panel(const float* from, Vec (&a)[NV]) {
  for (int n = 0; n < NV; n++) a[n] = load(from + n * LANES);
}

inline void store_panel(const Vec (&a)[NV], float* to) {
  for (int n = 0; n < NV; n++) store(to + n * LANES, a[n]);
}

// The running sum of one row: `a` is carried, in registers, because a store and a load between rows would be what they
// wait for; `product` is the row's increment. `width` <= 16 atoms exist.
inline void accumulate(const EncodeParams& p, const Row& row, int64_t h, int64_t first, int64_t width, const float* product,
                       const float* bias, Vec (&a)[NV], int32_t* keys, int64_t stride) {
  if (row.begin >= 0) {
    alignas(64) float start[PANEL] = {};
    if (p.carry_in != nullptr) std::memcpy(start, p.carry_in + (row.begin * p.Hs + h) * p.F + first, width * sizeof(float));
    load_panel(start, a);
  }
  for (int n = 0; n < NV; n++) {
    a[n] = a[n] * row.gate + load(product + n * LANES);
    if (row.slot >= 0) store_int(keys + row.slot * stride + first + n * LANES, to_key(a[n] + load(bias + n * LANES)));
  }
  if (row.end >= 0) {
    alignas(64) float last[PANEL];
    store_panel(a, last);
    std::memcpy(p.carry_out + (row.end * p.Hs + h) * p.F + first, last, width * sizeof(float));
  }
}

// A block through one panel. v [r][steps(K)][16], w [r][steps(V)][16]; left, right as pack_rows leaves them; carry
// [16] between blocks; bias [16]; keys [slots][stride].
inline void run_panel(const EncodeParams& p, const Block& block, int64_t h, int64_t panel, const float* v, const float* w,
                      const float* left, const float* right, const float* bias, float* carry, int32_t* keys,
                      int64_t stride) {
  const int64_t count = block.rows.size(), first = panel * PANEL;
  const int64_t width = p.F - first < PANEL ? p.F - first : PANEL;
  const int64_t k_steps = steps(p.K), v_steps = steps(p.V);
  Vec a[NV];
  load_panel(carry, a);
  for (int64_t start = 0; start < count; start += MT, left += k_steps * MT, right += v_steps * MT) {
    alignas(64) float product[MT][PANEL];
    for (int64_t r = 0; r < p.rank; r++) {
      Vec on_left[MT][NV], on_right[MT][NV];
      multiply(v + r * k_steps * PANEL, left, k_steps, on_left);
      multiply(w + r * v_steps * PANEL, right, v_steps, on_right);
      for (int i = 0; i < MT; i++)
        for (int n = 0; n < NV; n++) {
          Vec x = on_left[i][n] * on_right[i][n];
          if (r > 0) x += load(product[i] + n * LANES);
          store(product[i] + n * LANES, x);
        }
    }
    for (int64_t i = start; i < start + MT && i < count; i++)
      accumulate(p, block.rows[i], h, first, width, product[i - start], bias, a, keys, stride);
  }
  store_panel(a, carry);
}

// out_f = x . atoms_f for the 16 atoms of a panel, each of `size` floats. The 16 partial sums are transposed and added as
// vectors: one sum across lanes at a time would take longer than the products.
inline void dot_panel(const float* const* atoms, const float* x, int64_t size, float* out) {
  alignas(64) float partial[PANEL][LANES], column[LANES][PANEL];
  const int64_t whole = size / LANES * LANES;
  for (int f = 0; f < PANEL; f++) {
    Vec total = {};
    for (int64_t j = 0; j < whole; j += LANES) total += load(x + j) * load(atoms[f] + j);
    for (int64_t j = whole; j < size; j++) total[0] += x[j] * atoms[f][j];
    store(partial[f], total);
  }
  for (int l = 0; l < LANES; l += 4)
    for (int f = 0; f < PANEL; f += 4) transpose_four(&partial[f][l], LANES, &column[l][f], PANEL);
  for (int n = 0; n < NV; n++) {
    Vec total = {};
    for (int l = 0; l < LANES; l++) total += load(&column[l][n * LANES]);
    store(out + n * LANES, total);
  }
}

// The same for a few rows, reading atoms where they lie: a handful of tokens would not pay for packing them. left, right
// [rows][K], [rows][V]; `scratch` holds 16 * max(K, V) floats.
inline void run_panel_unpacked(const EncodeParams& p, const Block& block, int64_t h, int64_t panel, const float* left,
                               const float* right, const float* bias, float* scratch, int32_t* keys, int64_t stride) {
  const int64_t count = block.rows.size(), first = panel * PANEL;
  const int64_t width = p.F - first < PANEL ? p.F - first : PANEL;
  alignas(64) float product[SMALL][PANEL], on_left[SMALL][PANEL], on_right[SMALL][PANEL];
  Vec a[NV] = {};
  // Dot products of every row with one side's atoms; past F the last atom stands in, and is never looked at.
  const auto dots = [&](const View& x, int64_t r, int64_t size, const float* rows, float (*to)[PANEL]) {
    const float* atoms[PANEL];
    for (int f = 0; f < PANEL; f++) {
      const void* from = x.at(h, first + (f < width ? f : width - 1), r);
      atoms[f] = static_cast<const float*>(from);
      if (x.type == Element::f32 && !p.bf16) continue;
      convert_in(x.type, from, scratch + f * size, size);
      if (p.bf16) round_to_bfloat(scratch + f * size, size);
      atoms[f] = scratch + f * size;
    }
    for (int64_t i = 0; i < count; i++) dot_panel(atoms, rows + i * size, size, to[i]);
  };
  for (int64_t r = 0; r < p.rank; r++) {
    dots(p.v_enc, r, p.K, left, on_left);
    dots(p.w_enc, r, p.V, right, on_right);
    for (int64_t i = 0; i < count; i++)
      for (int f = 0; f < PANEL; f++) {
        const float x = on_left[i][f] * on_right[i][f];
        product[i][f] = r == 0 ? x : product[i][f] + x;
      }
  }
  for (int64_t i = 0; i < count; i++) accumulate(p, block.rows[i], h, first, width, product[i], bias, a, keys, stride);
}

#if !WRITESAE_PAIRS
#include "cpu/encode_channels_kernel.h"
#endif

// ---- selection -------------------------------------------------------------------------------------------------------

inline int64_t count_at_least(const int32_t* x, int64_t n, int32_t bound) {  // n a multiple of 16
  IntVec total = {};
  for (int64_t i = 0; i < n; i += LANES) total -= load_int(x + i) >= bound;
  int64_t count = 0;
  for (int i = 0; i < LANES; i++) count += total[i];
  return count;
}

// The k largest of keys [stride], which holds INT_MIN past F, in descending order, ties to the lowest index.
// `depth` keys, 16 apart, form a group, stride / depth >= k groups. The k-th largest of the groups' maxima bounds the k-th
// largest key from below, and with many more groups than k hardly more than k keys reach it. Only a good bound is
// sought, from `hint` (the last token's); any bound gives the same result. memory: Plan::select_bytes.
inline void select_largest(const int32_t* keys, int64_t stride, int64_t depth, int64_t k, int32_t& hint, char* memory,
                           float* values, int64_t* indices) {
  int64_t* const found = reinterpret_cast<int64_t*>(memory);
  int32_t* const maxima = reinterpret_cast<int32_t*>(found + stride + 16);
  int32_t* const groups = maxima + stride;
  const int64_t n_groups = stride / depth;
  IntVec top = IntVec{} + INT32_MIN, bottom = IntVec{} + INT32_MAX;
  for (int64_t c = 0; c < n_groups / 16; c++)
    for (int n = 0; n < NV; n++) {
      const int32_t* from = keys + c * 16 * depth + n * LANES;
      IntVec most = load_int(from);
      for (int64_t j = 1; j < depth; j++) {
        const IntVec x = load_int(from + j * 16);
        most = x > most ? x : most;
      }
      store_int(maxima + c * 16 + n * LANES, most);
      top = most > top ? most : top;
      bottom = most < bottom ? most : bottom;
    }
  int64_t low = bottom[0], high = top[0];  // at least k groups reach low; fewer than k reach high + 1
  for (int i = 1; i < LANES; i++) {
    low = bottom[i] < low ? bottom[i] : low;
    high = top[i] > high ? top[i] : high;
  }
  high++;
  const int64_t enough = k + k / 4 + 4;
  const int64_t probes[2] = {static_cast<int64_t>(hint) - (1 << 18), static_cast<int64_t>(hint) + (1 << 18)};
  for (int step = 0; high - low > 1; step++) {
    int64_t middle = low + (high - low) / 2;
    if (step < 2) {
      if (probes[step] <= low || probes[step] >= high) continue;
      middle = probes[step];
    }
    const int64_t count = count_at_least(maxima, n_groups, static_cast<int32_t>(middle));
    (count >= k ? low : high) = middle;
    if (count >= k && count <= enough) break;
  }
  const int32_t bound = hint = static_cast<int32_t>(low);
  int64_t n_kept = 0, n = 0;
  for (int64_t g = 0; g < n_groups; g++) {
    groups[n_kept] = static_cast<int32_t>(g);
    n_kept += maxima[g] >= bound;
  }
  int32_t* const places = groups + n_kept;
  for (int64_t i = 0; i < n_kept; i++) {
    const int32_t first = static_cast<int32_t>(groups[i] / 16 * 16 * depth + groups[i] % 16);
    for (int32_t j = first; j < first + 16 * depth; j += 16) {
      places[n] = j;
      n += keys[j] >= bound;
    }
  }
  for (int64_t i = 0; i < n; i++)  // ties: lowest index largest
    found[i] = static_cast<int64_t>(keys[places[i]]) * (int64_t{1} << 32) | (0xffffffff - static_cast<int64_t>(places[i]));
  const auto put = [&](int64_t rank, int64_t entry) {
    const float value = from_key(static_cast<int32_t>(entry >> 32));
    values[rank] = value < 0 ? 0 : value;  // a NaN stays
    indices[rank] = 0xffffffff - (entry & 0xffffffff);
  };
  if (n <= 256) {
    // Few: the rank of each is the number of larger ones, no branches; some at a time, each against all.
    constexpr int L = LANES / 2;
    const int64_t padded = (n + L - 1) / L * L;
    for (int64_t i = n; i < padded; i++) found[i] = INT64_MIN;
    for (int64_t i = 0; i < n; i += L) {
      const LongVec own = *reinterpret_cast<const UnalignedLongVec*>(found + i);
      LongVec rank = {};
      for (int64_t j = 0; j < n; j++) rank -= LongVec{} + found[j] > own;
      for (int64_t l = 0; l < L && i + l < n; l++)
        if (rank[l] < k) put(rank[l], found[i + l]);
    }
    return;
  }
  std::nth_element(found, found + (k - 1), found + n, std::greater<int64_t>());
  std::sort(found, found + k, std::greater<int64_t>());
  for (int64_t i = 0; i < k; i++) put(i, found[i]);
}

// Appends every key above its own threshold, rising index; returns how many. limits [stride], INT_MAX past F.
inline int64_t select_above(const int32_t* keys, const int32_t* limits, int64_t stride, std::vector<float>& values,
                            std::vector<int32_t>& indices) {
  int64_t count = 0;
  for (int64_t i = 0; i < stride; i += LANES) {
    const IntVec above = load_int(keys + i) > load_int(limits + i);
    int32_t any = 0;
    for (int l = 0; l < LANES; l++) any |= above[l];
    if (any == 0) continue;
    for (int l = 0; l < LANES; l++)
      if (above[l] != 0) {
        values.push_back(from_key(keys[i + l]));
        indices.push_back(static_cast<int32_t>(i + l));
        count++;
      }
  }
  return count;
}

inline void pick(const int32_t* keys, const int64_t* at, int64_t m, float* values) {
  for (int64_t i = 0; i < m; i++) values[i] = from_key(keys[at[i]]);
}
