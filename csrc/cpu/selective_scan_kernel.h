// The kernel, written once and compiled for each instruction set by selective_scan.cpp and selective_scan_backward.cpp (no include
// guard on purpose).
//
// Channels lie along the vectors: nothing is summed across lanes, and what a channel comes to does not depend on how channels are
// dealt out. The state of a vector of channels, K vectors, goes through a tile of tokens in the first-level cache, as do its
// rates; x, dt and o pass by in tiles of TILE tokens, converted and, where a channel's tokens lie together, transposed once.
//
// Counted an entry of the state and token, in vector operations: 11 for the exponential (product, range 3, polynomial 5,
// exponent 2), 3 for the state and the output. On a Zen 4 core 10 of them are products, one of 16 lanes a cycle.

typedef uint32_t Whole __attribute__((vector_size(WRITESAE_LANES * 4)));

constexpr int64_t TILE = 32;  // tokens

inline Vec all(float x) { return Vec{} + x; }

// 2^(dt rate), the rate being A log2 e: e^(dt A), with a relative error of 1e-7 beside that of an exponent rounded to float32, and
// exact where that is 0. SMALL: no exponent is beyond 125, which saves the ends; in between both give the same bits. What is below
// 2^-125 is 0, what is above 2^127 infinite.
template <bool SMALL>
inline Vec decay(Vec dt, Vec rate) {
  const Vec y = dt * rate, magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  const Vec shifted = y + magic, whole = shifted - magic;
  const Vec f = y - whole;
  Vec p = f * 1.3264727e-3f + 9.6715130e-3f;  // (2^f - 1) / f on [-1/2, 1/2]
  p = p * f + 5.5507336e-2f;
  p = p * f + 2.4022242e-1f;
  p = p * f + 6.9314700e-1f;
  p = p * f + 1.0f;
  const Vec e = (Vec)((Whole)p + ((Whole)shifted << 23));
  if constexpr (SMALL) return e;
  const Vec zero = {}, infinite = all(std::numeric_limits<float>::infinity());
  return whole < all(-125.0f) ? zero : whole > all(127.0f) ? infinite : whole == whole ? e : whole;
}

// Whether no exponent of `count` tokens is beyond 125, where `bound` is the largest rate of each lane.
inline bool small_exponents(const float* dt, int64_t ld, int64_t count, Vec bound) {
  Vec top = {};
  for (int64_t t = 0; t < count; t++) {
    Vec d = load(dt + t * ld);
    d = d < Vec{} ? -d : d;
    top = d <= top ? top : d;
  }
  top *= bound;
  bool small = true;
  for (int lane = 0; lane < LANES; lane++) small = small && top[lane] <= 125.0f;
  return small;
}

// Tokens of one vector of channels. dt, u, o: rows of tokens, ld apart; B, C: [count][K]; rates, state: [K][LANES].
struct Run {
  int64_t K, count, ld;
  const float *dt, *u, *B, *C, *rates;
  float *o, *state;
};

template <bool SMALL, bool READ>
inline void advance_in(const Run& run) {
  const int64_t K = run.K;
  for (int64_t t = 0; t < run.count; t++) {
    const Vec dt = load(run.dt + t * run.ld), u = load(run.u + t * run.ld);
    const float *B = run.B + t * K, *C = run.C + t * K;
    Vec o = READ ? load(run.o + t * run.ld) : Vec{};
    for (int64_t n = 0; n < K; n++) {
      const Vec s = decay<SMALL>(dt, load(run.rates + n * LANES)) * load(run.state + n * LANES) + u * B[n];
      store(run.state + n * LANES, s);
      if constexpr (READ) o += s * C[n];
    }
    if constexpr (READ) store(run.o + t * run.ld, o);
  }
}

// The state after the run, and, of READ, o, which holds D x on entry; C and o are not looked at otherwise.
template <bool READ>
inline void advance(const Run& run, Vec bound) {
  if (small_exponents(run.dt, run.ld, run.count, bound)) return advance_in<true, READ>(run);
  advance_in<false, READ>(run);
}

// Tokens [first, first + count), at most TILE, of channels [channel, channel + width) as rows ld apart; the rest of a row up to
// `padded` is 0. line: [4][TILE]. `to` has TILE rows.
inline void load_tile(const View& x, int64_t b, int64_t first, int64_t count, int64_t channel, int64_t width, int64_t padded,
                      int64_t ld, float* to, float* line) {
  if (x.stride[2] == 1) {
    for (int64_t t = 0; t < count; t++) convert_in(x.type, x.at(b, first + t, channel), to + t * ld, width);
  } else {
    for (int64_t c = 0; c < width; c += 4) {
      for (int64_t i = 0; i < 4; i++) {
        if (c + i < width) convert_in(x.type, x.at(b, first, channel + c + i), line + i * TILE, count);
        for (int64_t t = c + i < width ? count : 0; t < TILE; t++) line[i * TILE + t] = 0;
      }
      transpose(4, TILE, line, TILE, to + c, ld);
    }
  }
  for (int64_t t = 0; t < count; t++)
    for (int64_t c = width; c < padded; c++) to[t * ld + c] = 0;
}

// What a block of channels holds, in vectors of LANES: rates and bounds of them, and a state.
struct Block {
  int64_t K, channel, width, vectors, ld;  // ld: of tiles, vectors * LANES
  float *rates, *bound, *state;            // [vectors][K][LANES], [vectors][LANES], [vectors][K][LANES]
};

inline int64_t block_floats(int64_t K, int64_t width) {
  const int64_t padded = (width + 15) / 16 * 16;
  return (2 * K + 1) * padded;
}

inline Block open_block(const SelectiveScanParams& p, int64_t channel, int64_t width, float* memory) {
  Block block = {p.K, channel, width, (width + LANES - 1) / LANES, 0, nullptr, nullptr, nullptr};
  block.ld = block.vectors * LANES;
  block.rates = memory;
  block.state = memory + p.K * block.ld;
  block.bound = block.state + p.K * block.ld;
  for (int64_t c = 0; c < block.ld; c += 4) {
    float* const to = block.rates + c / LANES * p.K * LANES + c % LANES;
    if (c + 4 <= width && p.K % 4 == 0 && p.rates.type == Element::f32 && p.rates.stride[1] == 1) {
      transpose(4, p.K, static_cast<const float*>(p.rates.at(channel + c, 0, 0)), p.rates.stride[0], to, LANES);
    } else {
      for (int64_t n = 0; n < p.K; n++)
        for (int64_t i = 0; i < 4; i++) to[n * LANES + i] = c + i < width ? read(p.rates, channel + c + i, n, 0) : 0.0f;
    }
  }
  for (int64_t v = 0; v < block.vectors; v++) {
    Vec most = {};
    for (int64_t n = 0; n < p.K; n++) {
      float* const at = block.rates + (v * p.K + n) * LANES;
      const Vec rate = load(at) * 1.44269504f, size = rate < Vec{} ? -rate : rate;
      store(at, rate);
      most = size <= most ? most : size;
    }
    store(block.bound + v * LANES, most);
  }
  return block;
}

// One row of a state [K, V] at `from`, null for zero, to or from the block's.
inline void load_state(const Block& block, const float* from, int64_t V) {
  for (int64_t n = 0; n < block.K; n++)
    for (int64_t v = 0; v < block.vectors; v++) {
      const int64_t c = v * LANES, size = block.width - c < LANES ? block.width - c : LANES;
      float* const to = block.state + (v * block.K + n) * LANES;
      if (from == nullptr || size < LANES) store(to, Vec{});
      if (from != nullptr) std::memcpy(to, from + n * V + block.channel + c, size * sizeof(float));
    }
}

inline void store_state(const Block& block, const float* state, float* to, int64_t V) {
  for (int64_t n = 0; n < block.K; n++)
    for (int64_t v = 0; v < block.vectors; v++) {
      const int64_t c = v * LANES, size = block.width - c < LANES ? block.width - c : LANES;
      std::memcpy(to + n * V + block.channel + c, state + (v * block.K + n) * LANES, size * sizeof(float));
    }
}

// state += factor left row^T; row: a row of the block, padded.
inline void add_outer(const Block& block, float* state, float factor, const float* left, const float* row) {
  for (int64_t v = 0; v < block.vectors; v++) {
    const Vec r = load(row + v * LANES);
    for (int64_t n = 0; n < block.K; n++) {
      float* const s = state + (v * block.K + n) * LANES;
      store(s, load(s) + r * (factor * left[n]));
    }
  }
}

// The block's channels of an edit's right side, padded with zeros.
inline void load_right(const Block& block, const EditList& edits, int64_t V, int64_t e, float* row) {
  std::memcpy(row, edits.right + e * V + block.channel, block.width * sizeof(float));
  for (int64_t c = block.width; c < block.ld; c++) row[c] = 0;
}

inline int64_t position(const EditList& edits, int64_t e) { return edits.index[4 * e + 1]; }
