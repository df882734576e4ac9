// encode under channel gates, S_t = Diag(e^g_t) S_{t-1} + ...: what runs along is y_i = S w_i, K numbers a feature, and
// a_i = v_i . y_i. A thread has a feature and walks time; y lies in shared memory, a column a thread.
//
// Of a tile of ROWS rows the products right . w come first and stay in registers; then channel by channel y is loaded once
// and taken through all rows: (3 K + V) F multiply-adds a row and head without matrix units, where states take K V F. Time
// is cut into chunks: all features of a chunk's tokens are walked, then selected from (`select_from`), so that activations
// of a chunk are in memory and never more. At K = V = 64, F = 2,048: 0.52 M multiply-adds and 16 KB a token and head; on an
// H100 (33 T multiply-adds a second, half of them reached) 32 ns and 6 ns. Computed, not measured.
//
// A block goes through the sequences that have tokens in the chunk; y of one that goes on waits in device memory. An atom
// of rank r is walked r times, each time adding to the activations.
#include "encode_launch.h"

namespace writesae::cuda {
namespace {

constexpr int THREADS = 64, ROWS = 8;
constexpr int64_t CHUNK_FLOATS = 1 << 24;  // of activations, at most, where 8 tokens are not more

struct ChannelWork {
  const float *v, *w;  // [Hs][r][K or V][features], zeros past F
  float* y;            // [B][Hs][r][K][features]
  float* sums;         // [B][count][Hs][F]
  int features;        // F rounded up to THREADS
  int first, count;    // tokens of the chunk, of every batch row
  bool bf16;           // operands rounded
};

__device__ __forceinline__ float rounded(float x, bool bf16) { return bf16 ? tile::to_float(tile::to_bf16(x)) : x; }

__global__ void __launch_bounds__(THREADS)
    pack_channels_kernel(EncodeParams p, View from, int size, int features, bool bf16, float* to) {
  const int f = tile::block_x() * THREADS + tile::thread(), h = tile::block_y(), r = tile::block_z();
  to += (h * p.rank + r) * size * features + f;
  const int64_t row = h * from.stride[0] + f * from.stride[1] + r * from.stride[2];
  for (int i = 0; i < size; i++)
    to[int64_t{i} * features] = f < p.F ? rounded(load_element(from.data, from.type, row + i), bf16) : 0.0f;
}

__global__ void __launch_bounds__(THREADS, 8) walk_channels_kernel(EncodeParams p, ChannelWork work) {
  const int K = static_cast<int>(p.K), V = static_cast<int>(p.V), F = static_cast<int>(p.F), T = static_cast<int>(p.T);
  const int h = tile::block_y(), b = tile::block_z(), thread = tile::thread(), f = tile::block_x() * THREADS + thread;
  const int head = static_cast<int>(p.heads[h]), rank = static_cast<int>(p.rank);
  if (head < 0 || head >= p.H) return;
  tile::Shared shared;
  float* const y = shared.take<float>(K * THREADS) + thread;
  float* const gates = shared.take<float>(K * ROWS);
  float* const left = shared.take<float>(K * ROWS);
  float* const right = shared.take<float>(V * ROWS);
  int* const whole = shared.take<int>(ROWS);  // the token a row is the last of, or -1

  const bool packed = p.cu_seqlens != nullptr;
  const int end = work.first + work.count;
  for (int r = 0; r < rank; r++) {
    const float* const v = work.v + (int64_t{h} * rank + r) * K * work.features + f;
    const float* const w = work.w + (int64_t{h} * rank + r) * V * work.features + f;
    float* const kept = work.y + ((int64_t{b} * p.Hs + h) * rank + r) * K * work.features + f;
    if (work.first > 0)
      for (int k = 0; k < K; k++) y[k * THREADS] = kept[int64_t{k} * work.features];
    for (int n = packed ? 0 : b; n < (packed ? static_cast<int>(p.N) : b + 1); n++) {
      const int start = packed ? static_cast<int>(p.cu_seqlens[n]) : 0;
      const int stop = packed ? static_cast<int>(p.cu_seqlens[n + 1]) : T;
      // An empty sequence belongs to the chunk of the token it stands before, at the end of all to the last.
      const bool here =
          start < stop ? start < end && stop > work.first : start >= work.first && (start < end || (start == T && end == T));
      if (!here) continue;
      const Segment segment = {n, (start > work.first ? start : work.first) - start, (stop < end ? stop : end) - start,
                               packed ? start : b * T, stop <= end};
      if (segment.first == 0) {
        const float* const state = p.states == nullptr ? nullptr : p.states + (n * p.Hs + h) * K * V;
        for (int k = 0; k < K; k++) {
          float s = 0.0f;
          for (int j = 0; j < V && state != nullptr; j++) s += state[k * V + j] * w[int64_t{j} * work.features];
          y[k * THREADS] = s;
        }
      }
      const Stream stream(p, segment, head, nullptr, nullptr);
      float latest = 0.0f;
      if (stream.rows() == 0)
        for (int k = 0; k < K; k++) latest += v[int64_t{k} * work.features] * y[k * THREADS];
      for (int begin = 0; begin < stream.rows(); begin += ROWS) {
        const int rows = stream.rows() - begin < ROWS ? stream.rows() - begin : ROWS;
        tile::sync();  // the tile before has been read
        for (int i = 0; i < ROWS; i++) {
          const Row row = stream.row(begin + i);
          const Source on_left = stream.left(row.kind, row.token, row.sub),
                       on_right = stream.right(row.kind, row.token, row.sub);
          const bool there = row.kind != Row::none, gated = row.kind == Row::write && row.sub == 0;
          const float* const decay = p.decay + ((segment.origin + int64_t{row.token}) * p.H + head) * K;
          for (int k = thread; k < K; k += THREADS) {
            left[k * ROWS + i] = there ? rounded(element(on_left, k, K), work.bf16) : 0.0f;
            gates[k * ROWS + i] = gated ? tile::exponential(decay[k]) : 1.0f;
          }
          for (int j = thread; j < V; j += THREADS)
            right[j * ROWS + i] = there ? rounded(element(on_right, j, V), work.bf16) : 0.0f;
          if (thread == 0) whole[i] = row.whole ? row.token : -1;
        }
        tile::sync();
        float c[ROWS] = {}, sums[ROWS] = {};
        for (int j = 0; j < V; j++) {
          const float atom = w[int64_t{j} * work.features];
#pragma unroll
          for (int i = 0; i < ROWS; i++) c[i] += atom * right[j * ROWS + i];
        }
        for (int k = 0; k < K; k++) {
          const float atom = v[int64_t{k} * work.features];
          float s = y[k * THREADS];
#pragma unroll
          for (int i = 0; i < ROWS; i++) {
            if (i < rows) s = s * gates[k * ROWS + i] + c[i] * left[k * ROWS + i];
            sums[i] += atom * s;
          }
          y[k * THREADS] = s;
        }
        latest = sums[ROWS - 1];  // rows that do not exist change nothing
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
          if (whole[i] < 0 || f >= F) continue;
          const int t = (packed ? start : 0) + whole[i] - work.first;
          float* const to = work.sums + ((int64_t{b} * work.count + t) * p.Hs + h) * F + f;
          *to = r == 0 ? sums[i] : *to + sums[i];
        }
      }
      float* const carry = p.carry_out + (n * p.Hs + h) * F + f;
      if (segment.final && f < F) *carry = r == 0 ? latest : *carry + latest;
    }
    for (int k = 0; k < K; k++) kept[int64_t{k} * work.features] = y[k * THREADS];
  }
}

int64_t features_of(const EncodeParams& p) { return (p.F + THREADS - 1) / THREADS * THREADS; }

int64_t tokens_of(const EncodeParams& p, int forced) {
  const int64_t fit = std::max<int64_t>(8, CHUNK_FLOATS / (p.B * p.Hs * p.F));
  return std::min({p.T, forced > 0 ? int64_t{forced} : fit, int64_t{65535}});
}

}  // namespace

int64_t channels_scratch(const EncodeParams& p, int forced) {
  const int64_t atoms = p.Hs * p.rank * features_of(p);
  return 4 * (atoms * (p.K + p.V) + p.B * atoms * p.K + p.B * tokens_of(p, forced) * p.Hs * p.F);
}

void encode_channels(const EncodeParams& p, const EncodeWork& work, Precision precision, int forced, void* scratch,
                     tile::Stream stream) {
  const int64_t features = features_of(p), atoms = p.Hs * p.rank * features;
  float* const v = static_cast<float*>(scratch);
  float* const w = v + atoms * p.K;
  ChannelWork own = {v, w, w + atoms * p.V, nullptr, static_cast<int>(features), 0, 0, precision == Precision::bf16};
  own.sums = own.y + p.B * atoms * p.K;
  const unsigned blocks = static_cast<unsigned>(features / THREADS), heads = static_cast<unsigned>(p.Hs);
  const tile::Grid packing = {blocks, heads, static_cast<unsigned>(p.rank)};
  tile::launch("encode: pack channels", pack_channels_kernel, packing, THREADS, 0, stream, p, p.v_enc, static_cast<int>(p.K),
               own.features, own.bf16, v);
  tile::launch("encode: pack channels", pack_channels_kernel, packing, THREADS, 0, stream, p, p.w_enc, static_cast<int>(p.V),
               own.features, own.bf16, w);
  const auto piece = [](int64_t words) { return tile::shared_piece(4 * words); };
  const size_t shared = piece(p.K * THREADS) + 2 * piece(p.K * ROWS) + piece(p.V * ROWS) + piece(ROWS);
  const int64_t tokens = tokens_of(p, forced);
  for (int64_t t = 0; t < p.T; t += tokens) {
    own.first = static_cast<int>(t);
    own.count = static_cast<int>(std::min(tokens, p.T - t));
    tile::launch("encode: channels", walk_channels_kernel, {blocks, heads, static_cast<unsigned>(p.B)}, THREADS, shared,
                 stream, p, own);
    select_from(p, work, own.sums, own.first, own.count, stream);
  }
}

}  // namespace writesae::cuda
