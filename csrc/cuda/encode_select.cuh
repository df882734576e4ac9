// Selection. A lane owns a token: it looks at the token's 16 activations of each feature tile, keeps those above its bar in
// its column of a buffer in shared memory, and when that fills, raises the bar to about the k-th largest so far and closes
// the gaps. All lanes work on their own columns at once, no two in one bank.
// Exact: the bar is a value that at least k earlier (lower) features reach, so what does not exceed it cannot be among the k
// largest, ties going to the lowest index; and the buffer is emptied before it could overflow, whatever comes.
#pragma once

#include "encode_numbers.cuh"
#include "tile.cuh"

namespace writesae::cuda {

enum class Mode : int { topk, count, fill, at };

constexpr int TILE = 16;
constexpr int SLACK = 4;  // how many more than k may stay when the bar is raised: a few steps fewer
constexpr int NAN_KEY = 0x7fffffff;

// Integers in the order of floats, every NaN the largest, all alike; no -0 comes in.
__device__ __forceinline__ int to_key(float x) {
  const int bits = static_cast<int>(tile::float_to_bits(x));
  return x == x ? bits ^ ((bits >> 31) & 0x7fffffff) : NAN_KEY;
}
__device__ __forceinline__ float from_key(int key) {
  return tile::bits_to_float(static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff)));
}

// The candidates of a warp's tokens: entry i of lane l is at [i * STRIDE + l].
template <int ROWS>
struct Candidates {
  static constexpr int STRIDE = ROWS + 1;  // odd: a column read by a whole warp does not meet in one bank
  int* keys;
  int* features;
  int capacity;
};

// Of one lane.
struct Bar {
  float height;  // NaN: none yet, everything passes
  bool closed;   // k NaNs are there already: nothing passes
  int count;     // entries in the buffer
};

// Keeps the k largest entries of each lane (`slack` more may stay), in their order, and raises the bar. Together in a warp.
template <int ROWS>
__device__ WRITESAE_NOINLINE Bar keep_largest(Candidates<ROWS> buffer, int k, int slack, bool active, Bar bar) {
  constexpr int STRIDE = Candidates<ROWS>::STRIDE;
  int* const keys = buffer.keys + tile::lane();
  int* const features = buffer.features + tile::lane();
  const int count = bar.count;
  active = active && count >= k;
  // As unsigned: at least k entries reach `low`, fewer than k exceed `high`.
  const auto unsigned_key = [](int key) { return static_cast<uint32_t>(key) ^ 0x80000000u; };
  uint32_t low = 0xffffffffu, high = 0;
  int reach_low = count;
  if (active) {
    for (int i = 0; i < count; i++) {
      const uint32_t x = unsigned_key(keys[i * STRIDE]);
      low = x < low ? x : low;
      high = x > high ? x : high;
    }
  }
  bool searching = active && count > k + slack && low != high;
  while (tile::ballot(searching) != 0) {
    if (!searching) continue;
    const uint32_t gap = high - low, middle = low + gap / 2 + (gap & 1u);
    int reach = 0;
#pragma unroll 4
    for (int i = 0; i < count; i++) reach += unsigned_key(keys[i * STRIDE]) >= middle;
    if (reach >= k) {
      low = middle;
      reach_low = reach;
    } else {
      high = middle - 1;
    }
    searching = reach_low > k + slack && low != high;
  }
  if (!active) return bar;
  int ties = count;  // how many that equal `low` may stay
  if (reach_low > k + slack) {
    int above = 0;
    for (int i = 0; i < count; i++) above += unsigned_key(keys[i * STRIDE]) > low;
    ties = k - above;
  }
  int to = 0;
  for (int i = 0; i < count; i++) {
    const int key = keys[i * STRIDE], feature = features[i * STRIDE];
    const uint32_t x = unsigned_key(key);
    if (x < low || (x == low && ties-- <= 0)) continue;
    keys[to * STRIDE] = key;
    features[to * STRIDE] = feature;
    to++;
  }
  const int key = static_cast<int>(low ^ 0x80000000u);
  return {from_key(key), key == NAN_KEY, to};
}

// Takes in a tile: activations x of features first .. first + 15, of which `width` exist, feature j of the lane's token at
// x[j * stride]. Together in a warp.
template <int ROWS>
__device__ __forceinline__ void take_tile(const Candidates<ROWS>& buffer, const uint32_t* x, int stride, int first,
                                          int width, int k, bool active, Bar& bar) {
  constexpr int STRIDE = Candidates<ROWS>::STRIDE;
  uint32_t pass = 0;
  if (active && !bar.closed) {
#pragma unroll
    for (int j = 0; j < TILE; j++)
      pass |= (tile::bits_to_float(x[j * stride]) <= bar.height ? 0u : 1u) << j;  // a NaN passes
    pass &= 0xffffu >> (TILE - width);
  }
  if (tile::ballot(bar.count + tile::count_bits(pass) > buffer.capacity) != 0)
    bar = keep_largest(buffer, k, SLACK, active, bar);
  int* key = buffer.keys + bar.count * STRIDE + tile::lane();
  int* feature = buffer.features + bar.count * STRIDE + tile::lane();
  bar.count += tile::count_bits(pass);
  while (tile::ballot(pass != 0) != 0) {
    if (pass == 0) continue;
    const int j = tile::lowest_bit(pass);
    pass &= pass - 1;
    *key = to_key(tile::bits_to_float(x[j * stride]));
    *feature = first + j;
    key += STRIDE, feature += STRIDE;
  }
}

// Writes the k entries of each token of the warp, descending, ties to the lowest index (they lie in the order of features).
// `place` is of each lane's token, negative for none.
template <int ROWS>
__device__ WRITESAE_NOINLINE void put_largest(Candidates<ROWS> buffer, int k, int place, float* values, int64_t* indices) {
  constexpr int STRIDE = Candidates<ROWS>::STRIDE;
  for (int token = 0; token < ROWS; token++) {
    const int64_t to = tile::shuffle(place, token);
    if (to < 0) continue;
    const int* keys = buffer.keys + token;
    for (int i = tile::lane(); i < k; i += tile::WARP) {
      const int key = keys[i * STRIDE];
      int rank = 0;
#pragma unroll 4
      for (int j = 0; j < k; j++) {
        const int other = keys[j * STRIDE];
        rank += other > key || (other == key && j < i);
      }
      const float value = from_key(key);
      values[to * k + rank] = value < 0 ? 0.0f : value;  // a NaN stays
      indices[to * k + rank] = buffer.features[token + i * STRIDE];
    }
  }
}

}  // namespace writesae::cuda
