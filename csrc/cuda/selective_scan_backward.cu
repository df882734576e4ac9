// The backward of selective_scan on CUDA.
//
// A first walk leaves the state before each tile. Then a block goes along its tiles from the last: the states that a tile's tokens
// read are made once more, into shared memory, and the tokens taken from the last to the first, with
//     l_t = C_t d_o_t + a_{t+1} l_{t+1},    d_C_t = sum_c d_o_t h_t,    d_B_t = sum_c u_t l_t,    d_u_t = sum_n B_t l_t
//     w_t = a_t l_t h_{t-1},    d_A = sum_t dt_t w_t,    d_dt_t = sum_n A w_t + x_t d_u_t,    d_x_t = dt_t d_u_t + D d_o_t
// Sums over channels leave a block as parts, and those over sequences too, which a last kernel adds in their order: there are no
// atomics. Workspace: of starts K / TOKENS floats, and of parts 2 K / CHANNELS, for each number of x; with 16 keys 1.5.
#include "selective_scan_walk.cuh"

namespace writesae::cuda::selective_scan {
namespace {

struct Parts {
  float *d_B, *d_C;  // [blocks of channels, B T, K]
  float* d_rates;    // [N, V, K]
  float* d_skip;     // [N, V]
  float* d_left;     // [warps, E, K], of all blocks of channels
};

struct Backward {
  SelectiveScanBackwardParams p;
  Given g;
  Parts parts;
};

constexpr int WARPS = THREADS / tile::WARP;

// Of an edit that added left right^T to a state with the gradient l.
template <class S>
__device__ __forceinline__ void edit_gradient(const Backward& b, int64_t e, const Place& at, const float (&l)[S::EACH]) {
  const SelectiveScanParams& p = b.g.in;
  const int blocks = static_cast<int>((p.V + S::CHANNELS - 1) / S::CHANNELS);
  const int64_t group = static_cast<int64_t>(tile::block_x() % blocks) * WARPS + tile::warp();
  const float right = at.channel < p.V ? p.edits.right[e * p.V + at.channel] : 0.0f;
  float d_right = 0;
#pragma unroll
  for (int r = 0; r < S::EACH; r++) {
    const int n = at.part + S::PARTS * r;
    if (n < p.K) d_right += p.edits.left[e * p.K + n] * l[r];
    const float d_left = sum_channels<S>(right * l[r]);
    if (n < p.K && tile::lane() < S::PARTS) b.parts.d_left[(group * p.edits.count + e) * p.K + n] = d_left;
  }
  d_right = sum_parts<S>(d_right);
  if (at.part == 0 && at.channel < p.V) b.p.d_edit_right[e * p.V + at.channel] = d_right;
}

template <class S>
__device__ __forceinline__ void edit_gradients(const Backward& b, const Here& here, bool after, const Place& at,
                                               const float (&l)[S::EACH]) {
  for (int64_t e = here.begin; e < here.end; e++)
    if (b.g.in.edits.kind(e).adds() && b.g.in.edits.kind(e).after() == after) edit_gradient<S>(b, e, at, l);
}

template <class S>
__global__ void __launch_bounds__(THREADS, BLOCKS) reverse(const __grid_constant__ Backward b) {
  const SelectiveScanParams& p = b.g.in;
  const Place at = place<S>(p);
  const Span span = span_of<S>(p, at.n);
  const int K = static_cast<int>(p.K), V = static_cast<int>(p.V);
  const bool inside = at.channel < V, speaks = inside && at.part == 0;
  const int channels = at.channel - at.slot;
  tile::Shared shared;
  float* dt = shared.take<float>(S::ROWS);
  float* x = shared.take<float>(S::ROWS);
  float* d_o = shared.take<float>(S::ROWS);
  float* B = shared.take<float>(S::FACTORS);
  float* C = shared.take<float>(S::FACTORS);
  float* states = shared.take<float>(S::STATES);  // [1 + TOKENS][EACH][THREADS]  the first, and as tokens read them
  float* sums = shared.take<float>(WARPS * 2 * S::FACTORS);  // [WARPS][d_B, d_C][TOKENS][KEYS]
  float l[S::EACH], rate[S::EACH], d_rates[S::EACH] = {}, d_skip = 0;
  load_rates<S>(p, at, rate);
  load_state<S>(b.p.d_final_state == nullptr ? nullptr : b.p.d_final_state + at.n * p.K * V, at, K, V, l);
  const float skip = p.skip != nullptr && inside ? p.skip[at.channel] : 0.0f;
  const EditRange range = edits_of(p.edits, at.n, 0);
  int64_t edits_end = range.end;  // of those not taken yet
  const int tiles = static_cast<int>((span.length + S::TOKENS - 1) / S::TOKENS);
  for (int i = tiles - 1; i >= 0; i--) {
    const int64_t first = static_cast<int64_t>(i) * S::TOKENS, origin = span.origin + first;
    const int count = static_cast<int>(span.length - first < S::TOKENS ? span.length - first : S::TOKENS);
    tile::sync();
    load_rows<S>(p.dt, span.row, origin, count, channels, V, dt);
    load_rows<S>(p.x, span.row, origin, count, channels, V, x);
    load_rows<S>(b.p.d_o, span.row, origin, count, channels, V, d_o);
    load_factors<S>(p.write, span.row, origin, count, K, B);
    load_factors<S>(p.read, span.row, origin, count, K, C);
    tile::sync();

    // A token's write and the edits after its read, onto the state it read.
    const auto finish = [&](const Here& here, int t, float u, float (&s)[S::EACH]) {
#pragma unroll
      for (int r = 0; r < S::EACH; r++)
        if (!here.kept) s[r] -= B[t * S::KEYS + at.part + S::PARTS * r] * u;
      add_edits<S>(p, here, true, at, s);
    };
    const auto write_of = [&](const Here& here, int t) {
      return here.native ? dt[t * S::LD + at.slot] * x[t * S::LD + at.slot] : 0.0f;
    };
    int64_t edit = first_edit(p.edits, at.n, 0, first);
    float s[S::EACH];
    load_state<S>(b.g.starts + (span.first_slot + i) * p.K * V, at, K, V, s);
#pragma unroll
    for (int r = 0; r < S::EACH; r++) states[r * THREADS + tile::thread()] = s[r];
#pragma unroll 1
    for (int t = 0; t < count; t++) {
      const bool edited = edit < range.end && position(p.edits, edit) == first + t;
      const Here here = edited ? edits_here(p.edits, edit, range.end, first + t) : Here{edit, edit, true, true};
      const float u = write_of(here, t), step = dt[t * S::LD + at.slot];
#pragma unroll
      for (int r = 0; r < S::EACH; r++)
        s[r] = tile::exponential(step * rate[r]) * s[r] + B[t * S::KEYS + at.part + S::PARTS * r] * u;
      if (edited) add_edits<S>(p, here, false, at, s);
#pragma unroll
      for (int r = 0; r < S::EACH; r++) states[((t + 1) * S::EACH + r) * THREADS + tile::thread()] = s[r];
      if (edited) finish(here, t, u, s);
      edit = here.end;
    }

#pragma unroll 1
    for (int t = count - 1; t >= 0; t--) {
      const int64_t token = span.row * p.T + origin + t;
      if (b.g.first_place != nullptr && b.p.d_snapshots != nullptr)
        for (int j = b.g.first_place[token]; j != 0; j = b.g.next_place[j - 1]) {
          float more[S::EACH];
          load_state<S>(b.p.d_snapshots + (j - 1) * p.K * V, at, K, V, more);
#pragma unroll
          for (int r = 0; r < S::EACH; r++) l[r] += more[r];
        }
      int64_t begin = edits_end;
      while (begin > range.begin && position(p.edits, begin - 1) == first + t) begin--;
      const Here here = edits_here(p.edits, begin, edits_end, first + t);
      edits_end = begin;
      const float step = dt[t * S::LD + at.slot], value = x[t * S::LD + at.slot], d = d_o[t * S::LD + at.slot];
      const float u = write_of(here, t);
      edit_gradients<S>(b, here, true, at, l);
#pragma unroll
      for (int r = 0; r < S::EACH; r++) l[r] += C[t * S::KEYS + at.part + S::PARTS * r] * d;
      edit_gradients<S>(b, here, false, at, l);
      float before[S::EACH];
#pragma unroll
      for (int r = 0; r < S::EACH; r++) before[r] = states[(t * S::EACH + r) * THREADS + tile::thread()];
      if (t > 0 && begin > range.begin && position(p.edits, begin - 1) == first + t - 1) {
        int64_t from = begin - 1;
        while (from > range.begin && position(p.edits, from - 1) == first + t - 1) from--;
        const Here last = edits_here(p.edits, from, begin, first + t - 1);
        finish(last, t - 1, write_of(last, t - 1), before);
      }
      float d_u = 0, d_step = 0;
#pragma unroll
      for (int r = 0; r < S::EACH; r++) {
        const int n = at.part + S::PARTS * r;
        // What a write removed after its read becomes later is no part of its gradient.
        const float made = here.kept ? l[r] : C[t * S::KEYS + n] * d;
        d_u += B[t * S::KEYS + n] * made;
        const float d_C = sum_channels<S>(d * states[((t + 1) * S::EACH + r) * THREADS + tile::thread()]);
        const float d_B = sum_channels<S>(u * made);
        if (tile::lane() < S::PARTS) {
          float* const to = sums + tile::warp() * 2 * S::FACTORS + t * S::KEYS + n;
          to[0] = d_B, to[S::FACTORS] = d_C;
        }
        l[r] *= tile::exponential(step * rate[r]);
        const float w = l[r] * before[r];
        d_rates[r] += step * w;
        d_step += rate[r] * w;
      }
      d_u = sum_parts<S>(d_u), d_step = sum_parts<S>(d_step);
      if (speaks) {
        const int64_t to = token * V + at.channel;
        if (b.p.d_right.data != nullptr) d_u += cuda::read(b.p.d_right, span.row, origin + t, at.channel);
        if (!here.native) d_u = 0;
        cuda::write(b.p.d_x, p.x.type, to, step * d_u + skip * d);
        cuda::write(b.p.d_dt, p.dt.type, to, d_step + value * d_u);
        d_skip += value * d;
      }
    }
    tile::sync();
    const int64_t group = channels / S::CHANNELS;
    for (int j = tile::thread(); j < 2 * count * S::KEYS; j += THREADS) {
      const int which = j / (count * S::KEYS), inner = j % (count * S::KEYS), t = inner / S::KEYS, n = inner % S::KEYS;
      float total = 0;
#pragma unroll
      for (int warp = 0; warp < WARPS; warp++) total += sums[(warp * 2 + which) * S::FACTORS + inner];
      if (n < K) (which == 0 ? b.parts.d_B : b.parts.d_C)[(group * p.B * p.T + span.row * p.T + origin + t) * K + n] = total;
    }
  }
  store_state<S>(b.p.d_initial_state + at.n * p.K * V, at, K, V, l);
#pragma unroll
  for (int r = 0; r < S::EACH; r++) {
    const int n = at.part + S::PARTS * r;
    if (n < K && inside) b.parts.d_rates[(at.n * V + at.channel) * K + n] = d_rates[r];
  }
  if (speaks) b.parts.d_skip[at.n * V + at.channel] = d_skip;
}

// to[i] = the sum of parts[j][i] in order of j.
__global__ void __launch_bounds__(THREADS) add_up(const float* from, int64_t count, int64_t size, Element type, void* to) {
  const int64_t i = static_cast<int64_t>(tile::block_x()) * THREADS + tile::thread();
  if (i >= size) return;
  float total = 0;
  for (int64_t j = 0; j < count; j++) total += from[j * size + i];
  cuda::write(to, type, i, total);
}

template <class S>
Backward lay_out(const SelectiveScanBackwardParams& p, Workspace& space) {
  const SelectiveScanParams& in = p.in;
  Backward b = {p, {in, nullptr, nullptr, nullptr}, {}};
  if (in.P > 0) b.g.first_place = space.take<int>(in.B * in.T), b.g.next_place = space.take<int>(in.P);
  b.g.starts = space.take<float>(slots<S>(in) * in.K * in.V);
  const int64_t blocks = cuda::parts(in.V, S::CHANNELS);
  b.parts.d_B = space.take<float>(blocks * in.B * in.T * in.K);
  b.parts.d_C = space.take<float>(blocks * in.B * in.T * in.K);
  b.parts.d_rates = space.take<float>(in.N * in.V * in.K);
  b.parts.d_skip = space.take<float>(in.N * in.V);
  b.parts.d_left = space.take<float>(blocks * WARPS * in.edits.count * in.K);
  return b;
}

// Of a block of `reverse`.
template <class S>
constexpr size_t reverse_shared() {
  return 3 * tile::shared_piece(S::ROWS * 4) + 2 * tile::shared_piece(S::FACTORS * 4) + tile::shared_piece(S::STATES * 4) +
         tile::shared_piece(WARPS * 2 * S::FACTORS * 4);
}

template <class S>
void run(const SelectiveScanBackwardParams& p, void* workspace, tile::Stream stream) {
  Workspace space = {static_cast<char*>(workspace)};
  const Backward b = lay_out<S>(p, space);
  const SelectiveScanParams& in = p.in;
  const int64_t blocks = cuda::parts(in.V, S::CHANNELS), edits = in.edits.count;
  run_places(b.g, stream);
  if (edits > 0) {  // those that only remove have no gradient
    tile::zero(b.parts.d_left, blocks * WARPS * edits * in.K * sizeof(float), stream);
    tile::zero(p.d_edit_right, edits * in.V * sizeof(float), stream);
  }
  launch_walk<S, false>(b.g, stream);
  tile::launch("selective_scan reverse", reverse<S>, {static_cast<unsigned>(in.N * blocks), 1, 1}, THREADS,
               reverse_shared<S>(), stream, b);
  const auto sum = [&](const float* from, int64_t count, int64_t size, Element type, void* to) {
    tile::launch("selective_scan add_up", add_up, {static_cast<unsigned>(cuda::parts(size, THREADS)), 1, 1}, THREADS, 0,
                 stream, from, count, size, type, to);
  };
  sum(b.parts.d_B, blocks, in.B * in.T * in.K, in.write.type, p.d_write);
  sum(b.parts.d_C, blocks, in.B * in.T * in.K, in.read.type, p.d_read);
  sum(b.parts.d_rates, in.N, in.V * in.K, Element::f32, p.d_rates);
  sum(b.parts.d_skip, in.N, in.V, Element::f32, p.d_skip);
  sum(b.parts.d_left, blocks * WARPS, edits * in.K, Element::f32, p.d_edit_left);
}

}  // namespace

int64_t backward_workspace(const SelectiveScanBackwardParams& p) {
  Workspace space = {nullptr};
  with_shape("selective_scan_backward", p.in.K, [&](auto shape) {
    tile::require_shared("selective_scan_backward: K = " + std::to_string(p.in.K), reverse_shared<decltype(shape)>());
    lay_out<decltype(shape)>(p, space);
  });
  return space.used;
}

void backward(const SelectiveScanBackwardParams& p, void* workspace, void* stream) {
  with_shape("selective_scan_backward", p.in.K,
             [&](auto shape) { run<decltype(shape)>(p, workspace, static_cast<tile::Stream>(stream)); });
}

}  // namespace writesae::cuda::selective_scan
