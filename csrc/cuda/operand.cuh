// Matrix products by element type: tiles in shared memory, their shares per lane, and d += a b on 16 x 8 tiles.
//
// bf16 and f16 multiply as they are; float multiplies in three tf32 products (each number split into a rounded part and the
// rest; rest x rest is dropped), which keeps about 21 bits. Sums are float.
// One convention lets results become left operands without leaving their registers: `accumulators` turns neighbouring
// 16 x 8 results c (rows g and g + 8, columns 2c and 2c + 1 of a lane) into a 16 x STEP operand. For tf32 a lane's operand
// columns are c and c + 4; since a sum may run in any order, column 2c plays c and 2c + 1 plays c + 4, in both operands.
#pragma once

#include "tile.cuh"

namespace writesae::cuda {

using tile::bf16;
using tile::f16;

// Rows of COLUMNS elements in shared memory, in units of 16 bytes placed so that eight rows at one unit lie in different
// banks: no padding, and matrix loads without conflicts.
//
// `start` tells tiles of one piece of memory apart (the stages of a loop). A lane's place in a pattern of loads (`lane_place`,
// made once per tile) is moved to another row and column by one exclusive or and constants (`moved`); since places hold
// `start`, which changes from round to round, the compiler does not keep a register for every address.
template <class T, int COLUMNS>
struct Tile {
  static constexpr int EACH = 16 / static_cast<int>(sizeof(T));  // elements of a unit
  static constexpr int UNITS = COLUMNS / EACH;
  static constexpr int REPEAT = UNITS < 8 ? 8 / UNITS : 1, MASK = (UNITS < 8 ? UNITS : 8) - 1;
  T* data;
  int start = 0;

  __device__ __forceinline__ int place(int row, int column) const {
    return start + row * COLUMNS + (column / EACH ^ (row / REPEAT & MASK)) * EACH + column % EACH;
  }
  __device__ __forceinline__ T* at(int row, int column) const { return data + place(row, column); }
  // From the place of (r, x), r < 16 and x < 2 EACH, to that of (row + r, column + x): row a multiple of 8, column of 2 EACH.
  static __device__ __forceinline__ int moved(int place, int row, int column) {
    const int unit = column / EACH;
    return (place ^ (unit & MASK) * EACH) + row * COLUMNS + (unit & ~MASK) * EACH;
  }
};

// A lower triangular C x C matrix, its upper blocks of 16 x 16 left out where that saves memory: with C = 64 block row 0
// (one block) lies in the two blocks that block row 2 leaves free, and block rows 1, 2, 3 come first.
template <class T, int C>
struct Triangle {
  static constexpr int EACH = 16 / static_cast<int>(sizeof(T));
  static constexpr int ROWS = C == 64 ? 48 : C;
  static constexpr int SIZE = ROWS * C;
  T* data;
  int start = 0;

  __device__ __forceinline__ T* at(int row, int column) const {
    const Tile<T, C> whole = {data, start};
    if constexpr (C == 64) return row < 16 ? whole.at(row + 16, column + 48) : whole.at(row - 16, column);
    return whole.at(row, column);
  }
  // The place of (row, column) seen as an ordinary tile; `moved` knows better.
  __device__ __forceinline__ int place(int row, int column) const { return Tile<T, C>{data, start}.place(row, column); }
  static __device__ __forceinline__ int moved(int place, int row, int column) {
    if constexpr (C == 64)
      return row < 16 ? Tile<T, C>::moved(place, row + 16, column + 48) : Tile<T, C>::moved(place, row - 16, column);
    return Tile<T, C>::moved(place, row, column);
  }
};

// Rows of COLUMNS floats, 8 more apart: pairs of floats down a column of tiles lie in different banks.
template <int COLUMNS>
struct Padded {
  static constexpr int STRIDE = COLUMNS + 8;
  float* data;

  __device__ __forceinline__ int place(int row, int column) const { return row * STRIDE + column; }
  __device__ __forceinline__ float* at(int row, int column) const { return data + place(row, column); }
  static __device__ __forceinline__ int moved(int place, int row, int column) { return place + row * STRIDE + column; }
};

// T = bf16 or f16. A: 16 x STEP, B: STEP x 8.
template <class T>
struct Operand {
  static constexpr int STEP = 16;
  static constexpr int CHUNK = 64;  // tokens of a chunk of the recurrences
  struct A {
    uint32_t x[4];
  };
  struct B {
    uint32_t x[2];
  };

  static __device__ __forceinline__ T narrow(float x) {
    T y;
    tile::store_float(&y, x);
    return y;
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high);
  static __device__ __forceinline__ A accumulators(const float (*c)[4]) {
    return {{pack(c[0][0], c[0][1]), pack(c[0][2], c[0][3]), pack(c[1][0], c[1][1]), pack(c[1][2], c[1][3])}};
  }
  // Where a lane reads: of left operands and of right operands down columns; of right operands along rows.
  template <class Matrix>
  static __device__ __forceinline__ int lane_place_down(const Matrix& m) {
    return m.place(tile::lane() % 16, tile::lane() / 16 * 8);
  }
  template <class Matrix>
  static __device__ __forceinline__ int lane_place_along(const Matrix& m) {
    return m.place(tile::lane() % 8 + tile::lane() / 16 * 8, tile::lane() / 8 % 2 * 8);
  }
  // Rows row.. and columns column.. of a tile, as a left operand.
  template <class Matrix>
  static __device__ __forceinline__ A load_left(const Matrix& m, int place_down, int row, int column) {
    A a;
    tile::load_matrices(a.x, m.data + Matrix::moved(place_down, row, column));
    return a;
  }
  // Two right operands whose columns are rows row.. and row + 8.. of a tile; the sum runs along columns column... .
  template <class Matrix>
  static __device__ __forceinline__ void load_rows(B (&b)[2], const Matrix& m, int place_along, int row, int column) {
    uint32_t r[4];
    tile::load_matrices(r, m.data + Matrix::moved(place_along, row, column));
    b[0].x[0] = r[0], b[0].x[1] = r[1], b[1].x[0] = r[2], b[1].x[1] = r[3];
  }
  // Two right operands whose columns are columns column.. and column + 8.. of a tile; the sum runs along rows row... .
  template <class Matrix>
  static __device__ __forceinline__ void load_columns(B (&b)[2], const Matrix& m, int place_down, int row, int column) {
    uint32_t r[4];
    tile::load_matrices_transposed(r, m.data + Matrix::moved(place_down, row, column));
    b[0].x[0] = r[0], b[0].x[1] = r[1], b[1].x[0] = r[2], b[1].x[1] = r[3];
  }
  // Columns 0..15 of rows row..row + 15, transposed: c[i] is the 16 x 8 tile of rows row + 8 i... .
  template <class Matrix>
  static __device__ __forceinline__ void load_transposed(float (&c)[2][4], const Matrix& m, int place_along, int row) {
    uint32_t r[4];
    tile::load_matrices_transposed(r, m.data + Matrix::moved(place_along, row, 0));
#pragma unroll
    for (int i = 0; i < 4; i++) {
      c[i / 2][2 * (i % 2)] = half(r[i], 0);
      c[i / 2][2 * (i % 2) + 1] = half(r[i], 1);
    }
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const A& a, const B& b);
  // The sum of squares of this lane's share: rows g (sum[0]) and g + 8 (sum[1]).
  static __device__ __forceinline__ void add_squares(float (&sum)[2], const A& a) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float low = half(a.x[i], 0), high = half(a.x[i], 1);
      sum[i % 2] += low * low + high * high;
    }
  }
  static __device__ __forceinline__ float half(uint32_t pair, int i) {
    return tile::to_float(T{static_cast<uint16_t>(pair >> (16 * i))});
  }
};

template <>
__device__ __forceinline__ uint32_t Operand<bf16>::pack(float low, float high) {
  return tile::pack_bf16(low, high);
}
template <>
__device__ __forceinline__ uint32_t Operand<f16>::pack(float low, float high) {
  return tile::pack_f16(low, high);
}
template <>
__device__ __forceinline__ void Operand<bf16>::multiply(float (&d)[4], const A& a, const B& b) {
  tile::mma_bf16(d, a.x, b.x);
}
template <>
__device__ __forceinline__ void Operand<f16>::multiply(float (&d)[4], const A& a, const B& b) {
  tile::mma_f16(d, a.x, b.x);
}

template <>
struct Operand<float> {
  static constexpr int STEP = 8;
  static constexpr int CHUNK = 32;
  struct A {
    float x[4];
  };
  struct B {
    float x[2];
  };

  static __device__ __forceinline__ float narrow(float x) { return x; }
  static __device__ __forceinline__ A accumulators(const float (*c)[4]) { return {{c[0][0], c[0][2], c[0][1], c[0][3]}}; }
  // `along` is the place of (g, 2 c), for left operands too; down columns rows 2 c and 2 c + 1 differ in how they are placed.
  template <class Matrix>
  static __device__ __forceinline__ int lane_place_along(const Matrix& m) {
    return m.place(tile::lane() / 4, 2 * (tile::lane() % 4));
  }
  struct Down {
    int even, odd;
  };
  template <class Matrix>
  static __device__ __forceinline__ Down lane_place_down(const Matrix& m) {
    const int c = 2 * (tile::lane() % 4), g = tile::lane() / 4;
    return {m.place(c, g), m.place(c + 1, g)};
  }
  template <class Matrix>
  static __device__ __forceinline__ A load_left(const Matrix& m, Down, int row, int column) {
    const int along = lane_place_along(m);
    const float* low = m.data + Matrix::moved(along, row, column);
    const float* high = m.data + Matrix::moved(along, row + 8, column);
    return {{low[0], high[0], low[1], high[1]}};
  }
  template <class Matrix>
  static __device__ __forceinline__ void load_rows(B (&b)[2], const Matrix& m, int place_along, int row, int column) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float* from = m.data + Matrix::moved(place_along, row + 8 * i, column);
      b[i].x[0] = from[0], b[i].x[1] = from[1];
    }
  }
  template <class Matrix>
  static __device__ __forceinline__ void load_columns(B (&b)[2], const Matrix& m, Down down, int row, int column) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      b[i].x[0] = m.data[Matrix::moved(down.even, row, column + 8 * i)];
      b[i].x[1] = m.data[Matrix::moved(down.odd, row, column + 8 * i)];
    }
  }
  template <class Matrix>
  static __device__ __forceinline__ void load_transposed(float (&d)[2][4], const Matrix& m, int, int row) {
    const int g = tile::lane() / 4, c = row + 2 * (tile::lane() % 4);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) d[i][e] = *m.at(c + 8 * i + e % 2, g + e / 2 * 8);
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const A& a, const B& b) {
    uint32_t ah[4], al[4], bh[2], bl[2];
#pragma unroll
    for (int i = 0; i < 4; i++) ah[i] = tile::to_tf32(a.x[i]), al[i] = tile::to_tf32(a.x[i] - tile::bits_to_float(ah[i]));
#pragma unroll
    for (int i = 0; i < 2; i++) bh[i] = tile::to_tf32(b.x[i]), bl[i] = tile::to_tf32(b.x[i] - tile::bits_to_float(bh[i]));
    tile::mma_tf32(d, al, bh);
    tile::mma_tf32(d, ah, bl);
    tile::mma_tf32(d, ah, bh);
  }
  static __device__ __forceinline__ void add_squares(float (&sum)[2], const A& a) {
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i % 2] += a.x[i] * a.x[i];
  }
};

}  // namespace writesae::cuda
