// The kernel, written once and compiled for each instruction set by rms_norm.cpp (no include guard on purpose).
//
// Memory-bound: a row is read once, kept in the first-level cache, and written once, where the layer's own takes a dozen
// passes over memory, half of them over float32 copies. Rounding is the layers': see RmsNormParams::round_once.

#include "cpu/silu.h"

// What a layer does between two operations in half precision.
inline void round_to_type(Element type, float* line, int64_t n) {
  if (type == Element::bf16)
    for (int64_t i = 0; i < n; i++) line[i] = from_bfloat(to_bfloat(line[i]));
  if (type == Element::f16)
    for (int64_t i = 0; i < n; i++) line[i] = from_half(to_half(line[i]));
}

// Rows [first, last). memory: [padded] row | [padded] gate | [padded] weight, padded to 16.
inline void normalise(const RmsNormParams& p, int64_t first, int64_t last, float* memory) {
  const int64_t padded = (p.D + 15) / 16 * 16;
  float* const line = memory;
  float* const gate = line + padded;
  float* const weight = gate + padded;
  for (int64_t i = 0; i < padded; i++) {
    line[i] = gate[i] = 0.0f;
    weight[i] = i < p.D ? (p.zero_centred ? 1.0f + p.weight[i] : p.weight[i]) : 0.0f;
  }
  for (int64_t row = first; row < last; row++) {
    convert_in(p.x.type, p.x.at(row, 0, 0), line, p.D);
    // A row that holds an infinity or a NaN left them in the padding, times 0.
    for (int64_t i = p.D; i < padded; i++) line[i] = 0.0f;
    const Vec scale = Vec{} + 1.0f / std::sqrt(dot(line, line, padded) / static_cast<float>(p.D) + p.eps);
    for (int64_t i = 0; i < padded; i += LANES) store(line + i, load(line + i) * scale);
    if (!p.round_once) round_to_type(p.x.type, line, padded);
    for (int64_t i = 0; i < padded; i += LANES) store(line + i, load(line + i) * load(weight + i));
    if (p.gate.data != nullptr) {
      if (!p.round_once) round_to_type(p.x.type, line, padded);
      convert_in(p.gate.type, p.gate.at(row, 0, 0), gate, p.D);
      for (int64_t i = 0; i < padded; i += LANES) store(line + i, load(line + i) * silu(load(gate + i)));
    }
    convert_out(p.x.type, line, static_cast<char*>(p.y) + row * p.D * element_size(p.x.type), p.D);
  }
}
