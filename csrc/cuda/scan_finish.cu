// The end of a scan's backward: from parts to gradients.
#include "scan_backward.cuh"
#include "scan_layout.cuh"

namespace writesae::cuda {
namespace {

// One token of one key head, a warp: the sums of `gradients`, back through normalisation and scale.
__global__ void __launch_bounds__(128) finish(const __grid_constant__ Backward b, int64_t rows, int tiles) {
  const Problem& p = b.p;
  const int64_t i = static_cast<int64_t>(tile::block_x()) * 4 + tile::warp();
  if (i >= rows) return;
  const int64_t hk = i % p.Hk, t = i / p.Hk % p.T, row = i / p.Hk / p.T;
  const int group = p.H / p.Hk, lane = tile::lane();
  const int64_t first_head = (row * p.T + t) * p.H + hk * group;
  for (int member = lane; member < group; member += tile::WARP) {
    const float* from = b.scalars + (first_head + member) * 2 * tiles;
    float d_g = 0, d_beta = 0;
    for (int x = 0; x < tiles; x++) d_g += b.channel_gate ? 0.0f : from[x], d_beta += from[tiles + x];
    if (!b.channel_gate) write(b.d_g, b.g_type, first_head + member, d_g);
    write(b.d_beta, b.beta_type, first_head + member, d_beta);
  }
  for (int which = 0; which < 2; which++) {  // 0: the query, 1: the key
    const View& raw = which == 0 ? b.q : b.k;
    constexpr int EACH = 256 / tile::WARP;
    float d[EACH], x[EACH], squares = 0, along = 0;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int at = e * tile::WARP + lane;
      d[e] = x[e] = 0;
      if (at >= p.K) continue;
      if (which == 1 && b.d_left != nullptr) d[e] = b.d_left[i * p.K + at];
      d[e] += b.parts[(i * 2 + which) * p.K + at];
      if (p.normalise) x[e] = read(raw, row, t, hk, at);
      squares += x[e] * x[e];
    }
    const float inverse = p.normalise ? tile::reciprocal_root(tile::warp_sum(squares) + 1e-6f) : 1.0f;
#pragma unroll
    for (int e = 0; e < EACH; e++) x[e] *= inverse, along += x[e] * d[e];
    along = tile::warp_sum(along);
    const float factor = which == 0 ? inverse * p.scale : inverse;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int at = e * tile::WARP + lane;
      if (at < p.K) write(which == 0 ? b.d_q : b.d_k, raw.type, i * p.K + at, (d[e] - along * x[e]) * factor);
    }
  }
}

}  // namespace

void run_finish(const Backward& b, tile::Stream stream) {
  const int64_t rows = b.p.B * b.p.T * b.p.Hk;
  tile::launch("scan_backward finish", finish, {static_cast<unsigned>(parts(rows, 4)), 1, 1}, 128, 0, stream, b, rows,
               static_cast<int>(key_tiles(b.p.K)));
}

}  // namespace writesae::cuda
