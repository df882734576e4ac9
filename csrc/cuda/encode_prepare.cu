// What runs before encode's kernel: cutting sequences into segments, the states they start from, packing the dictionary.
#include "encode_launch.h"

namespace writesae::cuda {
namespace {

// Cuts every sequence into segments of at most `length` tokens, at least one a sequence, those of a sequence side by side.
// One warp, a lane a sequence. And writes the unit vectors.
__global__ void cut_kernel(EncodeParams p, int length, int segments, Segment* out, float* unit) {
  const int lane = tile::lane();
  for (int i = lane; i < UNIT_SIZE; i += tile::WARP) unit[i] = i == UNIT_SIZE / 2 ? 1.0f : 0.0f;
  const int64_t* offsets = p.cu_seqlens;
  int done = 0;
  for (int start = 0; start < p.N; start += tile::WARP) {
    const int n = start + lane;
    int origin = 0, tokens = 0, count = 0;
    if (n < p.N) {
      origin = static_cast<int>(offsets != nullptr ? offsets[n] : n * p.T);
      tokens = static_cast<int>(offsets != nullptr ? offsets[n + 1] - origin : p.T);
      count = tokens > length ? (tokens + length - 1) / length : 1;
    }
    int upto = count;
    for (int step = 1; step < tile::WARP; step *= 2) {
      const int other = tile::shuffle_up(upto, step);
      if (lane >= step) upto += other;
    }
    for (int i = 0; i < count; i++) {
      const int at = done + upto - count + i;
      if (at >= segments) break;  // offsets that do not rise to T: nothing is written out of place
      const int last = (i + 1) * length < tokens ? (i + 1) * length : tokens;
      out[at] = {n, i * length, last, origin, i == count - 1};
    }
    done += tile::shuffle(upto, tile::WARP - 1);
  }
  for (int i = done + lane; i < segments; i += tile::WARP) out[i] = {-1, 0, 0, 0, 0};
}

// Sums of a segment's own additions, decayed to its end, and the product of its gates; not for segments that end a
// sequence. A warp has 32 x 32 elements of the state: keys down, values across, rows of the stream contracted, 16 at a time.
constexpr int STATE_WARPS = 4, STATE_TILE = 32;

template <Precision P>
__global__ void __launch_bounds__(STATE_WARPS* tile::WARP, 3)
    states_kernel(EncodeParams p, EncodeWork work, float* states, float* reach) {
  constexpr int PLANES = P == Precision::fp32 ? 3 : 1;
  const Segment segment = work.segments[tile::block_x()];
  if (segment.n < 0 || segment.final) return;
  const int slot = tile::block_y(), head = static_cast<int>(p.heads[work.head0 + slot]);
  if (head < 0 || head >= p.H) return;
  const int K = static_cast<int>(p.K), V = static_cast<int>(p.V), across = (V + STATE_TILE - 1) / STATE_TILE;
  const int mine = tile::block_z() * STATE_WARPS + tile::warp();
  const int key0 = mine / across * STATE_TILE, value0 = mine % across * STATE_TILE;
  if (key0 >= K) return;  // no barrier of the block follows
  const int64_t block_slot = int64_t{tile::block_x()} * work.heads + slot;
  const Stream stream(p, segment, head, nullptr, work.unit);
  const int lane = tile::lane(), g = lane / 4, c = lane % 4;
  float large[2][4][4] = {}, small[2][4][4] = {}, total = 1.0f;
  for (int start = 0; start < stream.rows(); start += 16) {
    Row row = {Row::none, 0, 0, 1.0f, false};
    if (lane < 16) row = stream.row(start + lane);
    float product = row.gate;  // of the gates from this row to the sixteenth
    for (int step = 1; step < 16; step *= 2) {
      const float other = tile::shuffle(product, lane + step);
      if (lane + step < 16) product *= other;
    }
    const float passage = tile::shuffle(product, 0);
    float weight = tile::shuffle(product, lane + 1);  // of the gates after this row
    weight = lane < 15 ? weight : 1.0f;
    total *= passage;
    uint32_t a[2][PLANES][4], b[4][PLANES][2];
    for (int half = 0; half < 2; half++) {
      const int first = 8 * half + 2 * c;
      float w[2];
      Source left[2], right[2];
      for (int i = 0; i < 2; i++) {
        const int kind = tile::shuffle(row.kind, first + i), token = tile::shuffle(row.token, first + i);
        const int sub = tile::shuffle(row.sub, first + i);
        w[i] = tile::shuffle(weight, first + i);
        left[i] = stream.left(kind, token, sub), right[i] = stream.right(kind, token, sub);
      }
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int up = 0; up < 2; up++) {
          uint32_t parts[PLANES];
          const int key = key0 + 16 * m + 8 * up + g;
          convert<P>(w[0] * element(left[0], key, K), w[1] * element(left[1], key, K), parts);
          for (int plane = 0; plane < PLANES; plane++) a[m][plane][2 * half + up] = parts[plane];
        }
#pragma unroll
      for (int n = 0; n < 4; n++) {
        uint32_t parts[PLANES];
        const int value = value0 + 8 * n + g;
        convert<P>(element(right[0], value, V), element(right[1], value, V), parts);
        for (int plane = 0; plane < PLANES; plane++) b[n][plane][half] = parts[plane];
      }
    }
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int n = 0; n < 4; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) large[m][n][i] *= passage, small[m][n][i] *= passage;
        multiply<P>(large[m][n], small[m][n], a[m], b[n]);
      }
  }
  float* to = states + block_slot * p.K * p.V;
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int key = key0 + 16 * m + tile::accumulator_row(i / 2);
        const int value = value0 + 8 * n + tile::accumulator_column() + i % 2;
        if (key < K && value < V) to[int64_t{key} * V + value] = large[m][n][i] + small[m][n][i];
      }
  if (mine == 0 && lane == 0) reach[block_slot] = total;
}

// From sums to what precedes each segment, in place. A thread has an element of a head's state.
__global__ void combine_kernel(EncodeParams p, EncodeWork work, int segments, float* states, float* reach) {
  const int64_t size = p.K * p.V, i = int64_t{tile::block_x()} * tile::block_threads() + tile::thread();
  const int slot = tile::block_y();
  float state = 0.0f;
  for (int s = 0; s < segments; s++) {
    const Segment segment = work.segments[s];
    if (segment.n < 0) break;
    if (segment.first == 0) state = 0.0f;
    const int64_t at = int64_t{s} * work.heads + slot;
    if (i < size) {
      const float sum = segment.final ? 0.0f : states[at * size + i];
      const float gates = segment.final ? 1.0f : reach[at];
      if (segment.first != 0) states[at * size + i] = state;
      state = gates * state + sum;
    }
  }
}

// The products of gates alone, after combine_kernel has read them. A thread has a head.
__global__ void combine_gates_kernel(EncodeWork work, int segments, float* reach) {
  const int slot = tile::block_x() * tile::block_threads() + tile::thread();
  if (slot >= work.heads) return;
  float product = 1.0f;
  for (int s = 0; s < segments; s++) {
    const Segment segment = work.segments[s];
    if (segment.n < 0) break;
    if (segment.first == 0) product = 1.0f;
    float& at = reach[int64_t{s} * work.heads + slot];
    const float own = segment.final ? 1.0f : at;
    at = product;
    product *= own;
  }
}

// A tile of 16 features: for v, then w, for each step of the product, plane and lane, the lane's four registers of the left
// operand (shares as in tile_device.cuh). Zeros past F, K and V. A block has a tile and a rank.
template <Precision P>
__global__ void pack_kernel(EncodeParams p, EncodeWork work, int depth, tile::Vec16* out) {
  constexpr int PLANES = P == Precision::fp32 ? 3 : 1, STEP = P == Precision::tf32 ? 8 : 16;
  const int steps = depth / STEP, rank = static_cast<int>(p.rank), slot = tile::block_y();
  const int j = tile::block_x() / rank, x = tile::block_x() % rank;
  const int vectors = 2 * steps * PLANES * tile::WARP;
  out += (int64_t{slot} * work.tiles * rank + tile::block_x()) * vectors;
  for (int i = tile::thread(); i < 2 * steps * tile::WARP; i += tile::block_threads()) {
    const int lane = i % tile::WARP, step = i / tile::WARP % steps, side = i / tile::WARP / steps;
    const View& from = side == 0 ? p.v_enc : p.w_enc;
    const int size = static_cast<int>(side == 0 ? p.K : p.V);
    tile::Vec16 shares[PLANES];
    for (int r = 0; r < 4; r++) {
      const int64_t f = j * TILE + lane / 4 + 8 * (r % 2);
      const int at = STEP * step + (P == Precision::tf32 ? lane % 4 + 4 * (r / 2) : 2 * (lane % 4) + 8 * (r / 2));
      const int64_t row = (work.head0 + slot) * from.stride[0] + f * from.stride[1] + x * from.stride[2];
      const float low = f < p.F && at < size ? load_element(from.data, from.type, row + at) : 0.0f;
      const float high =
          P != Precision::tf32 && f < p.F && at + 1 < size ? load_element(from.data, from.type, row + at + 1) : 0.0f;
      uint32_t parts[PLANES];
      convert<P>(low, high, parts);
      for (int plane = 0; plane < PLANES; plane++) shares[plane].x[r] = parts[plane];
    }
    for (int plane = 0; plane < PLANES; plane++)
      out[((side * steps + step) * PLANES + plane) * tile::WARP + lane] = shares[plane];
  }
}

}  // namespace

void cut_sequences(const EncodeParams& p, const EncodePlan& plan, Segment* segments, float* unit, tile::Stream stream) {
  tile::launch("encode: cut", cut_kernel, {1, 1, 1}, tile::WARP, 0, stream, p, plan.segment, plan.segments, segments, unit);
}

void pack_dictionary(const EncodeParams& p, const EncodeWork& work, const EncodePlan& plan, tile::Vec16* out,
                     tile::Stream stream) {
  const auto kernel = plan.precision == Precision::bf16   ? pack_kernel<Precision::bf16>
                      : plan.precision == Precision::tf32 ? pack_kernel<Precision::tf32>
                                                          : pack_kernel<Precision::fp32>;
  const tile::Grid grid = {static_cast<unsigned>(work.tiles * p.rank), static_cast<unsigned>(work.heads), 1};
  tile::launch("encode: pack", kernel, grid, 128, 0, stream, p, work, plan.depth, out);
}

void segment_states(const EncodeParams& p, const EncodeWork& work, const EncodePlan& plan, float* states, float* reach,
                    tile::Stream stream) {
  const auto tiles = [](int64_t size) { return (size + STATE_TILE - 1) / STATE_TILE; };
  const unsigned heads = static_cast<unsigned>(work.heads), parts = static_cast<unsigned>(tiles(p.K) * tiles(p.V));
  const tile::Grid grid = {static_cast<unsigned>(plan.segments), heads, (parts + STATE_WARPS - 1) / STATE_WARPS};
  const auto kernel = plan.precision == Precision::bf16 ? states_kernel<Precision::bf16> : states_kernel<Precision::fp32>;
  tile::launch("encode: states", kernel, grid, STATE_WARPS * tile::WARP, 0, stream, p, work, states, reach);
  const unsigned blocks = static_cast<unsigned>((p.K * p.V + 255) / 256);
  tile::launch("encode: combine", combine_kernel, {blocks, heads, 1}, 256, 0, stream, p, work, plan.segments, states, reach);
  tile::launch("encode: combine gates", combine_gates_kernel, {(heads + 31) / 32, 1, 1}, 32, 0, stream, work, plan.segments,
               reach);
}

}  // namespace writesae::cuda
