// What the host twin has for the hardware's arithmetic: sums of matrix products, matrix loads, narrow numbers.
//
// Sums. With `Settings::truncating` they are as Fasi, Higham, Mikaitis and Pranesh ("Numerical behavior of NVIDIA tensor cores",
// PeerJ Computer Science 7:e330, 2021), Khattak and Mikaitis ("Accurate models of NVIDIA tensor cores", arXiv 2512.07004, 2025)
// and Xie et al. ("MMA-Sim", arXiv 2511.10909, 2025) found them by experiment: products are exact; of a block of them and the
// accumulator all are shifted to the largest exponent, cut off there some bits below a float's last one, and added as whole
// numbers; the sum is cut off to a float, towards zero. A block is the whole depth of an instruction with two bits more
// (Hopper), or half of it with one bit more (Ampere). The exponent of a product is the sum of its factors', so that one of 2
// and more does not count as the larger. Not modelled: operands below the normal numbers of f16, which are normal here.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "tile.cuh"

namespace writesae::tile::twin {

namespace {

float half_of(uint32_t pair, int i, bool half) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * i));
  return half ? to_float(f16{bits}) : to_float(bf16{bits});
}

// Numbers of the twin's own, not looked at by sanitizers: this is where it spends its time.
#if defined(__GNUC__)
#define WRITESAE_UNCHECKED __attribute__((no_sanitize("address"), no_sanitize("undefined")))
#else
#define WRITESAE_UNCHECKED
#endif

WRITESAE_UNCHECKED void add_rounded(float* d, const float* a, const float* b, int depth) {
  for (int i = 0; i < 16; i++, d += 8) {
    float x[8] = {};
    for (int k = 0; k < depth; k++, a++)
      for (int column = 0; column < 8; column++) x[column] += *a * b[k * 8 + column];
    for (int column = 0; column < 8; column++) d[column] += x[column];
  }
}

constexpr int16_t NOTHING = -2000, NOT_FINITE = 10000;  // exponents of 0, and of infinity and NaN

WRITESAE_UNCHECKED int16_t exponent_of(float x) {
  const uint32_t bits = float_to_bits(x) & 0x7fffffffu;
  const int exponent = static_cast<int>(bits >> 23);
  if (bits == 0) return NOTHING;
  return exponent == 255 ? NOT_FINITE : static_cast<int16_t>(exponent == 0 ? -126 : exponent - 127);
}

WRITESAE_UNCHECKED float towards_zero(double x) {
  const float y = static_cast<float>(x);
  return std::fabs(static_cast<double>(y)) > std::fabs(x) ? std::nextafter(y, 0.0f) : y;
}

// Columns go side by side, as all loops over them here are for.
WRITESAE_UNCHECKED void add_truncated(float* d, const float* a, const float* b, int depth) {
  const bool hopper = settings.machine.architecture >= 90;
  const int block = hopper ? depth : depth / 2, bits = hopper ? 25 : 24;  // after the point of the largest
  int16_t of_b[16 * 8];
  for (int i = 0; i < depth * 8; i++) of_b[i] = exponent_of(b[i]);
  for (int i = 0; i < 16; i++, d += 8, a += depth) {
    for (int first = 0; first < depth; first += block) {
      int16_t most[8];
      for (int column = 0; column < 8; column++) most[column] = exponent_of(d[column]);
      for (int k = first; k < first + block; k++) {
        const int16_t of_a = exponent_of(a[k]);
        for (int column = 0; column < 8; column++) {
          const int16_t e = static_cast<int16_t>(of_a + of_b[k * 8 + column]);
          most[column] = e > most[column] ? e : most[column];
        }
      }
      bool finite = true;
      double scale[8];
      for (int column = 0; column < 8; column++) {
        finite = finite && most[column] < NOT_FINITE / 2;
        scale[column] = finite ? std::ldexp(1.0, bits - std::max<int>(most[column], -300)) : 0.0;
      }
      if (!finite) {
        for (int k = first; k < first + block; k++)
          for (int column = 0; column < 8; column++) d[column] += a[k] * b[k * 8 + column];
        continue;
      }
      // A term is below 2^27, so that eight of them fit 32 bits.
      int32_t sums[2][8] = {};
      for (int k = first; k < first + block; k++)
        for (int column = 0; column < 8; column++)
          sums[k / 8 % 2][column] += static_cast<int32_t>(static_cast<double>(a[k]) * b[k * 8 + column] * scale[column]);
      for (int column = 0; column < 8; column++) {
        const int64_t sum = int64_t{sums[0][column]} + sums[1][column] + static_cast<int32_t>(d[column] * scale[column]);
        d[column] = towards_zero(static_cast<double>(sum) / scale[column]);
      }
    }
  }
}

// d += a b with a [16][depth], b [depth][8] gathered from the lanes.
void multiply(void** args, const float* a, const float* b, int depth) {
  float d[16 * 8];
  const auto each = [&](const auto& move) {
    for (int l = 0; l < WARP; l++)
      for (int i = 0; i < 4; i++)
        move(static_cast<Product*>(args[l])->d[i], d[(l / 4 + 8 * (i / 2)) * 8 + 2 * (l % 4) + i % 2]);
  };
  each([](float mine, float& all) { all = mine; });
  add_product(d, a, b, depth);
  each([](float& mine, float all) { mine = all; });
}

}  // namespace

void add_product(float* d, const float* a, const float* b, int depth) {
  Statistics& c = counts();
  c.products++, c.multiply_adds += 16 * 8 * depth;
  settings.truncating ? add_truncated(d, a, b, depth) : add_rounded(d, a, b, depth);
}

void multiply_16(void** args, int, bool half) {
  float a[16 * 16], b[16 * 8];
  for (int l = 0; l < WARP; l++) {
    const auto* one = static_cast<Product*>(args[l]);
    const int g = l / 4, c = l % 4;
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 2; j++) a[(g + 8 * (i % 2)) * 16 + 2 * c + 8 * (i / 2) + j] = half_of(one->a[i], j, half);
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 2; j++) b[(2 * c + 8 * i + j) * 8 + g] = half_of(one->b[i], j, half);
  }
  multiply(args, a, b, 16);
}

void multiply_tf32(void** args, int) {
  float a[16 * 8], b[8 * 8];
  const auto read = [](uint32_t bits) { return bits_to_float(bits & 0xffffe000u); };  // the units drop the low bits
  for (int l = 0; l < WARP; l++) {
    const auto* one = static_cast<Product*>(args[l]);
    const int g = l / 4, c = l % 4;
    for (int i = 0; i < 4; i++) a[(g + 8 * (i % 2)) * 8 + c + 4 * (i / 2)] = read(one->a[i]);
    for (int i = 0; i < 2; i++) b[(c + 4 * i) * 8 + g] = read(one->b[i]);
  }
  multiply(args, a, b, 8);
}

void load_matrices(void** args, int, int matrices, bool transposed) {
  uint16_t rows[4][8][8];
  for (int m = 0; m < matrices; m++) {
    int in_bank[8] = {};
    for (int r = 0; r < 8; r++) {
      const void* row = static_cast<MatrixLoad*>(args[m * 8 + r])->row;
      std::memcpy(rows[m][r], row, 16);
      in_bank[reinterpret_cast<uintptr_t>(row) / 16 % 8]++;
    }
    int most = 1;
    for (int count : in_bank) most = count > most ? count : most;
    Statistics& c = counts();
    c.matrix_loads++, c.conflicts += most - 1;
    c.shared_bytes_read += 128;
  }
  for (int l = 0; l < WARP; l++) {
    uint32_t* r = static_cast<MatrixLoad*>(args[l])->r;
    for (int m = 0; m < matrices; m++) {
      const int a = l / 4, b = 2 * (l % 4);
      const uint16_t low = transposed ? rows[m][b][a] : rows[m][a][b];
      const uint16_t high = transposed ? rows[m][b + 1][a] : rows[m][a][b + 1];
      r[m] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

}  // namespace writesae::tile::twin

// ---- numbers --------------------------------------------------------------------------------------------------------

namespace writesae::tile {

bf16 to_bf16(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fffu};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

uint32_t to_tf32(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  const bool to_even = twin::settings.machine.architecture >= 90;  // ties; otherwise away from zero
  return (bits + (to_even ? 0x0fffu + ((bits >> 13) & 1u) : 0x1000u)) & 0xffffe000u;
}

float to_float(f16 x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float y;
  if (exponent == 31) {
    y = fraction != 0 ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  } else {
    y = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                      : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  }
  return x.bits & 0x8000u ? -y : y;
}

f16 to_f16(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000u : 0;
  if (std::isnan(x)) return {0x7fffu};
  const double magnitude = std::fabs(static_cast<double>(x));
  if (magnitude >= 65520.0) return {static_cast<uint16_t>(sign | 0x7c00u)};
  // In units of the last place of its binade (2^-24 below the smallest normal number); nearbyint rounds ties to even.
  int exponent = magnitude < 6.103515625e-05 ? -14 : std::ilogb(magnitude);
  const double units = std::nearbyint(std::ldexp(magnitude, 10 - exponent));
  // For normal numbers units is 1024..2048, and 2048 carries into the exponent by itself.
  const int bits =
      magnitude < 6.103515625e-05 ? static_cast<int>(units) : ((exponent + 15 - 1) << 10) + static_cast<int>(units);
  return {static_cast<uint16_t>(sign | bits)};
}

}  // namespace writesae::tile
