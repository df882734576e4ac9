// gated_delta_rule's CUDA kernels under the host twin against the plain loop in double: every type, size class, layout and
// way of splitting once; the Python tests have the many cases.
#include <functional>

#include "cuda/tile.cuh"
#include "gated_delta_rule.h"
#include "scan_plain.h"

using namespace writesae;
using namespace writesae::test;
namespace tile = writesae::tile;

namespace {

struct Case {
  Element type;
  int64_t B, Hk, H, K, V;
  std::vector<int64_t> lengths;  // packed when B == 1 and there are several
  int64_t edits;
  bool initial, writes, l2norm;
  cuda::Plan plan = {};
  float decay = 0.2f;
  int64_t margin = 0;  // elements that offset q, k and v from an aligned start
};

// Errors allowed for a type's outputs and for the float outputs (states, increments) computed from its operands.
double allowed(Element type) { return type == Element::f32 ? 2e-5 : type == Element::bf16 ? 1.2e-2 : 1.5e-3; }

// The numbers of x in the given type, and what holds them.
View narrow(const std::vector<float>& x, Element type, std::vector<uint16_t>& held) {
  View out;
  out.type = type, out.data = x.data();
  if (type == Element::f32) return out;
  for (float value : x) held.push_back(type == Element::bf16 ? tile::to_bf16(value).bits : tile::to_f16(value).bits);
  out.data = held.data();
  return out;
}

std::vector<float> widen(const std::vector<uint16_t>& x, Element type) {
  std::vector<float> out;
  for (uint16_t bits : x)
    out.push_back(type == Element::bf16 ? tile::to_float(tile::bf16{bits}) : tile::to_float(tile::f16{bits}));
  return out;
}

void check(const Case& c) {
  const double tolerance = allowed(c.type);
  ScanParams p = {};
  p.Hk = c.Hk, p.H = c.H, p.K = c.K, p.V = c.V;
  std::vector<int64_t> offsets;
  Sequences sequences = lay_sequences(p, c.B, c.lengths, offsets);

  // q, k and v as a fused projection holds them; without normalisation keys of length below 1.
  const int64_t wide = 2 * c.Hk * c.K + c.H * c.V;
  const auto fused = normal(c.B * p.T * wide + c.margin, c.l2norm ? 1.0f : 0.5f / std::sqrt(static_cast<float>(c.K)));
  std::vector<uint16_t> held, held_g, held_beta;
  View all = narrow(fused, c.type, held);
  const auto part = [&](int64_t offset, int64_t size) {
    View x = all;
    x.data = static_cast<const char*>(all.data) + (c.margin + offset) * element_size(c.type);
    x.stride[0] = p.T * wide, x.stride[1] = wide, x.stride[2] = size, x.stride[3] = 1;
    return x;
  };
  p.q = part(0, c.K), p.k = part(c.Hk * c.K, c.K), p.v = part(2 * c.Hk * c.K, c.V);
  auto g = normal(c.B * p.T * c.H), beta = g;
  for (size_t i = 0; i < g.size(); i++) beta[i] = 1 / (1 + std::exp(-g[i])), g[i] = -c.decay * std::abs(g[i]);
  if (c.decay > 100)
    for (size_t i = 0; i < g.size(); i += 3) g[i] = -std::numeric_limits<float>::infinity();
  p.g = view(g, p.T * c.H, c.H, 1, 0), p.beta = narrow(beta, c.type, held_beta);
  p.beta.stride[0] = p.T * c.H, p.beta.stride[1] = c.H, p.beta.stride[2] = 1;
  p.scale = 0.3f, p.use_qk_l2norm = c.l2norm;
  const auto initial = normal(p.N * c.H * c.K * c.V);
  p.initial_state = c.initial ? initial.data() : nullptr;

  const Picked edits = pick_edits(p, sequences, c.edits, 1 / std::sqrt(static_cast<float>(c.K)), [](int64_t length) {
    const int64_t border = std::min(length - 1, pick(length) / 64 * 64 + pick(2) * 63);
    return std::array<int64_t, 4>{0, length - 1, pick(length), border}[pick(4)];
  });
  edits.give(p);

  const int64_t values = c.B * p.T * c.H * c.V;
  auto o = poison(values), right = o, final_state = poison(initial.size());
  std::vector<uint16_t> narrow_o(values, 0x7fff);
  auto left = poison(c.B * p.T * c.Hk * c.K), snapshots = poison(p.P * c.H * c.K * c.V);
  p.o = c.type == Element::f32 ? static_cast<void*>(o.data()) : narrow_o.data(), p.o_type = c.type;
  p.final_state = final_state.data(), p.snapshots = snapshots.data();
  p.left = c.writes ? left.data() : nullptr, p.right = c.writes ? right.data() : nullptr;
  // Exactly as many bytes as asked for, full of NaN.
  const int64_t bytes = cuda::gated_delta_rule::forward_workspace(p, c.plan);
  auto* workspace = static_cast<char*>(std::aligned_alloc(256, bytes));
  std::memset(workspace, 0xff, bytes);
  tile::twin::statistics.clear();
  cuda::gated_delta_rule::forward(p, workspace, nullptr, c.plan);
  std::free(workspace);
  for (const auto& [launch, counts] : tile::twin::statistics)
    if (counts.conflicts != 0) {
      std::fprintf(stderr, "%s: %ld bank conflicts of matrix loads\n", launch.c_str(), static_cast<long>(counts.conflicts));
      std::exit(1);
    }
  if (c.type != Element::f32) o = widen(narrow_o, c.type);
  const Expected expected = plain(p, sequences);
  expect_close("o", o, expected.o, tolerance);
  expect_close("final_state", final_state, expected.final_state, tolerance);
  expect_close("snapshots", snapshots, expected.snapshots, tolerance);
  if (c.writes) {
    expect_close("left", left, expected.left, c.type == Element::f16 ? 5e-4 : 2e-6);
    expect_close("right", right, expected.right, tolerance);
  }

  // The step, over the first token of every row, from the same state.
  if (c.B == 1 && c.lengths.size() > 1) return;
  std::vector<std::array<int64_t, 4>> once_index;
  for (const auto& edit : edits.index)
    if (edit[1] == 0) once_index.push_back(edit);
  p.edits.count = once_index.size(), p.edits.index = once_index.empty() ? nullptr : once_index[0].data();
  p.P = 0, p.initial_state = initial.data();
  for (auto& sequence : sequences) sequence[2] = 1;
  const Expected once = plain(p, sequences);
  const auto first_tokens = [&](const std::vector<double>& x) {
    std::vector<double> out;
    for (int64_t b = 0; b < c.B; b++) {
      const auto from = x.begin() + b * p.T * c.H * c.V;
      out.insert(out.end(), from, from + c.H * c.V);
    }
    return out;
  };
  ScanStepParams s = {};
  s.B = c.B, s.Hk = c.Hk, s.H = c.H, s.K = c.K, s.V = c.V;
  const auto drop_time = [](View x) {
    x.stride[1] = x.stride[2], x.stride[2] = x.stride[3], x.stride[3] = 0;
    return x;
  };
  s.q = drop_time(p.q), s.k = drop_time(p.k), s.v = drop_time(p.v), s.g = drop_time(p.g), s.beta = drop_time(p.beta);
  s.scale = p.scale, s.use_qk_l2norm = p.use_qk_l2norm, s.edits = p.edits;
  auto state = initial, step_o = poison(c.B * c.H * c.V), step_right = step_o, step_left = poison(c.B * c.Hk * c.K);
  s.state = state.data(), s.o = step_o.data(), s.o_type = Element::f32;
  s.left = step_left.data(), s.right = step_right.data();
  cuda::gated_delta_rule::step(s, nullptr);
  expect_close("step o", step_o, first_tokens(once.o));
  expect_close("step right", step_right, first_tokens(once.right));
  expect_close("step state", state, once.final_state);
  for (float x : step_left)
    if (!(x == x)) expect_close("step left", step_left, std::vector<double>(step_left.size(), 0.0));
}

}  // namespace

int main() {
  const Element bf16 = Element::bf16, f16 = Element::f16, f32 = Element::f32;
  const std::vector<Case> cases = {
      {f32, 1, 1, 1, 1, 1, {1}, 2, true, true, true},
      {f32, 1, 1, 2, 7, 5, {9}, 6, true, true, true, {}, 0.2f, 1},
      {f32, 2, 2, 4, 20, 12, {63}, 12, false, true, true},
      {f32, 1, 1, 1, 128, 80, {65}, 5, true, false, true, {0, 0, 1}},
      {f32, 1, 1, 2, 40, 24, {200}, 8, true, true, true, {3, 0, 0}},
      {f32, 1, 1, 1, 256, 20, {40}, 3, true, true, false},
      {f32, 1, 2, 2, 16, 24, {5, 0, 1, 70, 0, 127, 1, 0}, 20, true, true, true, {}, 20.0f},
      {bf16, 2, 1, 3, 128, 128, {129}, 9, true, true, true},
      {bf16, 1, 1, 1, 128, 128, {130}, 4, true, true, true, {0, 8, 1}},
      {bf16, 1, 1, 5, 64, 40, {64}, 0, true, true, true, {}, 300.0f},
      {bf16, 1, 1, 1, 32, 33, {127}, 5, true, true, false, {}, 0.02f, 3},
      {bf16, 1, 1, 2, 64, 96, {5, 0, 1, 300, 0, 127, 1, 0}, 20, true, true, true, {2, 8, 0}},
      {bf16, 1, 1, 1, 256, 32, {70}, 3, true, true, true},
      {f16, 2, 1, 2, 24, 48, {66}, 8, true, true, true},
      {f16, 1, 1, 1, 96, 16, {150}, 4, true, true, false},
  };
  for (tile::twin::Schedule schedule : {tile::twin::Schedule::forward, tile::twin::Schedule::reverse}) {
    tile::twin::settings.schedule = schedule;
    for (const Case& c : cases) check(c);
  }
  std::printf("gated_delta_rule on CUDA, host twin: %zu cases agree in both orders\n", cases.size());
}
