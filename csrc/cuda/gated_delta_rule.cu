// gated_delta_rule on CUDA, the host's part: how a call is laid out, and its workspace.
#include <algorithm>
#include <stdexcept>

#include "gated_delta_rule.cuh"
#include "scan_layout.cuh"

namespace writesae::cuda::gated_delta_rule {
namespace {

struct Call {
  Problem p;
  Element type;  // of computation
  int warps, chunk;
  Packing packing[3];
  int64_t workspace;
};

Call lay_out(const ScanParams& from, void* workspace, Plan plan) {
  if (from.K > 256)
    throw std::invalid_argument("gated_delta_rule: the CUDA kernel takes K up to 256, got K = " + std::to_string(from.K));
  Call call = {};
  Problem& p = call.p;
  p.B = from.B, p.Hk = from.Hk, p.H = from.H, p.K = from.K, p.V = from.V, p.N = from.N, p.T = from.T;
  p.g = from.g, p.beta = from.beta, p.scale = from.scale, p.initial_state = from.initial_state;
  p.cu_seqlens = from.cu_seqlens, p.edits = from.edits, p.P = from.P, p.places = from.places;
  p.o = from.o, p.o_type = from.o_type, p.final_state = from.final_state;
  p.left = from.left, p.right = from.right, p.snapshots = from.snapshots;
  const bool alike = from.q.type == from.k.type && from.k.type == from.v.type;
  call.type = alike ? from.v.type : Element::f32;
  const int64_t bytes = element_size(call.type);
  const int C = call.chunk = call.type == Element::f32 ? Operand<float>::CHUNK : Operand<bf16>::CHUNK;
  p.slots = p.cu_seqlens == nullptr ? p.B * parts(p.T, C) : p.T / C + p.N;

  call.warps = choose_plan("gated_delta_rule", p, call.type, C, plan);
  const int64_t heads = static_cast<int64_t>(p.N) * p.H;

  Workspace space = {static_cast<char*>(workspace)};
  // f16 cannot hold r_j u_j for every r_j, so there keys and queries are normalised before the chunks.
  const bool early = from.use_qk_l2norm && call.type == Element::f16;
  p.normalise = from.use_qk_l2norm && !early;
  const auto rows = [&](const View& x, int64_t heads, int64_t size, bool normalise, Rows& to) {
    return lay_rows(x, call.type, p.B, p.T, heads, size, normalise, space, to);
  };
  call.packing[0] = rows(from.q, p.Hk, p.K, early, p.q);
  call.packing[1] = rows(from.k, p.Hk, p.K, early, p.k);
  call.packing[2] = rows(from.v, p.H, p.V, false, p.v);
  const int64_t image = C == 64 ? Triangle<bf16, 64>::SIZE : Triangle<float, 32>::SIZE;
  p.solve = space.take<char>(p.slots * p.H * image * bytes);
  p.reach = space.take<char>(p.slots * p.H * image * bytes);
  p.factors = space.take<float>(p.slots * p.H * (C == 64 ? Factors<64>::SIZE : Factors<32>::SIZE));
  if (p.edits.count > 0) {
    p.removed = space.take<uint8_t>(2 * p.B * p.T * p.H);
    p.gone = p.removed + p.B * p.T * p.H;
    p.edit_factors = space.take<float>(p.edits.count * (C == 64 ? EditFactors<64>::SIZE : EditFactors<32>::SIZE));
  }
  if (p.P > 0) p.first_place = space.take<int>(p.slots), p.next_place = space.take<int>(p.P);
  if (p.segments > 1) {
    p.adds = space.take<float>(heads * p.segments * p.K * p.V);
    p.moves = space.take<float>(heads * p.segments * p.K * p.K);
  }
  call.workspace = space.used;
  return call;
}

}  // namespace

int64_t forward_workspace(const ScanParams& p, Plan plan) { return lay_out(p, nullptr, plan).workspace; }

void forward(const ScanParams& from, void* workspace, void* stream_of_torch, Plan plan) {
  const auto stream = static_cast<tile::Stream>(stream_of_torch);
  Call call = lay_out(from, workspace, plan);
  Problem& p = call.p;
  const Rows* const targets[3] = {&p.q, &p.k, &p.v};
  for (int i = 0; i < 3; i++) run_packing(call.packing[i], call.type, p.B, p.T, *targets[i], stream);
  run_marks(p, call.chunk, stream);
  with_type(call.type, [&](auto x) { run_chunks<decltype(x)>(p, call.warps, stream); });
}

}  // namespace writesae::cuda::gated_delta_rule
