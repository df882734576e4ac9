// The kernel, written once and compiled for each instruction set by causal_conv.cpp (no include guard on purpose).
//
// Memory-bound: a channel and token costs W multiply-adds and one exponential, and is read and written once. Channels lie
// along the vectors and time along the loop, so what goes in and out keeps the layout [B, T, D] of the projection before it
// and of the recurrence after it, where a convolution over [B, D, T] costs the recurrence a transposed copy.

typedef int32_t IntVec __attribute__((vector_size(WRITESAE_LANES * 4)));

// e^x within 2 units in the last place, x limited to where neither e^x nor 1 / e^x overflows (a NaN gives anything).
inline Vec exponential(Vec x) {
  const Vec low = Vec{} - 87.0f, high = Vec{} + 87.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec magic = Vec{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which lies in the low bits
  const Vec shifted = x * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return (Vec)((IntVec)p + (((IntVec)shifted - (IntVec)magic) << 23));
}

// Tokens [first, last) of row b, inside the sequence that starts at `origin`, channels from `channel` on.
// memory: [W][BLOCK] weights | [BLOCK] bias | [W][BLOCK] the last W rows | [BLOCK] result
inline void convolve(const CausalConvParams& p, int64_t b, int64_t origin, int64_t first, int64_t last, int64_t channel,
                     float* memory) {
  const int64_t W = p.W, width = p.D - channel < BLOCK ? p.D - channel : BLOCK;
  const int64_t padded = (width + LANES - 1) / LANES * LANES;
  float* weight = memory;
  float* bias = weight + W * BLOCK;
  float* rows = bias + BLOCK;
  float* line = rows + W * BLOCK;
  for (int64_t c = 0; c < padded; c++) {
    for (int64_t s = 0; s < W; s++) weight[s * BLOCK + c] = c < width ? read(p.weight, channel + c, s, 0) : 0.0f;
    bias[c] = c < width && p.bias != nullptr ? p.bias[channel + c] : 0.0f;
  }
  std::memset(rows, 0, W * BLOCK * sizeof(float));
  // Row t lies at place t mod W.
  for (int64_t t = first - W + 1 > origin ? first - W + 1 : origin; t < first; t++)
    convert_in(p.x.type, p.x.at(b, t, channel), rows + t % W * BLOCK, width);
  for (int64_t t = first; t < last; t++) {
    convert_in(p.x.type, p.x.at(b, t, channel), rows + t % W * BLOCK, width);
    for (int64_t c = 0; c < padded; c += LANES) {
      Vec y = load(bias + c);
      for (int64_t s = 0; s < W; s++) y += load(weight + s * BLOCK + c) * load(rows + (t + 1 + s) % W * BLOCK + c);
      store(line + c, y);
    }
    char* out = static_cast<char*>(p.y) + ((b * p.T + t) * p.D + channel) * element_size(p.x.type);
    if (p.silu) {
      if (p.x.type != Element::f32) {  // a layer rounds between convolution and activation
        convert_out(p.x.type, line, out, width);
        convert_in(p.x.type, out, line, width);
      }
      for (int64_t c = 0; c < padded; c += LANES) {
        const Vec x = load(line + c);
        store(line + c, x / (exponential(-x) + 1.0f));
      }
    }
    convert_out(p.x.type, line, out, width);
  }
}
