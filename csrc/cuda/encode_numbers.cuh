// Operands of encode's products: how a float becomes what the matrix units take, and one step of a product.
//  - bf16, tf32: rounded, one product a step.
//  - fp32: three bf16 parts of 8 bits each, x = high + middle + low (24 bits, all of a float), and the six products that
//    matter (what is left out is below 2^-24 of the whole). The time of the usual three tf32 products of two parts of 11
//    bits, and two bits more. The five small products have a sum of their own, which the large one's rounding does not reach.
// Infinities in fp32: infinity - infinity is in the parts, so that a product may be NaN where it should be infinite.
#pragma once

#include "encode.h"
#include "tile.cuh"

namespace writesae::cuda {

template <Precision P, int D>  // D: K and V are padded to it by zeros
struct Numbers {
  static constexpr int PLANES = P == Precision::fp32 ? 3 : 1;
  static constexpr int STEP = P == Precision::tf32 ? 8 : 16;  // of the contraction, in one product
  static constexpr int STEPS = D / STEP;
  static constexpr int BYTES = P == Precision::bf16 ? 2 : P == Precision::tf32 ? 4 : 6;  // an element
  static constexpr int TILE = 16;                                                        // features
  static constexpr int TILE_BYTES = TILE * 2 * D * BYTES;                                // v and w
  static constexpr int TILE_VECTORS = TILE_BYTES / 16;
  // Operands of a warp's rows stay in registers, at most 128 of them; where not even 8 rows fit, in shared memory.
  static constexpr bool HELD = D * BYTES <= 1024;
  static constexpr int FIT = HELD ? 1024 / (D * BYTES) : 1;
  static constexpr int COLUMNS = FIT >= 4 && P != Precision::tf32 ? 4 : FIT >= 2 ? 2 : 1;  // column tiles a warp
  static constexpr int ROWS = 8 * COLUMNS;                                                 // rows of the stream a warp
  static constexpr int STAGES = TILE_BYTES > 24 * 1024 ? 2 : 3;
  static constexpr int HELD_WORDS = HELD ? 0 : 2 * STEPS * PLANES * 2 * tile::WARP;  // of shared memory a warp
};

// Two neighbours of the contraction (bf16 planes: low half first) or, for tf32, the first alone.
template <Precision P>
__device__ __forceinline__ void convert(float x, float y, uint32_t (&parts)[P == Precision::fp32 ? 3 : 1]) {
  if constexpr (P == Precision::tf32) {
    parts[0] = tile::to_tf32(x);
  } else if constexpr (P == Precision::bf16) {
    parts[0] = tile::pack_bf16(x, y);
  } else {
#pragma unroll
    for (int i = 0; i < 3; i++) {
      const uint32_t pair = parts[i] = tile::pack_bf16(x, y);
      x -= tile::bits_to_float(pair << 16);
      y -= tile::bits_to_float(pair & 0xffff0000u);
    }
  }
}

// large + small += a b on a 16 x 8 tile.
template <Precision P>
__device__ __forceinline__ void multiply(float (&large)[4], float (&small)[4],
                                         const uint32_t (&a)[P == Precision::fp32 ? 3 : 1][4],
                                         const uint32_t (&b)[P == Precision::fp32 ? 3 : 1][2]) {
  if constexpr (P == Precision::tf32) {
    tile::mma_tf32(large, a[0], b[0]);
  } else if constexpr (P == Precision::bf16) {
    tile::mma_bf16(large, a[0], b[0]);
  } else {
    tile::mma_bf16(small, a[2], b[0]);
    tile::mma_bf16(large, a[0], b[0]);
    tile::mma_bf16(small, a[0], b[2]);
    tile::mma_bf16(small, a[1], b[1]);
    tile::mma_bf16(small, a[1], b[0]);
    tile::mma_bf16(small, a[0], b[1]);
  }
}

__device__ __forceinline__ float load_element(const void* data, Element type, int64_t i) {
  if (type == Element::f32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return type == Element::bf16 ? tile::to_float(tile::bf16{bits}) : tile::to_float(tile::f16{bits});
}

}  // namespace writesae::cuda
