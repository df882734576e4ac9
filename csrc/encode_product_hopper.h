// P = v left^T, the first of the encoder's two products alone, by Hopper's own units: bf16 in, float32 out. A prototype (docs/
// hopper.md) that nothing chooses by itself.
#pragma once

#include <cstdint>

namespace writesae {

struct EncodeProductParams {
  int64_t F, T, K;                // features, tokens, key size
  const void* v;                  // [F, K] bf16, last stride 1
  const void* left;               // [T, K] likewise
  int64_t v_stride, left_stride;  // of rows, in elements
  float* out;                     // [F, T]
};

namespace cuda {

constexpr int64_t PRODUCT_MAX_K = 256;

// `ping_pong`: two warpgroups take tiles of 64 features in turn, so that one multiplies while the other stores; else they share
// tiles of 128. `cluster`: 1, or 2 blocks that copy every tile of features together. Does not wait. Throws std::runtime_error
// where the device, the build or a tensor's layout is not one it can run on.
void encode_product_hopper(const EncodeProductParams& p, bool ping_pong, int cluster, void* stream);

}  // namespace cuda
}  // namespace writesae
