// Every write rule's scan and step, with a gate of the head and one of each channel, against a plain loop in double, over
// awkward sizes, packed rows, edits and snapshots.
#include <memory>

#include "dplr.h"
#include "gated_delta_rule.h"
#include "scan_plain.h"
#include "ssd.h"

using namespace writesae;
using namespace writesae::test;

namespace {

struct Rule {
  const char* name;
  bool reads, low_rank;
  decltype(&cpu::gated_delta_rule::forward) forward;
  decltype(&cpu::gated_delta_rule::step) step;
};

constexpr Rule RULES[] = {
    {"gated_delta_rule", true, false, cpu::gated_delta_rule::forward, cpu::gated_delta_rule::step},
    {"ssd", false, false, cpu::ssd::forward, cpu::ssd::step},
    {"dplr", false, false, cpu::dplr::forward, cpu::dplr::step},
    {"dplr with an erase", false, true, cpu::dplr::forward, cpu::dplr::step},
};

struct Case {
  int64_t B, Hk, H, K, V;
  std::vector<int64_t> lengths;  // packed when B == 1 and there are several
  int64_t edits;
  bool initial, writes, l2norm;
};

void check(const Rule& rule, bool channels, const Case& c, int thread_count) {
  ScanParams p = {};
  p.Hk = c.Hk, p.H = c.H, p.K = c.K, p.V = c.V;
  std::vector<int64_t> offsets;
  Sequences sequences = lay_sequences(p, c.B, c.lengths, offsets);

  // q, k and v as a fused projection holds them: heads next to each other in one row of a token.
  const int64_t wide = 2 * c.Hk * c.K + c.H * c.V;
  // Keys longer than sqrt(2 / beta) make the recurrence itself grow, and float errors with it.
  const auto fused = normal(c.B * p.T * wide, c.l2norm ? 1.0f : 0.15f);
  p.q = view(fused, p.T * wide, wide, c.K, 1), p.k = p.q, p.v = view(fused, p.T * wide, wide, c.V, 1);
  p.k.data = fused.data() + c.Hk * c.K, p.v.data = fused.data() + 2 * c.Hk * c.K;
  auto beta = normal(c.B * p.T * c.H);
  const auto g = gates(p, channels, beta);
  p.beta = view(beta, p.T * c.H, c.H, 1, 0);
  const auto erase = rule.low_rank ? std::make_unique<Erase>(p) : nullptr;
  p.scale = 0.3f, p.use_qk_l2norm = c.l2norm;
  const auto initial = normal(p.N * c.H * c.K * c.V);
  p.initial_state = c.initial ? initial.data() : nullptr;

  const Picked edits = pick_edits(p, sequences, c.edits);
  edits.give(p);

  auto o = poison(c.B * p.T * c.H * c.V), right = o, erased = o, final_state = poison(initial.size());
  auto left = poison(c.B * p.T * c.Hk * c.K), snapshots = poison(p.P * c.H * c.K * c.V);
  p.o = o.data(), p.o_type = Element::f32, p.final_state = final_state.data(), p.snapshots = snapshots.data();
  p.left = c.writes ? left.data() : nullptr, p.right = c.writes ? right.data() : nullptr;
  p.erased = c.writes && rule.low_rank ? erased.data() : nullptr;
  rule.forward(p, threads(thread_count));
  const Expected expected = plain(p, sequences, rule.reads);
  expect_close("o", o, expected.o);
  expect_close("final_state", final_state, expected.final_state);
  expect_close("snapshots", snapshots, expected.snapshots);
  if (!c.writes) return;
  expect_close("left", left, expected.left);
  expect_close("right", right, expected.right);
  if (rule.low_rank) expect_close("erased", erased, expected.erased);

  // The step, over the first token of every row, from the same state.
  if (c.B == 1 && c.lengths.size() > 1) return;
  std::vector<std::array<int64_t, 4>> first;
  for (const auto& edit : edits.index)
    if (edit[1] == 0) first.push_back(edit);
  const auto first_left = normal(first.size() * c.K), first_right = normal(first.size() * c.V);
  p.edits = {static_cast<int64_t>(first.size()), first.empty() ? nullptr : first[0].data(), first_left.data(),
             first_right.data()};
  p.P = 0, p.initial_state = initial.data();
  for (auto& sequence : sequences) sequence[2] = 1;
  const Expected once = plain(p, sequences, rule.reads);
  std::vector<double> want_o, want_right, want_erased;
  for (int64_t b = 0; b < c.B; b++) {
    const int64_t at = b * p.T * c.H * c.V;
    want_o.insert(want_o.end(), once.o.begin() + at, once.o.begin() + at + c.H * c.V);
    want_right.insert(want_right.end(), once.right.begin() + at, once.right.begin() + at + c.H * c.V);
    if (rule.low_rank) want_erased.insert(want_erased.end(), once.erased.begin() + at, once.erased.begin() + at + c.H * c.V);
  }
  ScanStepParams s = {};
  s.B = c.B, s.Hk = c.Hk, s.H = c.H, s.K = c.K, s.V = c.V;
  const auto drop_time = [](View x) {
    x.stride[1] = x.stride[2], x.stride[2] = x.stride[3], x.stride[3] = 0;
    return x;
  };
  s.q = drop_time(p.q), s.k = drop_time(p.k), s.v = drop_time(p.v), s.g = drop_time(p.g), s.beta = drop_time(p.beta);
  s.a = drop_time(p.a), s.b = drop_time(p.b);
  s.channel_gate = channels, s.scale = p.scale, s.use_qk_l2norm = p.use_qk_l2norm, s.edits = p.edits;
  auto state = initial, step_o = poison(want_o.size()), step_right = step_o, step_erased = step_o,
       step_left = poison(c.B * c.Hk * c.K);
  s.state = state.data(), s.o = step_o.data(), s.o_type = Element::f32;
  s.left = step_left.data(), s.right = step_right.data();
  s.erased = rule.low_rank ? step_erased.data() : nullptr;
  rule.step(s, threads(thread_count));
  expect_close("step o", step_o, want_o);
  expect_close("step right", step_right, want_right);
  if (rule.low_rank) expect_close("step erased", step_erased, want_erased);
  expect_close("step state", state, once.final_state);
}

// Half-precision inputs and outputs: every bit pattern passes through the conversions, values untouched.
void check_halves(const Rule& rule) {
  for (Element type : {Element::bf16, Element::f16}) {
    const int64_t T = 65536;
    std::vector<uint16_t> v(T), o(T);
    for (int64_t i = 0; i < T; i++) v[i] = static_cast<uint16_t>(i);
    const std::vector<float> one(T, 1.0f), closed(T, -std::numeric_limits<float>::infinity());
    ScanParams p = {};
    p.B = p.Hk = p.H = p.K = p.V = p.N = 1, p.T = T, p.scale = 1;
    p.q = p.k = p.beta = view(one, T, 1, 1, 1), p.g = view(closed, T, 1, 1, 1), p.v = p.q;
    p.v.data = v.data(), p.v.type = type, p.o = o.data(), p.o_type = type;
    // Not-a-number and infinity would stay in the state: leave them out.
    const int exponent = type == Element::bf16 ? 0x7f80 : 0x7c00;
    for (auto& bits : v)
      if ((bits & exponent) == exponent) bits = 0;
    std::vector<float> final_state(1);
    p.final_state = final_state.data();
    rule.forward(p, threads(1));
    for (int64_t i = 0; i < T; i++)
      if (o[i] != v[i] && (v[i] & 0x7fff) != 0) {
        std::fprintf(stderr, "half conversion: %04x became %04x\n", v[i], o[i]);
        std::exit(1);
      }
  }
}

}  // namespace

int main() {
  const std::vector<Case> cases = {
      {1, 1, 1, 1, 1, {1}, 2, true, true, true},        {1, 1, 2, 7, 5, {9}, 6, true, true, true},
      {2, 2, 4, 20, 12, {63}, 12, false, true, true},   {2, 1, 3, 33, 40, {64}, 0, true, true, false},
      {1, 1, 1, 64, 33, {65}, 5, true, false, true},    {1, 2, 2, 16, 24, {5, 0, 1, 70, 0, 127, 1, 0}, 20, true, true, true},
      {1, 1, 1, 128, 256, {131}, 3, false, true, true}, {3, 1, 1, 256, 17, {6}, 9, true, true, true},
      {1, 1, 1, 8, 8, {2500}, 15, true, true, true},
  };
  each_isa([&](const std::string& name) {
    for (const Rule& rule : RULES) {
      for (bool channels : {false, true})
        for (const Case& c : cases)
          for (int thread_count : thread_counts())
            if (channels || !rule.low_rank) check(rule, channels, c, thread_count);
      check_halves(rule);
      std::printf("%s, %s: %zu cases agree%s a gate of each channel\n", rule.name, name.c_str(), cases.size(),
                  rule.low_rank ? ", all with" : ", and as many with");
    }
  });
}
