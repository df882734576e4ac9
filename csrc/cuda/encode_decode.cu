// encode of one token of every sequence: decoding. Reading the dictionary once is the whole work (1 KB a feature at K = V =
// 128 in float32: 0.6 GB and 0.18 ms at 3.35 TB/s for 288 heads of 2,048 features), so nothing is packed and no matrix unit
// runs: a warp has four features, a lane every 32nd element of them; sums are float32 whatever the precision asked for.
// The running sums are the carry that the call returns anyway; a second kernel selects from them.
#include "encode_launch.h"

namespace writesae::cuda {
namespace {

constexpr int THREADS = 256, FEATURES = 4;  // features a warp
constexpr int SEQUENCES = 8;                // a block goes through, its part of the dictionary then in cache

template <int PER>  // elements a lane has of a vector
__global__ void __launch_bounds__(THREADS, 2) sums_kernel(EncodeParams p) {
  const int lane = tile::lane(), h = tile::block_y(), F = static_cast<int>(p.F), rank = static_cast<int>(p.rank);
  const int K = static_cast<int>(p.K), V = static_cast<int>(p.V), head = static_cast<int>(p.heads[h]);
  if (head < 0 || head >= p.H) return;
  const int first = (tile::block_x() * (THREADS / tile::WARP) + tile::warp()) * FEATURES;
  const auto factor = [&](const View& x, int f, int r, int size, float (&to)[PER]) {
    const int64_t row = h * x.stride[0] + f * x.stride[1] + r * x.stride[2];
#pragma unroll
    for (int i = 0; i < PER; i++) {
      const int at = lane + tile::WARP * i;
      to[i] = f < F && at < size ? load_element(x.data, x.type, row + at) : 0.0f;
    }
  };
  for (int n = tile::block_z() * SEQUENCES; n < (tile::block_z() + 1) * SEQUENCES && n < p.N; n++) {
    const Segment segment = {n, 0, 1, n, 1};
    const Stream stream(p, segment, head, nullptr, nullptr);
    float a[FEATURES];
    for (int i = 0; i < stream.rows(); i++) {
      const Row row = stream.row(i);
      const Source on_left = stream.left(row.kind, row.token, row.sub),
                   on_right = stream.right(row.kind, row.token, row.sub);
      float left[PER], right[PER];
#pragma unroll
      for (int j = 0; j < PER; j++) {
        left[j] = element(on_left, lane + tile::WARP * j, K);
        right[j] = element(on_right, lane + tile::WARP * j, V);
      }
#pragma unroll
      for (int u = 0; u < FEATURES; u++) {
        const int f = first + u;
        const int64_t at = (n * p.Hs + h) * F + f;
        if (i == 0) a[u] = p.carry_in != nullptr && f < F ? row.gate * p.carry_in[at] : 0.0f;
        for (int r = 0; r < rank; r++) {
          float v[PER], w[PER], x = 0.0f, y = 0.0f;
          factor(p.v_enc, f, r, K, v);
          factor(p.w_enc, f, r, V, w);
#pragma unroll
          for (int j = 0; j < PER; j++) x += v[j] * left[j], y += w[j] * right[j];
          a[u] += tile::warp_sum(x) * tile::warp_sum(y);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < FEATURES; u++)
      if (lane == u && first + u < F) p.carry_out[(n * p.Hs + h) * F + first + u] = a[u];
  }
}

// Of flags in rising order over the block: how many before this thread's, and how many in all. Two barriers.
__device__ int flags_before(bool flag, int* counts, int& total) {
  const uint32_t bits = tile::ballot(flag);
  if (tile::lane() == 0) counts[tile::warp()] = tile::count_bits(bits);
  tile::sync();
  int before = tile::count_bits(bits & ((1u << tile::lane()) - 1));
  total = 0;
  for (int w = 0; w < THREADS / tile::WARP; w++) {
    if (w < tile::warp()) before += counts[w];
    total += counts[w];
  }
  tile::sync();
  return before;
}

// Selects from activations, [B][count][Hs][F] from token `start` on; a block has a token and a head.
__global__ void __launch_bounds__(THREADS)
    select_kernel(EncodeParams p, EncodeWork work, const float* sums, int start, int count) {
  const int h = tile::block_x(), t = tile::block_y(), b = tile::block_z();
  const int F = static_cast<int>(p.F), k = static_cast<int>(p.k);
  const int64_t place = (b * p.T + start + t) * p.Hs + h;
  sums += ((int64_t{b} * count + t) * p.Hs + h) * F;
  const float* bias = p.b_enc == nullptr ? nullptr : p.b_enc + int64_t{h} * F;
  const int thread = tile::thread();
  tile::Shared shared;
  int* counts = shared.take<int>(THREADS / tile::WARP);
  const auto value = [&](int f) { return sums[f] + (bias == nullptr ? 0.0f : bias[f] + 0.0f); };
  if (work.mode == Mode::at) {
    for (int i = thread; i < p.m; i += THREADS) {
      const int64_t f = p.at[place * p.m + i];
      p.values[place * p.m + i] = f >= 0 && f < F ? value(static_cast<int>(f)) : tile::bits_to_float(0x7fffffffu);
    }
    return;
  }
  int found = 0, total;
  if (work.mode != Mode::topk) {
    const float* limit = p.threshold + int64_t{h} * F;
    for (int start = 0; start < F; start += THREADS) {
      const int f = start + thread;
      const bool kept = f < F && !(value(f) <= limit[f]);
      const int at = found + flags_before(kept, counts, total);
      found += total;
      if (!kept || work.mode == Mode::count) continue;
      work.found_values[work.offsets[place] + at] = value(f);
      work.found_indices[work.offsets[place] + at] = f;
    }
    if (work.mode == Mode::count && thread == 0) work.counts[place] = found;
    return;
  }
  // The k-th largest key, 8 bits at a time from the top.
  int* histogram = shared.take<int>(256);
  uint32_t* chosen = shared.take<uint32_t>(2);  // prefix so far; how many of those with it to take
  int* keys = shared.take<int>(k);
  int* features = shared.take<int>(k);
  const auto key = [&](int f) { return static_cast<uint32_t>(to_key(value(f))) ^ 0x80000000u; };
  uint32_t prefix = 0;
  int wanted = k;
  for (int shift = 24; shift >= 0; shift -= 8) {
    histogram[thread] = 0;
    tile::sync();
    for (int f = thread; f < F; f += THREADS) {
      const uint32_t x = key(f);
      if (shift == 24 || x >> (shift + 8) == prefix) tile::atomic_add(histogram + (x >> shift & 255u), 1);
    }
    tile::sync();
    if (tile::warp() == 0) {  // a lane has 8 buckets, lane 0 the largest
      int own = 0;
      for (int i = 0; i < 8; i++) own += histogram[255 - 8 * tile::lane() - i];
      int upto = own;
      for (int step = 1; step < tile::WARP; step *= 2) {
        const int other = tile::shuffle_up(upto, step);
        if (tile::lane() >= step) upto += other;
      }
      int left = wanted - (upto - own);  // to take from this lane's buckets and below
      if (left > 0 && upto >= wanted) {
        int bucket = 255 - 8 * tile::lane();
        while (histogram[bucket] < left) left -= histogram[bucket--];
        chosen[0] = prefix << 8 | static_cast<uint32_t>(bucket);
        chosen[1] = static_cast<uint32_t>(left);
      }
    }
    tile::sync();
    prefix = chosen[0];
    wanted = static_cast<int>(chosen[1]);
    tile::sync();
  }
  // All above it, and the first `wanted` that equal it, in the order of features.
  int ties = 0;
  for (int start = 0; start < F; start += THREADS) {
    const int f = start + thread;
    const uint32_t x = f < F ? key(f) : 0;
    const bool tie = f < F && x == prefix;
    const int tied = ties + flags_before(tie, counts, total);
    ties += total;
    const bool kept = f < F && (x > prefix || (tie && tied < wanted));
    const int at = found + flags_before(kept, counts, total);
    found += total;
    if (!kept) continue;
    keys[at] = static_cast<int>(x ^ 0x80000000u);
    features[at] = f;
  }
  tile::sync();
  for (int i = thread; i < k; i += THREADS) {
    int rank = 0;
    for (int j = 0; j < k; j++) rank += keys[j] > keys[i] || (keys[j] == keys[i] && j < i);
    const float x = from_key(keys[i]);
    p.values[place * k + rank] = x < 0 ? 0.0f : x;
    p.indices[place * k + rank] = features[i];
  }
}

}  // namespace

void decode(const EncodeParams& p, const EncodeWork& work, tile::Stream stream) {
  const unsigned parts =
      static_cast<unsigned>((p.F + THREADS / tile::WARP * FEATURES - 1) / (THREADS / tile::WARP * FEATURES));
  const unsigned heads = static_cast<unsigned>(p.Hs), groups = static_cast<unsigned>((p.N + SEQUENCES - 1) / SEQUENCES);
  const int depth = padded_size(p.K, p.V);
  const auto kernel = depth == 32    ? sums_kernel<1>
                      : depth == 64  ? sums_kernel<2>
                      : depth == 128 ? sums_kernel<4>
                                     : sums_kernel<8>;
  tile::launch("encode: sums", kernel, {parts, heads, groups}, THREADS, 0, stream, p);
  select_from(p, work, p.carry_out, 0, 1, stream);
}

void select_from(const EncodeParams& p, const EncodeWork& work, const float* sums, int first, int count,
                 tile::Stream stream) {
  const auto piece = [](int64_t words) { return tile::shared_piece(4 * words); };
  const size_t shared = work.mode == Mode::topk ? piece(8) + piece(256) + piece(2) + 2 * piece(p.k) : piece(8);
  const tile::Grid grid = {static_cast<unsigned>(p.Hs), static_cast<unsigned>(count), static_cast<unsigned>(p.B)};
  tile::launch("encode: select", select_kernel, grid, THREADS, shared, stream, p, work, sums, first, count);
}

}  // namespace writesae::cuda
