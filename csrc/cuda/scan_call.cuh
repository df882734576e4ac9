// A scan on CUDA, the host's part of a rule: how a call is laid out, its workspace, and the launches in order.
#pragma once

#include "scan_backward.cuh"
#include "scan_layout.cuh"

namespace writesae::cuda {

// Throws where a rule's kernels, of its operator's name with `suffix`, do not take so many keys.
inline void check_keys(const char* name, const char* suffix, int64_t K) {
  if (K > 256)
    throw std::invalid_argument(std::string(name) + suffix +
                                ": the CUDA kernel takes K up to 256, got K = " + std::to_string(K));
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class Rule>
struct Call {
  Given<Rule> p;
  Element type;  // of computation
  int warps, chunk;
  Packing packing[5];
  int64_t workspace;
};

// What prepare makes of a gate of each channel: `to` is the call's problem, or its backward.
template <class To>
void lay_channels(const Problem& p, bool reads, To& to, int64_t bytes, Workspace& space) {
  const int64_t width = up(p.K, 16 / bytes);
  for (Rows* rows : {&to.read, &to.ask, &to.write}) {
    *rows = {nullptr, {p.T * p.H * width, p.H * width, width}, static_cast<int>(width)};
    if (reads || rows != &to.read) rows->data = space.take<char>(p.B * p.T * p.H * width * bytes);
  }
  to.decays = space.take<float>(p.slots * p.H * padded_keys(p.K));
}

template <class Rule>
Call<Rule> lay_out(const ScanParams& from, void* workspace, Plan plan) {
  check_keys(Rule::NAME, "", from.K);
  Call<Rule> call = {};
  Given<Rule>& p = call.p;
  p.B = from.B, p.Hk = from.Hk, p.H = from.H, p.K = from.K, p.V = from.V, p.N = from.N, p.T = from.T;
  p.g = from.g, p.beta = from.beta, p.scale = from.scale, p.initial_state = from.initial_state;
  p.cu_seqlens = from.cu_seqlens, p.edits = from.edits, p.P = from.P, p.places = from.places;
  p.o = from.o, p.o_type = from.o_type, p.final_state = from.final_state;
  p.left = from.left, p.right = from.right, p.snapshots = from.snapshots, p.first_nonfinite = from.first_nonfinite;
  bool alike = from.q.type == from.k.type && from.k.type == from.v.type;
  if (Rule::LOW_RANK) alike = alike && from.a.type == from.v.type && from.b.type == from.v.type;
  call.type = alike && (Rule::ALL || from.v.type != Element::f16) ? from.v.type : Element::f32;
  const int64_t bytes = element_size(call.type);
  const int C = call.chunk = call.type == Element::f32 ? Operand<float>::CHUNK : Operand<bf16>::CHUNK;
  p.slots = p.cu_seqlens == nullptr ? p.B * parts(p.T, C) : p.T / C + p.N;

  call.warps = choose_plan<Rule>(p, call.type, C, plan);
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
  if (Rule::READS) p.solve = space.take<char>(p.slots * p.H * image * bytes);
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
    p.moves = space.take<float>(heads * p.segments * (Rule::READS ? p.K * p.K : Rule::CHANNEL ? p.K : 1));
  }
  if constexpr (Rule::CHANNEL) {
    const int64_t width = up(p.K, 16 / bytes);
    lay_channels(p, Rule::READS, p, bytes, space);
    p.edit_rows = space.take<float>(p.edits.count * p.K);
    p.shot_rows = space.take<char>(p.P * p.H * C * width * bytes);
    p.shot_decays = space.take<float>(p.P * p.H * p.K);
  }
  if constexpr (Rule::LOW_RANK) {
    call.packing[3] = rows(from.a, p.H, p.K, false, p.a);
    call.packing[4] = rows(from.b, p.H, p.K, false, p.b);
    p.erase_write = p.write, p.erase_write.data = space.take<char>(p.B * p.T * p.H * p.write.width * bytes);
    p.mix = space.take<char>(p.slots * p.H * image * bytes);
    p.erase_reach = space.take<char>(p.slots * p.H * image * bytes);
    p.erase_shots = space.take<char>(p.P * p.H * C * p.write.width * bytes);
    p.erased = from.erased;
  }
  call.workspace = space.used;
  return call;
}

template <class Rule>
void run_forward(const ScanParams& from, void* workspace, tile::Stream stream, Plan plan) {
  const Call<Rule> call = lay_out<Rule>(from, workspace, plan);
  const Given<Rule>& p = call.p;
  const Rows* targets[5] = {&p.q, &p.k, &p.v};
  if constexpr (Rule::LOW_RANK) targets[3] = &p.a, targets[4] = &p.b;
  for (int i = 0; i < (Rule::LOW_RANK ? 5 : 3); i++) run_packing(call.packing[i], call.type, p.B, p.T, *targets[i], stream);
  run_marks(p, call.chunk, stream);
  if (call.type == Element::bf16) return Rule::template run_chunks<bf16>(p, call.warps, stream);
  if constexpr (Rule::ALL) {
    if (call.type == Element::f16) return Rule::template run_chunks<f16>(p, call.warps, stream);
  }
  Rule::template run_chunks<float>(p, call.warps, stream);
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class Rule>
struct BackwardCall {
  GivenBack<Rule> b;
  Element type;  // of computation
  int chunk;
  Packing packing[6];
  Cutting cutting;
  int64_t workspace;
};

template <class Rule>
BackwardCall<Rule> lay_out_backward(const ScanBackwardParams& from, void* workspace) {
  const ScanParams& in = from.in;
  check_keys(Rule::NAME, "_backward", in.K);
  BackwardCall<Rule> call = {};
  GivenBack<Rule>& b = call.b;
  Problem& p = b.p;
  p.B = in.B, p.Hk = in.Hk, p.H = in.H, p.K = in.K, p.V = in.V, p.N = in.N, p.T = in.T;
  p.g = in.g, p.beta = in.beta, p.scale = in.scale, p.normalise = in.use_qk_l2norm, p.initial_state = in.initial_state;
  p.cu_seqlens = in.cu_seqlens, p.edits = in.edits, p.P = in.P, p.places = in.places, p.plain = true;
  b.right = from.right, b.d_right = from.d_right, b.q = in.q, b.k = in.k;
  b.d_left = from.d_left, b.d_final_state = from.d_final_state, b.d_snapshots = from.d_snapshots;
  b.v_type = in.v.type, b.g_type = in.g.type, b.beta_type = in.beta.type, b.channel_gate = Rule::CHANNEL;
  b.d_q = from.d_q, b.d_k = from.d_k, b.d_v = from.d_v, b.d_g = from.d_g, b.d_beta = from.d_beta;
  b.d_initial_state = from.d_initial_state, b.d_edit_left = from.d_edit_left, b.d_edit_right = from.d_edit_right;
  if (b.d_snapshots == nullptr) p.P = 0;
  // Adjoints may be of any size, which f16 has no room for: its inputs are multiplied as float.
  bool narrow = in.q.type == Element::bf16 && in.k.type == Element::bf16 && in.v.type == Element::bf16;
  if (Rule::LOW_RANK) narrow = narrow && in.a.type == Element::bf16 && in.b.type == Element::bf16;
  call.type = narrow ? Element::bf16 : Element::f32;
  tile::require_shared(
      std::string(Rule::NAME) + "_backward: K = " + std::to_string(in.K) + " of " + (narrow ? "bfloat16" : "float32"),
      narrow ? reverse_shared<Rule, bf16>(in.K) : reverse_shared<Rule, float>(in.K));
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
  if (Rule::READS) p.solve = space.take<char>(p.slots * p.H * image * bytes);
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
  if constexpr (Rule::CHANNEL) lay_channels(p, Rule::READS, b, bytes, space);
  if constexpr (Rule::LOW_RANK) {
    call.packing[4] = rows(in.a, p.H, p.K, b.a);
    call.packing[5] = rows(in.b, p.H, p.K, b.b);
    b.erased = from.erased, b.d_erased = from.d_erased, b.d_a = from.d_a, b.d_b = from.d_b;
    b.a_type = in.a.type, b.b_type = in.b.type;
    b.erase_write = b.write, b.erase_write.data = space.take<char>(tokens * p.H * b.write.width * bytes);
    b.found = space.take<char>(p.slots * p.H * image * bytes);
    b.erase_reach = space.take<char>(p.slots * p.H * image * bytes);
    b.d_u = space.take<char>(tokens * p.H * b.value_width * bytes);
    b.a_parts = space.take<float>(tokens * p.H * p.K), b.g_parts = space.take<float>(tokens * p.H * p.K);
  }
  call.workspace = space.used;
  return call;
}

template <class Rule>
void run_scan_backward(const ScanBackwardParams& from, void* workspace, tile::Stream stream) {
  const BackwardCall<Rule> call = lay_out_backward<Rule>(from, workspace);
  const GivenBack<Rule>& b = call.b;
  const Problem& p = b.p;
  const Rows* targets[6] = {&p.q, &p.k, &p.v, &b.d_o};
  if constexpr (Rule::LOW_RANK) targets[4] = &b.a, targets[5] = &b.b;
  for (int i = 0; i < (Rule::LOW_RANK ? 6 : 4); i++) run_packing(call.packing[i], call.type, p.B, p.T, *targets[i], stream);
  run_cuts(b, call.cutting, call.chunk, stream);
  if (call.type == Element::bf16) {
    Rule::template run_backward<bf16>(b, stream);
  } else {
    Rule::template run_backward<float>(b, stream);
  }
  run_finish(b, stream);
}

}  // namespace writesae::cuda
