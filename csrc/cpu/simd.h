// Vectors of LANES floats and conversions, written once with the compiler's vector types. No include guard on purpose:
// each kernel file includes this once inside a namespace per instruction set, between the pragmas of isa.h, with
// WRITESAE_LANES defined. Standard headers must already be included.

constexpr int LANES = WRITESAE_LANES;

typedef float Vec __attribute__((vector_size(WRITESAE_LANES * 4)));
typedef float UnalignedVec __attribute__((vector_size(WRITESAE_LANES * 4), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<UnalignedVec*>(p) = x; }

typedef float Quarter __attribute__((vector_size(16)));

inline float sum(Vec x) {
  Quarter part[LANES / 4];
  std::memcpy(part, &x, sizeof(x));
  for (int width = LANES / 8; width >= 1; width /= 2)
    for (int i = 0; i < width; i++) part[i] += part[i + width];
  return (part[0][0] + part[0][1]) + (part[0][2] + part[0][3]);
}

// n is a multiple of LANES.
inline float dot(const float* a, const float* b, int64_t n) {
  Vec total = {};
  for (int64_t i = 0; i < n; i += LANES) total += load(a + i) * load(b + i);
  return sum(total);
}

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float from_half(uint16_t half) {
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  uint32_t bits = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
  if ((half & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;  // infinity and NaN
  return bits_to_float(bits | static_cast<uint32_t>(half & 0x8000u) << 16);
}

// Round to nearest, ties to even. Without branches, so that loops over it are vectorised.
inline uint16_t to_half(float x) {
  uint32_t bits = float_to_bits(x);
  const uint32_t sign = bits & 0x80000000u;
  bits ^= sign;
  const uint32_t large = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;                   // 65536 and above, infinity, NaN
  const uint32_t small = float_to_bits(bits_to_float(bits) + 0.5f) - 0x3f000000u;  // subnormal: the addition rounds
  const uint32_t usual = (bits + 0xc8000fffu + ((bits >> 13) & 1u)) >> 13;
  const uint32_t half = bits >= 0x47800000u ? large : bits < 0x38800000u ? small : usual;
  return static_cast<uint16_t>(half | sign >> 16);
}

inline float from_bfloat(uint16_t x) { return bits_to_float(static_cast<uint32_t>(x) << 16); }

inline uint16_t to_bfloat(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// n elements of any type to float.
inline void convert_in(Element type, const void* from, float* to, int64_t n) {
  if (type == Element::f32) {
    std::memcpy(to, from, n * sizeof(float));
    return;
  }
  const uint16_t* bits = static_cast<const uint16_t*>(from);
  if (type == Element::bf16) {
    for (int64_t i = 0; i < n; i++) to[i] = from_bfloat(bits[i]);
  } else {
    for (int64_t i = 0; i < n; i++) to[i] = from_half(bits[i]);
  }
}

inline void convert_out(Element type, const float* from, void* to, int64_t n) {
  if (type == Element::f32) {
    std::memcpy(to, from, n * sizeof(float));
    return;
  }
  uint16_t* bits = static_cast<uint16_t*>(to);
  if (type == Element::bf16) {
    for (int64_t i = 0; i < n; i++) bits[i] = to_bfloat(from[i]);
  } else {
    for (int64_t i = 0; i < n; i++) bits[i] = to_half(from[i]);
  }
}

inline float read(const View& x, int64_t a, int64_t b, int64_t c) {
  float value;
  convert_in(x.type, x.at(a, b, c), &value, 1);
  return value;
}

// A row of x as floats, padded with zeros: where it lies if nothing is to be done, else in `row`.
inline const float* float_row(const View& x, int64_t a, int64_t b, int64_t c, int64_t n, int64_t padded, float* row) {
  if (x.type == Element::f32 && n == padded) return static_cast<const float*>(x.at(a, b, c));
  convert_in(x.type, x.at(a, b, c), row, n);
  for (int64_t i = n; i < padded; i++) row[i] = 0;
  return row;
}

// Reads one key or query row into `row` (padded with zeros to `padded`), normalised when asked, times `scale`.
inline void read_row(const View& x, int64_t a, int64_t b, int64_t c, int64_t K, int64_t padded, bool normalise, float scale,
                     float* row) {
  convert_in(x.type, x.at(a, b, c), row, K);
  for (int64_t i = K; i < padded; i++) row[i] = 0;
  if (normalise) scale *= 1.0f / std::sqrt(dot(row, row, padded) + 1e-6f);
  if (normalise || scale != 1.0f)
    for (int64_t i = 0; i < K; i++) row[i] *= scale;
}
