// The backward of gated_delta_rule on CUDA, the host's part: workspace, and the sums at the end.
#include "gated_delta_rule_backward.cuh"

#include <algorithm>
#include <stdexcept>

#include "scan_layout.cuh"

namespace writesae::cuda::gated_delta_rule {
namespace {

// ---- from parts to gradients --------------------------------------------------------------------------------------------

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
    for (int x = 0; x < tiles; x++) d_g += from[x], d_beta += from[tiles + x];
    write(b.d_g, b.g_type, first_head + member, d_g);
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

// ---- layout -------------------------------------------------------------------------------------------------------------

struct Call {
  Backward b;
  Element type;  // of computation
  int chunk;
  Packing packing[4];
  Cutting cutting;
  int64_t workspace;
};

Call lay_out(const ScanBackwardParams& from, void* workspace) {
  const ScanParams& in = from.in;
  if (in.K > 256)
    throw std::invalid_argument("gated_delta_rule_backward: the CUDA kernel takes K up to 256, got K = " +
                                std::to_string(in.K));
  Call call = {};
  Backward& b = call.b;
  Problem& p = b.p;
  p.B = in.B, p.Hk = in.Hk, p.H = in.H, p.K = in.K, p.V = in.V, p.N = in.N, p.T = in.T;
  p.g = in.g, p.beta = in.beta, p.scale = in.scale, p.normalise = in.use_qk_l2norm, p.initial_state = in.initial_state;
  p.cu_seqlens = in.cu_seqlens, p.edits = in.edits, p.P = in.P, p.places = in.places, p.plain = true;
  b.right = from.right, b.d_right = from.d_right, b.q = in.q, b.k = in.k;
  b.d_left = from.d_left, b.d_final_state = from.d_final_state, b.d_snapshots = from.d_snapshots;
  b.v_type = in.v.type, b.g_type = in.g.type, b.beta_type = in.beta.type;
  b.d_q = from.d_q, b.d_k = from.d_k, b.d_v = from.d_v, b.d_g = from.d_g, b.d_beta = from.d_beta;
  b.d_initial_state = from.d_initial_state, b.d_edit_left = from.d_edit_left, b.d_edit_right = from.d_edit_right;
  if (b.d_snapshots == nullptr) p.P = 0;
  // Adjoints may be of any size, which f16 has no room for: its inputs are multiplied as float.
  const bool narrow = in.q.type == Element::bf16 && in.k.type == Element::bf16 && in.v.type == Element::bf16;
  call.type = narrow ? Element::bf16 : Element::f32;
  const int64_t bytes = element_size(call.type), each = 16 / bytes, E = p.edits.count, tokens = in.B * in.T;
  const int C = call.chunk = narrow ? Operand<bf16>::CHUNK : Operand<float>::CHUNK;
  const bool cut = E + p.P > 0;
  p.slots = (p.cu_seqlens == nullptr ? p.B * parts(p.T, C) : p.T / C + p.N) + E + p.P;

  Workspace space = {static_cast<char*>(workspace)};
  const auto rows = [&](const View& x, int64_t heads, int64_t size, Rows& to) {
    return lay_rows(x, call.type, p.B, p.T, heads, size, false, space, to);
  };
  call.packing[0] = rows(in.q, p.Hk, p.K, p.q);
  call.packing[1] = rows(in.k, p.Hk, p.K, p.k);
  call.packing[2] = rows(in.v, p.H, p.V, p.v);
  call.packing[3] = rows(from.d_o, p.H, p.V, b.d_o);
  const int64_t image = narrow ? Triangle<bf16, 64>::SIZE : Triangle<float, 32>::SIZE;
  p.solve = space.take<char>(p.slots * p.H * image * bytes);
  p.reach = space.take<char>(p.slots * p.H * image * bytes);
  p.factors = space.take<float>(p.slots * p.H * (narrow ? Factors<64>::SIZE : Factors<32>::SIZE));
  if (E > 0) p.removed = space.take<uint8_t>(2 * tokens * p.H), p.gone = p.removed + tokens * p.H;
  if (cut) {
    call.cutting.ends = space.take<uint8_t>(tokens);
    p.cuts = call.cutting.cuts = space.take<Cut>(p.slots);
    b.spans = call.cutting.spans = space.take<int64_t>(2 * p.N);
  }
  if (p.P > 0) b.first_shot = space.take<int>(p.slots), b.next_shot = space.take<int>(p.P);
  b.key_width = static_cast<int>(up(p.K, each)), b.value_width = static_cast<int>(up(p.V, each));
  b.starts = space.take<char>(p.slots * p.H * p.V * b.key_width * bytes);
  b.ends = space.take<char>(p.slots * p.H * p.V * b.key_width * bytes);
  b.d_y = space.take<char>(tokens * p.H * b.value_width * bytes);
  b.parts = space.take<float>(tokens * p.Hk * 2 * p.K);
  b.scalars = space.take<float>(tokens * p.H * 2 * key_tiles(p.K));
  call.workspace = space.used;
  return call;
}

}  // namespace

int64_t backward_workspace(const ScanBackwardParams& p) { return lay_out(p, nullptr).workspace; }

void backward(const ScanBackwardParams& from, void* workspace, void* stream_of_torch) {
  const auto stream = static_cast<tile::Stream>(stream_of_torch);
  const Call call = lay_out(from, workspace);
  const Backward& b = call.b;
  const Problem& p = b.p;
  const Rows* const targets[4] = {&p.q, &p.k, &p.v, &b.d_o};
  for (int i = 0; i < 4; i++) run_packing(call.packing[i], call.type, p.B, p.T, *targets[i], stream);
  run_cuts(b, call.cutting, call.chunk, stream);
  if (call.type == Element::bf16) {
    run_backward<bf16>(b, stream);
  } else {
    run_backward<float>(b, stream);
  }
  const int64_t rows = p.B * p.T * p.Hk;
  tile::launch("gated_delta_rule_backward finish", finish, {static_cast<unsigned>(parts(rows, 4)), 1, 1}, 128, 0, stream, b,
               rows, static_cast<int>(key_tiles(p.K)));
}

}  // namespace writesae::cuda::gated_delta_rule
