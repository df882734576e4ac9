// The kernel, written once and compiled for each instruction set by causal_conv.cpp (no include guard on purpose).
//
// Memory-bound: a channel and token costs W multiply-adds and one exponential, and is read and written once. Channels lie
// along the vectors and time along the loop, so what goes in and out keeps the layout [B, T, D] of the projection before it
// and of the recurrence after it, where a convolution over [B, D, T] costs the recurrence a transposed copy.

#include "cpu/silu.h"

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
      for (int64_t c = 0; c < padded; c += LANES) store(line + c, silu(load(line + c)));
    }
    convert_out(p.x.type, line, out, width);
  }
}
