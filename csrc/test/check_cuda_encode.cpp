// encode's CUDA kernels under the host twin, against a plain float64 recurrence.
#include <algorithm>
#include <functional>
#include <numeric>

#include "cuda/tile.cuh"
#include "encode.h"
#include "harness.h"

namespace {

using namespace writesae;
using cuda::EncodeMode;
using tile::twin::Schedule;

struct Case {
  const char* name;
  int64_t B = 1, T = 40, H = 1, Hl = 1, R = 1, K = 12, V = 20, F = 70, rank = 1, k = 8;
  std::vector<int64_t> heads = {};
  std::vector<int64_t> cu = {};
  bool carry = false;
  int edits = 0;
  int segment = 0;
  float decay = 0.1f;
  Element type = Element::f32;
};

void fail(const Case& c, const std::string& what) {
  std::fprintf(stderr, "check_cuda_encode, %s: %s\n", c.name, what.c_str());
  std::exit(1);
}

// A case's inputs, exactly representable in its element type, and the truth.
struct Data {
  Case c;
  EncodeParams p = {};
  std::vector<float> decay, left, right, v, w, b, carry, threshold, edit_left, edit_right, carry_out;
  std::vector<uint16_t> left16, right16;
  std::vector<int64_t> heads, edit_index;
  std::vector<double> truth, last;  // [B * T, Hs, F], [N, Hs, F]

  explicit Data(const Case& made) : c(made) {
    using test::normal;
    heads = c.heads;
    if (heads.empty())
      for (int64_t h = 0; h < c.H; h++) heads.push_back(h);
    p.B = c.B, p.T = c.T, p.Hl = c.Hl, p.H = c.H, p.Hs = heads.size(), p.R = c.R, p.K = c.K, p.V = c.V, p.F = c.F;
    p.rank = c.rank, p.N = c.cu.empty() ? c.B : c.cu.size() - 1, p.k = c.k;
    decay = normal(c.B * c.T * c.H);
    for (float& x : decay) x = -std::fabs(x) * c.decay;
    left = normal(c.B * c.T * c.Hl * c.R * c.K), right = normal(c.B * c.T * c.H * c.R * c.V);
    for (float& x : left) x += 1;  // keys that resemble each other
    v = normal(p.Hs * c.F * c.rank * c.K, 0.2f), w = normal(p.Hs * c.F * c.rank * c.V), b = normal(p.Hs * c.F);
    threshold = normal(p.Hs * c.F);
    for (float& x : threshold) x = std::fabs(x) + 1;
    if (c.carry) carry = normal(p.N * p.Hs * c.F);
    left16 = narrow(left), right16 = narrow(right);
    p.left = row_view(left, left16, c.Hl, c.K), p.right = row_view(right, right16, c.H, c.V);
    p.decay = decay.data(), p.heads = heads.data();
    p.v_enc = test::view(v, c.F * c.rank * c.K, c.rank * c.K, c.K, 1);
    p.w_enc = test::view(w, c.F * c.rank * c.V, c.rank * c.V, c.V, 1);
    p.b_enc = b.data(), p.threshold = threshold.data();
    p.carry_in = c.carry ? carry.data() : nullptr;
    p.cu_seqlens = c.cu.empty() ? nullptr : c.cu.data();
    make_edits();
    recur();
  }

  std::vector<uint16_t> narrow(std::vector<float>& x) const {
    std::vector<uint16_t> bits;
    if (c.type == Element::f32) return bits;
    for (float& value : x) {
      const uint16_t half = c.type == Element::bf16 ? tile::to_bf16(value).bits : tile::to_f16(value).bits;
      bits.push_back(half);
      value = c.type == Element::bf16 ? tile::to_float(tile::bf16{half}) : tile::to_float(tile::f16{half});
    }
    return bits;
  }
  View row_view(const std::vector<float>& x, const std::vector<uint16_t>& bits, int64_t heads_, int64_t size) const {
    View out = test::view(x, c.T * heads_ * c.R * size, heads_ * c.R * size, c.R * size, size);
    out.type = c.type;
    if (c.type != Element::f32) out.data = bits.data();
    return out;
  }

  void make_edits() {
    std::vector<std::array<int64_t, 3>> places;  // row, head, position
    for (int e = 0; e < c.edits; e++) {
      const int64_t n = test::generator()() % p.N, length = length_of(n);
      if (length == 0) continue;
      const int64_t t = e % 3 == 0 ? length - 1 : test::generator()() % length;  // many at one place
      places.push_back({n, static_cast<int64_t>(test::generator()() % c.H), t});
    }
    std::sort(places.begin(), places.end());
    for (const auto& [n, h, t] : places) edit_index.insert(edit_index.end(), {n, t, h, 0});
    edit_left = test::normal(places.size() * c.K), edit_right = test::normal(places.size() * c.V, 3);
    p.edits.count = places.size();
    p.edits.index = edit_index.data(), p.edits.left = edit_left.data(), p.edits.right = edit_right.data();
  }

  int64_t origin_of(int64_t n) const { return c.cu.empty() ? n * c.T : c.cu[n]; }
  int64_t length_of(int64_t n) const { return c.cu.empty() ? c.T : c.cu[n + 1] - c.cu[n]; }

  double increment(int64_t i, int64_t f, const float* l, const float* r) const {
    double total = 0;
    for (int64_t x = 0; x < c.rank; x++) {
      double on_left = 0, on_right = 0;
      for (int64_t j = 0; j < c.K; j++) on_left += double{l[j]} * v[((i * c.F + f) * c.rank + x) * c.K + j];
      for (int64_t j = 0; j < c.V; j++) on_right += double{r[j]} * w[((i * c.F + f) * c.rank + x) * c.V + j];
      total += on_left * on_right;
    }
    return total;
  }

  void recur() {
    truth.assign(c.B * c.T * p.Hs * c.F, NAN), last.assign(p.N * p.Hs * c.F, 0);
    for (int64_t n = 0; n < p.N; n++)
      for (int64_t i = 0; i < p.Hs; i++)
        for (int64_t f = 0; f < c.F; f++) {
          double a = c.carry ? carry[(n * p.Hs + i) * c.F + f] : 0;
          for (int64_t t = 0; t < length_of(n); t++) {
            const int64_t at = origin_of(n) + t, h = heads[i], hl = h / (c.H / c.Hl);
            a *= std::exp(double{decay[at * c.H + h]});
            for (int64_t r = 0; r < c.R; r++)
              a += increment(i, f, &left[((at * c.Hl + hl) * c.R + r) * c.K], &right[((at * c.H + h) * c.R + r) * c.V]);
            for (int64_t e = 0; e < p.edits.count; e++)
              if (edit_index[4 * e] == n && edit_index[4 * e + 1] == t && edit_index[4 * e + 2] == h)
                a += increment(i, f, &edit_left[e * c.K], &edit_right[e * c.V]);
            truth[(at * p.Hs + i) * c.F + f] = a + b[i * c.F + f];
          }
          last[(n * p.Hs + i) * c.F + f] = a;
        }
  }
};

double largest(const std::vector<double>& x) {
  double most = 1e-30;
  for (double value : x) most = std::max(most, std::fabs(value));
  return most;
}

// Runs a mode with exactly sized, poisoned scratch and outputs.
void run(Data& d, Precision precision, EncodeMode mode, const cuda::EncodeFindings& findings) {
  d.carry_out = test::poison(d.last.size());
  d.p.carry_out = d.carry_out.data();
  std::vector<tile::Vec16> scratch(cuda::encode_scratch(d.p, precision, mode) / 16);
  if (!scratch.empty()) std::memset(scratch.data(), 0xff, scratch.size() * 16);
  cuda::encode(d.p, precision, mode, findings, scratch.data(), nullptr);
}

void check(const Case& c, Precision precision, double tolerance) {
  cuda::encode_force_segment(c.segment);
  Data d(c);
  const int64_t places = c.B * c.T * d.p.Hs;
  const double scale = largest(d.truth) * tolerance;
  const auto close = [&](const char* what, double got, double want) {
    if (!(std::fabs(got - want) <= scale))
      fail(c, std::string(what) + ": got " + std::to_string(got) + ", expected " + std::to_string(want) + " within " +
                  std::to_string(scale));
  };
  std::vector<float> first_values, first_carry;
  std::vector<int64_t> first_indices;
  for (Schedule schedule : {Schedule::forward, Schedule::reverse}) {
    tile::twin::settings.schedule = schedule;
    // top k
    std::vector<float> values = test::poison(places * c.k);
    std::vector<int64_t> indices(places * c.k, -1);
    d.p.values = values.data(), d.p.indices = indices.data();
    run(d, precision, EncodeMode::topk, {});
    for (int64_t at = 0; at < places; at++) {
      std::vector<double> sorted(d.truth.begin() + at * c.F, d.truth.begin() + (at + 1) * c.F);
      const std::vector<double> row = sorted;
      std::sort(sorted.begin(), sorted.end(), std::greater<double>());
      std::vector<bool> seen(c.F);
      for (int64_t i = 0; i < c.k; i++) {
        const int64_t f = indices[at * c.k + i];
        if (f < 0 || f >= c.F || seen[f]) fail(c, "an index is out of range or repeated: " + std::to_string(f));
        seen[f] = true;
        close("a value", values[at * c.k + i], std::max(sorted[i], 0.0));
        close("a chosen activation", std::max(row[f], 0.0), std::max(sorted[i], 0.0));
        if (i > 0 && values[at * c.k + i] > values[at * c.k + i - 1]) fail(c, "values do not descend");
      }
    }
    for (size_t i = 0; i < d.last.size(); i++) close("the carry", d.carry_out[i], d.last[i]);
    // chosen features
    const int64_t m = 5;
    std::vector<int64_t> at(places * m);
    for (int64_t& f : at) f = test::generator()() % c.F;
    at[0] = c.F;  // out of range: NaN, and nothing else
    std::vector<float> chosen = test::poison(places * m);
    EncodeParams whole = d.p;
    d.p.k = 0, d.p.at = at.data(), d.p.m = m, d.p.values = chosen.data(), d.p.b_enc = nullptr;
    run(d, precision, EncodeMode::at, {});
    if (!std::isnan(chosen[0])) fail(c, "an index out of range gives a number");
    for (int64_t i = 1; i < places * m; i++)
      close("a chosen feature", chosen[i] + d.b[i / m % d.p.Hs * c.F + at[i]], d.truth[i / m * c.F + at[i]]);
    // threshold
    d.p = whole;
    d.p.k = 0;
    std::vector<int64_t> counts(places, -1), offsets(places + 1, -1);
    run(d, precision, EncodeMode::count, {counts.data(), nullptr, nullptr, nullptr});
    cuda::encode_offsets(counts.data(), places, offsets.data(), nullptr);
    if (offsets[0] != 0 || offsets[places] != std::accumulate(counts.begin(), counts.end(), int64_t{0})) fail(c, "offsets");
    std::vector<float> found = test::poison(offsets[places]);
    std::vector<int64_t> where(offsets[places], -1);
    run(d, precision, EncodeMode::fill, {nullptr, offsets.data(), found.data(), where.data()});
    for (int64_t i = 0; i < places; i++) {
      int64_t at = offsets[i];
      for (int64_t f = 0; f < c.F; f++) {
        const double over = d.truth[i * c.F + f] - d.threshold[i % d.p.Hs * c.F + f];
        const bool here = at < offsets[i + 1] && where[at] == f;
        if (over > scale && !here) fail(c, "a feature above its threshold is missing");
        if (over < -scale && here) fail(c, "a feature below its threshold is there");
        if (here) close("a found value", found[at++], d.truth[i * c.F + f]);
      }
      if (at != offsets[i + 1]) fail(c, "findings out of order");
    }
    d.p = whole;
    if (schedule == Schedule::forward) {
      first_values = values, first_indices = indices, first_carry = d.carry_out;
    } else if (values != first_values || indices != first_indices || d.carry_out != first_carry) {
      fail(c, "the result depends on the schedule");
    }
  }
  tile::twin::settings.schedule = Schedule::forward;
  cuda::encode_force_segment(0);
}

// Every atom several times, or all zero; a k that everything reaches: ties go to the lowest index. Rising activations, so
// that every feature passes the bar of those before it and the buffer overflows as often as it can. NaN first, infinity next.
void check_order(Precision precision) {
  Case c = {"order"};
  c.T = 35, c.F = 400, c.k = 32;
  Data d(c);
  const int64_t places = c.T;
  std::vector<float> values(places * c.k);
  std::vector<int64_t> indices(places * c.k);
  d.p.values = values.data(), d.p.indices = indices.data();
  const auto expect = [&](const char* what, const std::function<int64_t(int64_t)>& want) {
    for (Schedule schedule : {Schedule::forward, Schedule::reverse}) {
      tile::twin::settings.schedule = schedule;
      run(d, precision, EncodeMode::topk, {});
      for (int64_t at = 0; at < places; at++)
        for (int64_t i = 0; i < c.k; i++)
          if (indices[at * c.k + i] != want(i))
            fail(c, std::string(what) + ": place " + std::to_string(i) + " has " + std::to_string(indices[at * c.k + i]) +
                        ", expected " + std::to_string(want(i)));
    }
    tile::twin::settings.schedule = Schedule::forward;
  };
  std::fill(d.v.begin(), d.v.end(), 0.0f);
  std::fill(d.b.begin(), d.b.end(), 0.0f);
  expect("all equal", [](int64_t i) { return i; });
  for (int64_t f = 0; f < c.F; f++) d.b[f] = static_cast<float>(f / 4);
  expect("rising in fours", [&](int64_t i) { return c.F - 4 - i / 4 * 4 + i % 4; });
  for (int64_t f = 0; f < c.F; f++) d.b[f] = static_cast<float>(-f);
  expect("falling", [](int64_t i) { return i; });
  for (float value : values)
    if (value != 0) fail(c, "a negative activation is kept");
  d.b[7] = INFINITY, d.b[390] = NAN, d.b[391] = -NAN, d.b[3] = -INFINITY;
  expect("NaN", [](int64_t i) -> int64_t { return i < 2 ? 390 + i : i == 2 ? 7 : i < 6 ? i - 3 : i < 9 ? i - 2 : i - 1; });
  if (!std::isnan(values[0]) || values[2] != INFINITY) fail(c, "NaN or infinity is lost");
  std::fill(d.b.begin(), d.b.end(), -INFINITY);
  expect("minus infinity", [](int64_t i) { return i; });
  std::fill(d.b.begin(), d.b.end(), -NAN);
  expect("all NaN", [](int64_t i) { return i; });
}

// Memory beside the outputs, where it matters: 16 heads x 32,768 tokens x 2,048 features, packed or not.
void check_memory() {
  EncodeParams p = {};
  p.B = p.N = 1, p.T = 32768, p.H = p.Hs = p.Hl = 16, p.R = p.rank = 1, p.K = p.V = 128, p.F = 2048, p.k = 32;
  const int64_t offsets[] = {0, 32768};
  for (const int64_t* cu : {static_cast<const int64_t*>(nullptr), offsets})
    for (Precision precision : {Precision::fp32, Precision::tf32, Precision::bf16}) {
      p.cu_seqlens = cu;
      const double share = static_cast<double>(cuda::encode_scratch(p, precision, EncodeMode::topk)) /
                           (4.0 * static_cast<double>(p.B * p.T * p.Hs * p.F));
      std::printf("scratch: %.2f %% of the pre-activations\n", 100 * share);
      if (share > 0.01) fail({"memory"}, "scratch takes more than 1 % of the pre-activations");
    }
}

}  // namespace

// With an argument, from 0 to 2: which precision the first case has.
int main(int count, char** arguments) {
  const int turn = count > 1 ? std::atoi(arguments[1]) : 0;
  std::vector<Case> cases;
  for (int64_t T : {1, 31, 128, 129}) cases.push_back({"length", 2, T, 2, 2});
  cases.push_back({"grouped", 1, 130, 4, 2, 1, 20, 9, 48, 1, 7});
  cases.push_back({"heads", 1, 70, 4, 2, 1, 8, 16, 64, 1, 32, {3, 0, 3}});
  cases.push_back({"packed", 1, 127, 2, 1, 1, 7, 9, 33, 1, 4, {}, {0, 0, 1, 64, 64, 127}, true, 40});
  cases.push_back({"two writes", 2, 50, 2, 1, 2, 5, 6, 20, 1, 3});
  cases.push_back({"rank 2", 1, 70, 2, 2, 2, 40, 12, 70, 2, 3});
  cases.push_back({"edits", 2, 70, 3, 3, 1, 6, 5, 20, 1, 4, {}, {}, true, 60});
  cases.push_back({"segments", 2, 150, 2, 1, 1, 21, 36, 40, 1, 5, {}, {}, true, 30, 64});
  cases.push_back({"packed segments", 1, 190, 2, 1, 2, 33, 9, 40, 1, 5, {}, {0, 0, 1, 60, 60, 190}, true, 30, 50});
  cases.push_back({"strong decay", 1, 140, 1, 1, 1, 12, 12, 40, 1, 5, {}, {}, true, 0, 40, 20.0f});
  cases.push_back({"one", 1, 33, 1, 1, 1, 64, 50, 300, 1, 1});
  cases.push_back({"many features", 1, 20, 1, 1, 1, 4, 4, 2048, 1, 32});
  cases.push_back({"k is F", 1, 20, 1, 1, 1, 8, 4, 61, 1, 61});
  for (int64_t k : {128, 220, 400}) cases.push_back({"large k", 1, 12, 1, 1, 1, 4, 4, 900, 1, k});
  cases.push_back({"wide", 1, 20, 1, 1, 1, 128, 65, 40, 1, 4});
  cases.push_back({"widest", 1, 20, 1, 1, 1, 130, 256, 40, 1, 4, {}, {}, false, 0, 8});
  cases.push_back({"decode", 9, 1, 2, 1, 2, 37, 21, 130, 2, 9, {}, {}, true, 12});
  Case half = {"half", 1, 40, 2, 1, 1, 21, 18, 40, 1, 4};
  for (Element type : {Element::bf16, Element::f16}) half.type = type, cases.push_back(half);
  // Every case with one precision, each in turn; those of the other two differ in the products alone.
  const std::pair<Precision, double> precisions[] = {
      {Precision::fp32, 2e-6}, {Precision::tf32, 2e-3}, {Precision::bf16, 2e-2}};
  for (size_t i = 0; i < cases.size(); i++) {
    const auto& [precision, tolerance] = precisions[(i + turn) % 3];
    check(cases[i], precision, tolerance);
  }
  check_memory();
  for (Precision precision : {Precision::fp32, Precision::tf32, Precision::bf16}) check_order(precision);
  std::printf("check_cuda_encode: all hold\n");
  return 0;
}
