// Selection. A lane owns a token: it looks at the token's 16 activations of each feature tile, keeps those above its bar in
// its column of a buffer in shared memory, and when that fills, raises the bar to about the k-th largest so far and closes
// the gaps. All lanes work on their own columns at once, no two in one bank.
//
// Exact: a bar that was raised is a value that at least k earlier (lower) features reach, so what does not exceed it cannot
// be among the k largest, ties going to the lowest index; and the buffer is emptied before it could overflow, whatever comes.
// A bar may also begin as a guess. Then everything above it is kept as long as nothing better is known, so that a token with
// k candidates at the end has its k largest among them; one with fewer has to be done again without a guess.
#pragma once

#include <cstddef>
#include <utility>

#include "encode_numbers.cuh"
#include "tile.cuh"

namespace writesae::cuda {

enum class Mode : int { topk, count, fill, at };

constexpr int TILE = 16;
constexpr int SLACK = 16;  // how many more than k may stay when the bar is raised: fewer steps
constexpr int NAN_KEY = 0x7fffffff;
constexpr int LAST_KEY = static_cast<int>(0x80000000u);  // below the key of every number

// Integers in the order of floats, every NaN the largest, all alike; no -0 comes in.
__device__ __forceinline__ int to_key(float x) {
  const int bits = static_cast<int>(tile::float_to_bits(x));
  return x == x ? bits ^ ((bits >> 31) & 0x7fffffff) : NAN_KEY;
}
__device__ __forceinline__ float from_key(int key) {
  return tile::bits_to_float(static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff)));
}

// What selection did, for tests: of warps and their chunks, not of lanes.
__device__ __forceinline__ void tally(const char* what, int n = 1) {
  if (tile::lane() == 0) tile::count(what, n);
}

// The candidates of a warp's tokens: entry i of lane l is at [i * STRIDE + l], in the order of features.
template <int ROWS>
struct Candidates {
  static constexpr int STRIDE = ROWS + 1;  // odd: a column read by a whole warp does not meet in one bank
  tile::SharedBytes memory;                // a warp's
  int capacity;                            // a multiple of 8
  bool wide;                               // F is over 65536: 16 bits do not name a feature

  __host__ __device__ static constexpr int bytes(int capacity, bool wide) { return STRIDE * capacity * (wide ? 8 : 6); }
  // Bits of the activations.
  __device__ __forceinline__ uint32_t* values() const { return memory.template get<uint32_t>(); }
  // Low halves of the features.
  __device__ __forceinline__ uint16_t* features() const { return memory.template get<uint16_t>(4 * STRIDE * capacity); }
  // Their high halves, where `wide`.
  __device__ __forceinline__ uint16_t* highs() const { return memory.template get<uint16_t>(6 * STRIDE * capacity); }
};

// Of one lane.
struct Bar {
  float height;  // the least that passes; NaN: none yet, everything does
  bool closed;   // k NaNs are there already: nothing passes
  int count;     // entries in the buffer
};

// Keeps the k largest entries of each lane (`slack` more may stay), in their order, and raises the bar; of a lane that has
// fewer, nothing changes. Together in a warp: all lanes go through as many entries as the fullest has.
template <int ROWS>
__device__ WRITESAE_NOINLINE Bar keep_largest(Candidates<ROWS> buffer, int k, int slack, bool active, Bar bar) {
  constexpr int STRIDE = Candidates<ROWS>::STRIDE, STEP = 8;
  const int own = tile::lane() < ROWS ? tile::lane() : 0;
  uint32_t* const values = buffer.values() + own;
  uint16_t* const features = buffer.features() + own;
  const int count = bar.count;
  active = active && count >= k;
  const int most = (tile::warp_max(active ? count : 0) + STEP - 1) / STEP * STEP;
  if (most == 0) return bar;
  tally("raises");
  // Keys from here on: at least k entries reach `low`, fewer than k exceed `high`.
  const bool writes = ROWS == tile::WARP || tile::lane() < ROWS;
  int low = NAN_KEY, high = LAST_KEY;
  float sum = 0.0f;
  for (int i = 0; i < most; i += STEP) {
#pragma unroll
    for (int u = 0; u < STEP; u++) {
      const float x = tile::bits_to_float(values[(i + u) * STRIDE]);
      const bool there = i + u < count;
      const int key = there ? to_key(x) : LAST_KEY;
      sum += there ? x : 0.0f;
      low = there && key < low ? key : low;
      high = key > high ? key : high;
      if (writes) values[(i + u) * STRIDE] = static_cast<uint32_t>(key);
    }
  }
  int reach_low = count, probe = 0;
  bool searching = active && count > k + slack && low != high;
  const float lowest = from_key(low), scale = sum / static_cast<float>(count) - lowest;
  while (tile::any(searching)) {
    tally("probes");
    // Tails are about exponential: ln(reach / wanted) times the mean excess further up; every other time halve, which ends.
    const uint32_t gap = static_cast<uint32_t>(high) - static_cast<uint32_t>(low);
    int middle = static_cast<int>(static_cast<uint32_t>(low) + gap / 2 + (gap & 1u));
    if (probe++ % 2 == 0) {
      const float wanted = static_cast<float>(k + slack / 2), reach = static_cast<float>(reach_low);
      const float up = 2.0f * (reach - wanted) / (reach + wanted);  // about ln(reach / wanted)
      const int there = to_key(from_key(low) + scale * up);
      if (there > low && there <= high) middle = there;
    }
    int reach = 0;
    for (int i = 0; i < most; i += STEP) {
#pragma unroll
      for (int u = 0; u < STEP; u++) reach += static_cast<int>(values[(i + u) * STRIDE]) >= middle ? 1 : 0;
    }
    if (searching && reach >= k) {
      low = middle;
      reach_low = reach;
    } else if (searching) {
      high = middle - 1;
    }
    searching = searching && reach_low > k + slack && low != high;
  }
  // Closing the gaps: what an entry is written over has been read. Lanes that take no part keep all of theirs.
  if (!active) low = LAST_KEY;
  const bool cut = active && reach_low > k + slack;  // of those that equal `low`, only so many may stay
  int ties = most;
  if (tile::any(cut)) {
    int above = 0;
    for (int i = 0; i < most; i++) above += static_cast<int>(values[i * STRIDE]) > low ? 1 : 0;
    if (cut) ties = k - above;
  }
  const auto keeps = [&](int key, int& left) {
    const int tie = static_cast<int>(key == low), stays = static_cast<int>(key > low) | (tie & static_cast<int>(left > 0));
    left -= tie;
    return stays * STRIDE;
  };
  if (buffer.wide && writes) {
    uint16_t* const highs = buffer.highs() + own;
    for (int i = 0, to = 0, left = ties; i < most; i++) {
      highs[to] = highs[i * STRIDE];
      to += keeps(static_cast<int>(values[i * STRIDE]), left);
    }
  }
  int to = 0;
  for (int i = 0; i < most; i += STEP) {
    int key[STEP];
    uint16_t feature[STEP];
#pragma unroll
    for (int u = 0; u < STEP; u++)
      key[u] = static_cast<int>(values[(i + u) * STRIDE]), feature[u] = features[(i + u) * STRIDE];
#pragma unroll
    for (int u = 0; u < STEP; u++) {
      if (writes) values[to] = tile::float_to_bits(from_key(key[u])), features[to] = feature[u];
      to += keeps(key[u], ties);
    }
  }
  if (!active) return bar;
  const int infinity = to_key(tile::bits_to_float(0x7f800000u));
  return {from_key(low < infinity ? low + 1 : infinity), low == NAN_KEY, to / STRIDE};
}

// Takes in a tile: activations x of features first .. first + 15, of which `width` exist, feature j of the lane's token at
// x[j * stride]. `open`: the lane has a token that takes any. There must be room for 16 more. Together in a warp.
template <int ROWS>
__device__ __forceinline__ void take_tile(const Candidates<ROWS>& buffer, const uint32_t* x, int stride, int first,
                                          int width, bool open, Bar& bar) {
  constexpr int STRIDE = Candidates<ROWS>::STRIDE;
  uint32_t below[2] = {};  // two chains of half the length
#pragma unroll
  for (int j = 0; j < TILE / 2; j++)
#pragma unroll
    for (int i = 0; i < 2; i++)
      below[i] = tile::append_below(below[i], tile::bits_to_float(x[(TILE / 2 * i + j) * stride]), bar.height);
  const uint32_t exist = open ? 0xffffu << (TILE - width) & 0xffffu : 0u;
  uint32_t pass = ~(below[0] << 8 | below[1]) & exist;  // the first feature's bit is the highest
  uint32_t* value = buffer.values() + bar.count * STRIDE + tile::lane();
  uint16_t* feature = buffer.features() + bar.count * STRIDE + tile::lane();
  const int before = bar.count;
  bar.count += tile::count_bits(pass);
  tally("kept", bar.count - before);
  tally("tiles");
  while (tile::any(pass != 0)) {  // two at a time: their loads are under way together
    tally("rounds");
    const bool one = pass != 0;
    const int i = one ? tile::highest_bit(pass) : 0;
    pass ^= one ? 1u << i : 0u;
    const bool two = pass != 0;
    const int j = two ? tile::highest_bit(pass) : 0;
    pass ^= two ? 1u << j : 0u;
    const uint32_t first_bits = x[(TILE - 1 - i) * stride], second_bits = x[(TILE - 1 - j) * stride];
    if (one) value[0] = first_bits, feature[0] = static_cast<uint16_t>(first + TILE - 1 - i);
    if (two) value[STRIDE] = second_bits, feature[STRIDE] = static_cast<uint16_t>(first + TILE - 1 - j);
    value += 2 * STRIDE, feature += 2 * STRIDE;
  }
  if (buffer.wide)
    for (int i = before; i < bar.count; i++)
      buffer.highs()[i * STRIDE + tile::lane()] = static_cast<uint16_t>(static_cast<uint32_t>(first) >> 16);
}

// Where selected entries go: results, or with `keys` what another kernel merges.
struct Selected {
  float* values;
  int64_t* indices;
  int* keys;
  int* features;
};

// A key and a feature in one number, the larger the earlier in the result.
__device__ __forceinline__ uint64_t to_pair(int key, uint32_t feature) {
  return static_cast<uint64_t>(static_cast<uint32_t>(key) ^ 0x80000000u) << 32 | static_cast<uint32_t>(~feature);
}

// Batcher's network of exchanges that sorts N, a power of two.
template <int N>
struct Network {
  static constexpr int MOST = 4 * N * (N < 32 ? 4 : 6);
  int size = 0, low[MOST] = {}, high[MOST] = {};
  constexpr Network() {
    for (int p = 1; p < N; p *= 2)
      for (int k = p; k >= 1; k /= 2)
        for (int j = k % p; j + k < N; j += 2 * k)
          for (int i = 0; i < k && i + j + k < N; i++)
            if ((i + j) / (2 * p) == (i + j + k) / (2 * p)) low[size] = i + j, high[size] = i + j + k, size++;
  }
};

template <int A, int B, int N>
__device__ __forceinline__ void exchange(uint64_t (&x)[N]) {
  const uint64_t first = x[A], second = x[B];
  const bool swap = first < second;
  x[A] = swap ? second : first;
  x[B] = swap ? first : second;
}

template <int N>
constexpr Network<N> NETWORK = {};

template <int N, size_t... I>
__device__ __forceinline__ void sort_descending(uint64_t (&x)[N], std::index_sequence<I...>) {
  (exchange<NETWORK<N>.low[I], NETWORK<N>.high[I]>(x), ...);
}

// Sorts the k entries of each lane, descending, ties to the lowest feature; their values become keys. Together in a warp.
template <int ROWS>
__device__ WRITESAE_NOINLINE void sort_entries(Candidates<ROWS> buffer, int k, bool active) {
  constexpr int STRIDE = Candidates<ROWS>::STRIDE, N = 32;
  const int own = active ? tile::lane() : 0;
  uint32_t* const values = buffer.values() + own;
  uint16_t* const features = buffer.features() + own;
  if (k <= N && !buffer.wide) {  // in registers
    uint64_t x[N];
#pragma unroll
    for (int i = 0; i < N; i++)
      x[i] = i < k ? to_pair(to_key(tile::bits_to_float(values[i * STRIDE])), features[i * STRIDE]) : 0;
    sort_descending(x, std::make_index_sequence<NETWORK<N>.size>());
#pragma unroll
    for (int i = 0; i < N; i++)
      if (i < k && active) {
        values[i * STRIDE] = static_cast<uint32_t>(x[i] >> 32) ^ 0x80000000u;
        features[i * STRIDE] = static_cast<uint16_t>(~x[i]);
      }
    return;
  }
  if (!active) return;
  uint16_t* const highs = buffer.wide ? buffer.highs() + own : nullptr;
  const auto load = [&](int i) {
    const uint32_t feature = features[i * STRIDE] | (buffer.wide ? highs[i * STRIDE] : 0u) << 16;
    return to_pair(static_cast<int>(values[i * STRIDE]), feature);
  };
  const auto store = [&](int i, uint64_t pair) {
    values[i * STRIDE] = static_cast<uint32_t>(pair >> 32) ^ 0x80000000u;
    features[i * STRIDE] = static_cast<uint16_t>(~pair);
    if (buffer.wide) highs[i * STRIDE] = static_cast<uint16_t>(~pair >> 16);
  };
  for (int i = 0; i < k; i++) values[i * STRIDE] = static_cast<uint32_t>(to_key(tile::bits_to_float(values[i * STRIDE])));
  int top = 1;
  while (2 * top < k) top *= 2;
  for (int p = top; p >= 1; p /= 2)  // Batcher's merge exchange, of any length (Knuth, 5.2.2, algorithm M)
    for (int q = top, r = 0, d = p;;) {
      for (int i = 0; i + d < k; i++) {
        if ((i & p) != r) continue;
        const uint64_t first = load(i), second = load(i + d);
        if (first < second) store(i, second), store(i + d, first);
      }
      if (q == p) break;
      d = q - p, q /= 2, r = p;
    }
}

// Writes the sorted entries of each token of the warp, k a token, of which `found` exist. `place` is of each lane's token,
// negative for none.
template <int ROWS>
__device__ WRITESAE_NOINLINE void put_entries(Candidates<ROWS> buffer, int k, int found, int place, Selected to) {
  constexpr int STRIDE = Candidates<ROWS>::STRIDE;
  const uint32_t* const values = buffer.values();
  const uint16_t* const features = buffer.features();
#pragma unroll 4
  for (int token = 0; token < ROWS; token++) {
    const int64_t row = tile::shuffle(place, token);
    if (row < 0) continue;
    for (int i = tile::lane(); i < k; i += tile::WARP) {
      const int at = i * STRIDE + token;
      const int key = i < found ? static_cast<int>(values[at]) : LAST_KEY;
      int feature = i < found ? features[at] : -1;
      if (buffer.wide && i < found) feature |= buffer.highs()[at] << 16;
      if (to.keys != nullptr) {
        to.keys[row * k + i] = key;
        to.features[row * k + i] = feature;
      } else {
        const float value = from_key(key);
        to.values[row * k + i] = value < 0 ? 0.0f : value;  // a NaN stays
        to.indices[row * k + i] = feature;
      }
    }
  }
}

}  // namespace writesae::cuda
