// The selective scan and its backward, on the CPU and on the host twin of CUDA, against a plain loop in double and its adjoint, over
// awkward sizes, packed rows, edits, snapshots, and inputs that lie token by token or channel by channel.
#include "selective_scan.h"

#include <algorithm>
#include <array>

#include "harness.h"
#ifndef WRITESAE_CPU_ONLY
#include "cuda/tile.cuh"
#endif

using namespace writesae;
using namespace writesae::test;

namespace {

struct Case {
  int64_t B, K, V;
  std::vector<int64_t> lengths;  // packed when B == 1 and there are several
  int64_t edits;
  bool initial, skip, turned;
};

// A call with exactly sized buffers.
struct Call {
  std::vector<int64_t> offsets;
  std::vector<std::array<int64_t, 4>> index;
  std::vector<std::array<int64_t, 2>> places;
  std::vector<float> x, dt, A, B, C, D, initial, left, right, d_o, d_right, d_final, d_shots;
  std::vector<float> o, final_state, written, shots;
  std::vector<float> d_x, d_dt, d_A, d_B, d_C, d_D, d_initial, d_left, d_edit_right;
  SelectiveScanBackwardParams p = {};
};

int64_t pick(int64_t n) { return static_cast<int64_t>(generator()() % n); }

void make(const Case& c, Call& call) {
  SelectiveScanParams& p = call.p.in;
  p.B = c.B, p.K = c.K, p.V = c.V, p.N = c.B > 1 ? c.B : c.lengths.size();
  call.offsets = {0};
  for (int64_t length : c.lengths) call.offsets.push_back(call.offsets.back() + length);
  p.T = c.B > 1 ? c.lengths[0] : call.offsets.back();
  if (c.B == 1 && c.lengths.size() > 1) p.cu_seqlens = call.offsets.data();
  const int64_t rows = p.B * p.T;
  call.x = normal(rows * p.V), call.dt = normal(rows * p.V), call.A = normal(p.V * p.K), call.B = normal(rows * p.K);
  call.C = normal(rows * p.K), call.D = normal(p.V), call.initial = normal(p.N * p.K * p.V);
  for (float& y : call.dt) y = std::abs(y) * 0.3f;
  for (size_t i = 0; i < call.A.size(); i++) call.A[i] = -std::abs(call.A[i]) * (i % 11 == 3 ? 900.0f : 1.0f);
  const auto of_tokens = [&](const std::vector<float>& y) {
    return c.turned ? view(y, p.T * p.V, 1, p.T, 0) : view(y, p.T * p.V, p.V, 1, 0);
  };
  p.x = of_tokens(call.x), p.dt = of_tokens(call.dt), p.rates = view(call.A, p.K, 1, 0, 0);
  p.write = view(call.B, p.T * p.K, p.K, 1, 0), p.read = view(call.C, p.T * p.K, p.K, 1, 0);
  p.skip = c.skip ? call.D.data() : nullptr, p.initial_state = c.initial ? call.initial.data() : nullptr;
  while (static_cast<int64_t>(call.index.size()) < c.edits) {
    const int64_t n = pick(p.N), length = c.B > 1 ? p.T : c.lengths[n];
    if (length == 0) continue;
    const int64_t t = std::array<int64_t, 3>{0, length - 1, pick(length)}[pick(3)];
    call.index.push_back({n, t, 0, pick(3) + 4 * pick(2)});
    call.places.push_back({n, t});
  }
  std::stable_sort(call.index.begin(), call.index.end(), [](const auto& a, const auto& b) {
    return std::array<int64_t, 2>{a[0], a[1]} < std::array<int64_t, 2>{b[0], b[1]};
  });
  call.left = normal(c.edits * p.K), call.right = normal(c.edits * p.V);
  p.edits = {c.edits, c.edits == 0 ? nullptr : call.index[0].data(), call.left.data(), call.right.data()};
  p.P = c.edits, p.places = c.edits == 0 ? nullptr : call.places[0].data();
  call.o = poison(rows * p.V), call.written = call.o, call.final_state = poison(p.N * p.K * p.V);
  call.shots = poison(p.P * p.K * p.V);
  p.o = call.o.data(), p.final_state = call.final_state.data(), p.right = call.written.data(),
  p.snapshots = call.shots.data();

  call.d_o = normal(rows * p.V), call.d_right = normal(rows * p.V), call.d_final = normal(p.N * p.K * p.V);
  call.d_shots = normal(p.P * p.K * p.V);
  call.p.d_o = view(call.d_o, p.T * p.V, p.V, 1, 0), call.p.d_right = view(call.d_right, p.T * p.V, p.V, 1, 0);
  call.p.d_final_state = call.d_final.data(), call.p.d_snapshots = call.d_shots.data();
  call.d_x = poison(rows * p.V), call.d_dt = call.d_x, call.d_B = poison(rows * p.K), call.d_C = call.d_B;
  call.d_A = poison(p.V * p.K), call.d_D = poison(p.V), call.d_initial = poison(p.N * p.K * p.V);
  call.d_left = poison(c.edits * p.K), call.d_edit_right = poison(c.edits * p.V);
  call.p.d_x = call.d_x.data(), call.p.d_dt = call.d_dt.data(), call.p.d_write = call.d_B.data();
  call.p.d_read = call.d_C.data(), call.p.d_rates = call.d_A.data(), call.p.d_skip = call.d_D.data();
  call.p.d_initial_state = call.d_initial.data(), call.p.d_edit_left = call.d_left.data();
  call.p.d_edit_right = call.d_edit_right.data();
}

double value(const View& x, int64_t a, int64_t b, int64_t c) { return *static_cast<const float*>(x.at(a, b, c)); }

struct Expected {
  std::vector<double> o, final_state, written, shots, d_x, d_dt, d_A, d_B, d_C, d_D, d_initial, d_left, d_edit_right;
};

// The definition and its adjoint, one entry of the state after the other.
Expected plain(const Call& call) {
  const SelectiveScanParams& p = call.p.in;
  const int64_t K = p.K, V = p.V, rows = p.B * p.T, E = p.edits.count;
  Expected out;
  out.o.resize(rows * V), out.written.resize(rows * V), out.final_state.resize(p.N * K * V), out.shots.resize(p.P * K * V);
  out.d_x.resize(rows * V), out.d_dt.resize(rows * V), out.d_A.resize(V * K), out.d_B.resize(rows * K), out.d_D.resize(V);
  out.d_C.resize(rows * K), out.d_initial.resize(p.N * K * V), out.d_left.resize(E * K), out.d_edit_right.resize(E * V);
  for (int64_t n = 0; n < p.N; n++) {
    const int64_t b = p.cu_seqlens != nullptr ? 0 : n, origin = p.cu_seqlens != nullptr ? p.cu_seqlens[n] : 0;
    const int64_t length = p.cu_seqlens != nullptr ? p.cu_seqlens[n + 1] - origin : p.T;
    for (int64_t c = 0; c < V; c++) {
      const auto here = [&](int64_t e, int64_t t) { return call.index[e][0] == n && call.index[e][1] == t; };
      std::vector<bool> native(length, true), kept(length, true);
      for (int64_t e = 0; e < E; e++)
        for (int64_t t = 0; t < length; t++) {
          native[t] = native[t] && !(here(e, t) && p.edits.kind(e).removes());
          kept[t] = kept[t] && !(here(e, t) && p.edits.kind(e).removes_after());
        }
      std::vector<double> d_u(length), u(length);
      for (int64_t t = 0; t < length; t++) {
        const int64_t at = (b * p.T + origin + t) * V + c;
        const double x = value(p.x, b, origin + t, c);
        u[t] = native[t] ? value(p.dt, b, origin + t, c) * x : 0.0;
        out.written[at] = u[t];
        out.o[at] += p.skip != nullptr ? p.skip[c] * x : 0.0;
      }
      for (int64_t k = 0; k < K; k++) {
        const double A = value(p.rates, c, k, 0);
        std::vector<double> read(length), after(length + 1);
        const auto added = [&](int64_t t, bool late) {
          double sum = 0;
          for (int64_t e = 0; e < E; e++)
            if (here(e, t) && p.edits.kind(e).adds() && p.edits.kind(e).after() == late)
              sum += static_cast<double>(p.edits.left[e * K + k]) * p.edits.right[e * V + c];
          return sum;
        };
        const int64_t entry = (n * K + k) * V + c;
        after[0] = p.initial_state == nullptr ? 0.0 : p.initial_state[entry];
        for (int64_t t = 0; t < length; t++) {
          const int64_t row = b * p.T + origin + t;
          const double B = call.B[row * K + k], gate = std::exp(value(p.dt, b, origin + t, c) * A);
          read[t] = gate * after[t] + B * u[t] + added(t, false);
          out.o[row * V + c] += call.C[row * K + k] * read[t];
          after[t + 1] = read[t] - (kept[t] ? 0.0 : B * u[t]) + added(t, true);
          for (int64_t i = 0; i < p.P; i++)
            if (call.places[i][0] == n && call.places[i][1] == t) out.shots[(i * K + k) * V + c] = after[t + 1];
        }
        out.final_state[entry] = after[length];
        double l = call.d_final[entry];
        const auto edit_gradients = [&](int64_t t, bool late) {
          for (int64_t e = 0; e < E; e++) {
            if (!here(e, t) || !p.edits.kind(e).adds() || p.edits.kind(e).after() != late) continue;
            out.d_left[e * K + k] += l * p.edits.right[e * V + c];
            out.d_edit_right[e * V + c] += l * p.edits.left[e * K + k];
          }
        };
        for (int64_t t = length - 1; t >= 0; t--) {
          const int64_t row = b * p.T + origin + t;
          const double B = call.B[row * K + k], dt = value(p.dt, b, origin + t, c), d_o = call.d_o[row * V + c];
          for (int64_t i = 0; i < p.P; i++)
            if (call.places[i][0] == n && call.places[i][1] == t) l += call.d_shots[(i * K + k) * V + c];
          edit_gradients(t, true);
          const double gone = kept[t] ? 0.0 : l;
          l += call.C[row * K + k] * d_o;
          edit_gradients(t, false);
          out.d_C[row * K + k] += d_o * read[t];
          out.d_B[row * K + k] += u[t] * (l - gone);
          d_u[t] += B * (l - gone);
          l *= std::exp(dt * A);
          out.d_A[c * K + k] += dt * l * after[t];
          out.d_dt[row * V + c] += A * l * after[t];
        }
        out.d_initial[entry] = l;
      }
      for (int64_t t = 0; t < length; t++) {
        const int64_t at = (b * p.T + origin + t) * V + c;
        const double x = value(p.x, b, origin + t, c), dt = value(p.dt, b, origin + t, c);
        const double d = native[t] ? d_u[t] + call.d_right[at] : 0.0;
        out.d_dt[at] += x * d;
        out.d_x[at] = dt * d + (p.skip != nullptr ? p.skip[c] * call.d_o[at] : 0.0);
        out.d_D[c] += x * call.d_o[at];
      }
    }
  }
  return out;
}

template <class Run>
void check(const Case& c, const Run& run) {
  Call call;
  make(c, call);
  const Expected expected = plain(call);
  run(call.p);
  expect_close("o", call.o, expected.o);
  expect_close("right", call.written, expected.written);
  expect_close("final_state", call.final_state, expected.final_state);
  expect_close("snapshots", call.shots, expected.shots);
  expect_close("d_x", call.d_x, expected.d_x);
  expect_close("d_dt", call.d_dt, expected.d_dt);
  expect_close("d_A", call.d_A, expected.d_A);
  expect_close("d_B", call.d_B, expected.d_B);
  expect_close("d_C", call.d_C, expected.d_C);
  expect_close("d_D", call.d_D, expected.d_D);
  expect_close("d_initial_state", call.d_initial, expected.d_initial);
  expect_close("d_edit_left", call.d_left, expected.d_left);
  expect_close("d_edit_right", call.d_edit_right, expected.d_edit_right);
}

}  // namespace

int main() {
  const std::vector<Case> cases = {
      {1, 1, 1, {1}, 2, true, true, false},     {1, 16, 40, {33}, 6, true, true, true},
      {2, 5, 17, {63}, 12, false, true, false}, {2, 16, 130, {64}, 0, true, false, true},
      {1, 20, 33, {65}, 5, true, true, true},   {1, 16, 24, {5, 0, 1, 70, 0, 100, 1, 0}, 20, true, true, false},
      {3, 70, 9, {6}, 9, true, true, true},     {1, 16, 8, {600}, 15, true, true, false},
  };
  each_isa([&](const std::string& name) {
    for (const Case& c : cases)
      for (int count : thread_counts())
        check(c, [&](const SelectiveScanBackwardParams& p) {
          cpu::selective_scan::forward(p.in, threads(count));
          cpu::selective_scan::backward(p, threads(count));
        });
    std::printf("selective_scan, %s: %zu cases agree\n", name.c_str(), cases.size());
  });
#ifndef WRITESAE_CPU_ONLY
  for (auto schedule : {tile::twin::Schedule::forward, tile::twin::Schedule::reverse}) {
    tile::twin::settings.schedule = schedule;
    for (const Case& c : cases)
      check(c, [&](const SelectiveScanBackwardParams& p) {
        namespace kernels = cuda::selective_scan;
        std::vector<float> first = poison(kernels::forward_workspace(p.in) / 4 + 1);
        kernels::forward(p.in, first.data(), nullptr);
        std::vector<float> second = poison(kernels::backward_workspace(p) / 4 + 1);
        kernels::backward(p, second.data(), nullptr);
      });
  }
  std::printf("selective_scan, host twin: %zu cases agree in both orders\n", cases.size());
#endif
}
