// The kernel, written once and compiled for each instruction set by causal_conv.cpp (no include guard on purpose).
//
// Memory-bound: a channel and token costs W multiply-adds and one exponential, and is read and written once. Channels lie
// along the vectors and time along the loop, so what goes in and out keeps the layout [B, T, D] of the projection before it
// and of the recurrence after it, where a convolution over [B, D, T] costs the recurrence a transposed copy.

#include "cpu/silu.h"

// Which row a tap meets is worked out once a token, not in the loop over channels, where the division took most of the time.
inline void convolve_row(const float* weight, const float* bias, const float* rows, int64_t t, int64_t W, int64_t padded,
                         float* line) {
  const auto row = [&](int64_t s) { return rows + (t + 1 + s) % W * BLOCK; };
  if (W == 4) {  // every model so far: in registers
    const float *const a = row(0), *const b = row(1), *const c = row(2), *const d = row(3);
    for (int64_t i = 0; i < padded; i += LANES) {
      Vec y = load(bias + i) + load(weight + i) * load(a + i);
      y += load(weight + BLOCK + i) * load(b + i);
      y += load(weight + 2 * BLOCK + i) * load(c + i);
      store(line + i, y + load(weight + 3 * BLOCK + i) * load(d + i));
    }
    return;
  }
  for (int64_t s = 0; s < W; s++) {
    const float *const from = s == 0 ? bias : line, *const tap = weight + s * BLOCK, *const x = row(s);
    for (int64_t i = 0; i < padded; i += LANES) store(line + i, load(from + i) + load(tap + i) * load(x + i));
  }
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
    convolve_row(weight, bias, rows, t, W, padded, line);
    char* out = static_cast<char*>(p.y) + ((b * p.T + t) * p.D + channel) * element_size(p.x.type);
    if (p.silu) {
      if (p.x.type != Element::f32) {  // a layer rounds between convolution and activation
        convert_out(p.x.type, line, out, width);
        convert_in(p.x.type, out, line, width);
      }
      for (int64_t c = 0; c < padded; c += LANES) store(line + c, silu(load(line + c)));
    }
    convert_out(p.x.type, line, out, width);
  }
}
