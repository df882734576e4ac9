// Every write rule's backward, the CPU's, with a gate of the head and one of each channel, and the CUDA kernels under the host
// twin, against a plain reverse loop in double, over awkward sizes, packed rows, edits and snapshots.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "dplr.h"
#include "gated_delta_rule.h"
#include "scan_plain.h"
#include "ssd.h"
#ifndef WRITESAE_CPU_ONLY
#include "cuda/tile.cuh"
#define ON_CUDA(rule) cuda::rule::backward_workspace, cuda::rule::backward
#else
#define ON_CUDA(rule) nullptr, nullptr
#endif

using namespace writesae;
using namespace writesae::test;

namespace {

struct Rule {
  const char* name;
  bool reads, low_rank;
  decltype(&cpu::gated_delta_rule::backward) on_cpu;
  decltype(&cuda::gated_delta_rule::backward_workspace) workspace;
  decltype(&cuda::gated_delta_rule::backward) on_cuda;  // null where there is none
};

const Rule RULES[] = {
    {"gated_delta_rule", true, false, cpu::gated_delta_rule::backward, ON_CUDA(gated_delta_rule)},
    {"ssd", false, false, cpu::ssd::backward, ON_CUDA(ssd)},
    {"dplr", false, false, cpu::dplr::backward, nullptr, nullptr},
    {"dplr with an erase", false, true, cpu::dplr::backward, nullptr, nullptr},
};

struct Case {
  int64_t B, Hk, H, K, V;
  std::vector<int64_t> lengths;  // packed when B == 1 and there are several
  int64_t edits;
  bool initial, outputs, l2norm;  // outputs: gradient comes from all outputs, not from o alone
};

struct Gradients {
  std::vector<double> q, k, v, g, beta, a, b, initial, left, right;
};

double value_or_zero(const View& x, int64_t a, int64_t b, int64_t c, int64_t d) {
  return x.data == nullptr ? 0.0 : value(x, a, b, c, d);
}

// Forward and reverse, token by token, every state kept. Fills `right` (the increments) and `erased` on the way.
Gradients plain(const ScanBackwardParams& p, const Sequences& sequences, bool reads, std::vector<float>& right,
                std::vector<float>& erased) {
  const ScanParams& in = p.in;
  const int64_t K = in.K, V = in.V, T = in.T, H = in.H, Hk = in.Hk, E = in.edits.count;
  Gradients out;
  out.q.assign(in.B * T * Hk * K, 0), out.k = out.q, out.v.assign(in.B * T * H * V, 0);
  out.g.assign(in.B * T * H * (in.channel_gate ? K : 1), 0), out.beta.assign(in.B * T * H, 0),
      out.initial.assign(in.N * H * K * V, 0);
  out.left.assign(E * K, 0), out.right.assign(E * V, 0);
  const bool erases = in.a.data != nullptr;
  if (erases) out.a.assign(in.B * T * H * K, 0), out.b = out.a;
  if (p.d_left != nullptr) std::copy_n(p.d_left, out.k.size(), out.k.begin());
  const auto unit = [&](const View& x, int64_t b, int64_t t, int64_t h, double scale) {
    std::vector<double> row(K + 1);
    double square = 1e-6;
    for (int64_t i = 0; i < K; i++) row[i] = value(x, b, t, h, i), square += row[i] * row[i];
    row[K] = in.use_qk_l2norm ? 1 / std::sqrt(square) : 1.0;
    for (int64_t i = 0; i < K; i++) row[i] *= row[K] * scale;
    return row;
  };
  const auto edit_at = [&](int64_t e, int64_t n, int64_t t, int64_t h) {
    const int64_t* x = in.edits.index + 4 * e;
    return x[0] == n && x[1] == t && x[2] == h;
  };
  const auto gate_of = [&](int64_t b, int64_t t, int64_t h, int64_t i) {
    return std::exp(value(in.g, b, t, h, in.channel_gate ? i : 0));
  };
  for (int64_t n = 0; n < in.N; n++)
    for (int64_t h = 0; h < H; h++) {
      const int64_t b = sequences[n][0], origin = sequences[n][1], length = sequences[n][2], hk = h / (H / Hk);
      std::vector<double> S(K * V, 0.0), D(K * V, 0.0), dk(K), dq(K), du(V), dw(V), rest(V);
      if (in.initial_state != nullptr) std::copy_n(in.initial_state + (n * H + h) * K * V, K * V, S.begin());
      std::vector<std::vector<double>> before(length), decayed(length), read_of(length), u(length, std::vector<double>(V)),
          r = u;
      std::vector<bool> native(length, true), kept(length, true);
      for (int64_t t = 0; t < length; t++) {
        const auto k = unit(in.k, b, origin + t, hk, 1);
        for (int64_t e = 0; e < E; e++)
          if (edit_at(e, n, t, h)) {
            native[t] = native[t] && !in.edits.kind(e).removes();
            kept[t] = kept[t] && !in.edits.kind(e).removes_after();
          }
        before[t] = S;
        for (int64_t i = 0; i < K * V; i++) S[i] *= gate_of(b, origin + t, h, i / V);
        decayed[t] = S;
        for (int64_t c = 0; c < V && erases; c++) {
          for (int64_t i = 0; i < K; i++) r[t][c] += before[t][i * V + c] * value(in.a, b, origin + t, h, i);
          for (int64_t i = 0; i < K; i++) S[i * V + c] += value(in.b, b, origin + t, h, i) * r[t][c];
          erased[((b * T + origin + t) * H + h) * V + c] = r[t][c];
        }
        for (int64_t c = 0; c < V; c++) {
          double read = 0;
          for (int64_t i = 0; i < K && reads; i++) read += S[i * V + c] * k[i];
          u[t][c] = native[t] ? value(in.beta, b, origin + t, h) * (value(in.v, b, origin + t, h, c) - read) : 0.0;
          right[((b * T + origin + t) * H + h) * V + c] = u[t][c];
          for (int64_t i = 0; i < K; i++) S[i * V + c] += k[i] * u[t][c];
        }
        const auto add = [&](bool late) {
          for (int64_t e = 0; e < E; e++)
            if (edit_at(e, n, t, h) && in.edits.kind(e).adds() && in.edits.kind(e).after() == late)
              for (int64_t i = 0; i < K * V; i++)
                S[i] += static_cast<double>(in.edits.left[e * K + i / V]) * in.edits.right[e * V + i % V];
        };
        add(false);
        read_of[t] = S;
        for (int64_t i = 0; i < K * V && !kept[t]; i++) S[i] -= k[i / V] * u[t][i % V];
        add(true);
      }
      if (p.d_final_state != nullptr) std::copy_n(p.d_final_state + (n * H + h) * K * V, K * V, D.begin());
      for (int64_t t = length - 1; t >= 0; t--) {
        const auto k = unit(in.k, b, origin + t, hk, 1), q = unit(in.q, b, origin + t, hk, in.scale);
        const double beta = value(in.beta, b, origin + t, h);
        for (int64_t i = 0; i < in.P && p.d_snapshots != nullptr; i++)
          if (in.places[2 * i] == n && in.places[2 * i + 1] == t)
            for (int64_t x = 0; x < K * V; x++) D[x] += p.d_snapshots[(i * H + h) * K * V + x];
        const auto of_edits = [&](bool late) {
          for (int64_t e = 0; e < E; e++)
            if (edit_at(e, n, t, h) && in.edits.kind(e).adds() && in.edits.kind(e).after() == late)
              for (int64_t x = 0; x < K * V; x++) {
                out.left[e * K + x / V] += D[x] * in.edits.right[e * V + x % V];
                out.right[e * V + x % V] += D[x] * in.edits.left[e * K + x / V];
              }
        };
        of_edits(true);
        const std::vector<double> later = D;  // of a write that did not stay nothing reaches that
        std::fill(dk.begin(), dk.end(), 0.0), std::fill(dq.begin(), dq.end(), 0.0);
        for (int64_t i = 0; i < K; i++)
          for (int64_t c = 0; c < V; c++) {
            const double d_o = value_or_zero(p.d_o, b, origin + t, h, c);
            dq[i] += read_of[t][i * V + c] * d_o;
            D[i * V + c] += q[i] * d_o;
          }
        of_edits(false);
        const int64_t at = (b * T + origin + t) * H + h;
        for (int64_t c = 0; c < V; c++) {
          double read = 0;
          du[c] = value_or_zero(p.d_right, b, origin + t, h, c);
          for (int64_t i = 0; i < K; i++) {
            read += reads ? decayed[t][i * V + c] * k[i] : 0.0;
            const double on_write = D[i * V + c] - (kept[t] ? 0.0 : later[i * V + c]);
            du[c] += on_write * k[i];
            dk[i] += on_write * u[t][c];
          }
          if (!native[t]) du[c] = 0;
          dw[c] = beta * du[c], out.v[at * V + c] = dw[c];
          out.beta[at] += du[c] * (value(in.v, b, origin + t, h, c) - read);
        }
        for (int64_t i = 0; i < K; i++)
          for (int64_t c = 0; c < V; c++) {
            dk[i] -= reads ? decayed[t][i * V + c] * dw[c] : 0.0;
            D[i * V + c] -= reads ? k[i] * dw[c] : 0.0;
            out.g[in.channel_gate ? at * K + i : at] += decayed[t][i * V + c] * D[i * V + c];
          }
        std::vector<double> dr(V);
        for (int64_t c = 0; c < V && erases; c++) {
          dr[c] = value_or_zero(p.d_erased, b, origin + t, h, c);
          for (int64_t i = 0; i < K; i++) {
            dr[c] += D[i * V + c] * value(in.b, b, origin + t, h, i);
            out.b[at * K + i] += D[i * V + c] * r[t][c];
          }
        }
        for (int64_t i = 0; i < K; i++)
          for (int64_t c = 0; c < V; c++) {
            D[i * V + c] *= gate_of(b, origin + t, h, i);
            if (erases) D[i * V + c] += value(in.a, b, origin + t, h, i) * dr[c];
            if (erases) out.a[at * K + i] += before[t][i * V + c] * dr[c];
          }
        const int64_t row = ((b * T + origin + t) * Hk + hk) * K;
        for (int64_t i = 0; i < K; i++) out.q[row + i] += dq[i], out.k[row + i] += dk[i];
      }
      std::copy(D.begin(), D.end(), out.initial.begin() + (n * H + h) * K * V);
    }
  // Through scale and normalisation: y = x r, dx = r (dy - y (y . dy)).
  for (int64_t row = 0; row < in.B * T * Hk; row++)
    for (auto* d : {&out.q, &out.k}) {
      const double scale = d == &out.q ? in.scale : 1.0f;
      const auto y = unit(d == &out.q ? in.q : in.k, row / (T * Hk), row / Hk % T, row % Hk, 1);
      double along = 0;
      for (int64_t i = 0; i < K; i++) along += y[i] * (*d)[row * K + i];
      for (int64_t i = 0; i < K; i++)
        (*d)[row * K + i] = scale * y[K] * ((*d)[row * K + i] - (in.use_qk_l2norm ? along * y[i] : 0.0));
    }
  return out;
}

// threads: of the CPU's kernels; 0 for the CUDA kernels.
void check(const Rule& rule, bool channels, const Case& c, int thread_count) {
  ScanBackwardParams p = {};
  ScanParams& in = p.in;
  in.Hk = c.Hk, in.H = c.H, in.K = c.K, in.V = c.V;
  std::vector<int64_t> offsets;
  const Sequences sequences = lay_sequences(in, c.B, c.lengths, offsets);

  const int64_t wide = 2 * c.Hk * c.K + c.H * c.V;
  const auto fused = normal(c.B * in.T * wide, c.l2norm ? 1.0f : 0.15f);
  in.q = view(fused, in.T * wide, wide, c.K, 1), in.k = in.q, in.v = view(fused, in.T * wide, wide, c.V, 1);
  in.k.data = fused.data() + c.Hk * c.K, in.v.data = fused.data() + 2 * c.Hk * c.K;
  auto beta = normal(c.B * in.T * c.H);
  const auto g = gates(in, channels, beta);
  in.beta = view(beta, in.T * c.H, c.H, 1, 0);
  const auto erase = rule.low_rank ? std::make_unique<Erase>(in) : nullptr;
  in.scale = 0.3f, in.use_qk_l2norm = c.l2norm;
  const int64_t states = in.N * c.H * c.K * c.V, rows = c.B * in.T * c.H * c.V;
  const auto initial = normal(states);
  in.initial_state = c.initial ? initial.data() : nullptr;

  const Picked edits = pick_edits(in, sequences, c.edits);
  edits.give(in);

  const auto d_o = normal(rows), d_right = normal(rows), d_left = normal(c.B * in.T * c.Hk * c.K);
  const auto d_erased = normal(rows), d_final = normal(states), d_shots = normal(in.P * c.H * c.K * c.V);
  p.d_o = view(d_o, in.T * c.H * c.V, c.H * c.V, c.V, 1);
  if (c.outputs) {
    p.d_right = view(d_right, in.T * c.H * c.V, c.H * c.V, c.V, 1), p.d_left = d_left.data();
    if (rule.low_rank) p.d_erased = view(d_erased, in.T * c.H * c.V, c.H * c.V, c.V, 1);
    p.d_final_state = d_final.data(), p.d_snapshots = d_shots.data();
  }
  auto right = poison(rows), erased = right;
  const Gradients expected = plain(p, sequences, rule.reads, right, erased);
  p.right = view(right, in.T * c.H * c.V, c.H * c.V, c.V, 1);
  if (rule.low_rank) p.erased = view(erased, in.T * c.H * c.V, c.H * c.V, c.V, 1);
  auto q = poison(d_left.size()), k = q, v = poison(rows), dg = poison(g.size()), db = poison(beta.size()),
       da = poison(expected.a.size()), d_b = da, start = poison(states);
  auto left = poison(edits.left.size()), added = poison(edits.right.size());
  p.d_q = q.data(), p.d_k = k.data(), p.d_v = v.data(), p.d_g = dg.data(), p.d_beta = db.data();
  if (rule.low_rank) p.d_a = da.data(), p.d_b = d_b.data();
  p.d_initial_state = start.data(), p.d_edit_left = left.data(), p.d_edit_right = added.data();
  if (thread_count > 0) {
    rule.on_cpu(p, threads(thread_count));
  } else {
    // Exactly as many bytes as asked for, full of NaN.
    const int64_t bytes = rule.workspace(p);
    auto* workspace = static_cast<char*>(std::aligned_alloc(256, bytes));
    std::memset(workspace, 0xff, bytes);
    rule.on_cuda(p, workspace, nullptr);
    std::free(workspace);
  }
  expect_close("d_q", q, expected.q);
  expect_close("d_k", k, expected.k);
  expect_close("d_v", v, expected.v);
  expect_close("d_g", dg, expected.g);
  expect_close("d_beta", db, expected.beta);
  expect_close("d_a", da, expected.a);
  expect_close("d_b", d_b, expected.b);
  expect_close("d_initial_state", start, expected.initial);
  expect_close("d_edit_left", left, expected.left);
  expect_close("d_edit_right", added, expected.right);
}

}  // namespace

int main() {
  const std::vector<Case> cases = {
      {1, 1, 1, 1, 1, {1}, 2, true, true, false},      {1, 1, 2, 7, 5, {9}, 6, true, true, true},
      {2, 2, 4, 20, 12, {63}, 12, false, false, true}, {2, 1, 3, 33, 40, {64}, 0, true, true, false},
      {1, 1, 1, 64, 33, {65}, 5, true, false, true},   {1, 2, 2, 16, 24, {5, 0, 1, 70, 0, 127, 1, 0}, 20, true, true, true},
      {1, 1, 1, 40, 130, {131}, 3, false, true, true}, {3, 1, 1, 130, 17, {6}, 9, true, true, true},
      {1, 2, 8, 8, 8, {1100}, 15, true, true, true},
  };
  each_isa([&](const std::string& name) {
    for (const Rule& rule : RULES) {
      for (bool channels : {false, true})
        for (const Case& c : cases)
          for (int thread_count : thread_counts())
            if (channels || !rule.low_rank) check(rule, channels, c, thread_count);
      std::printf("%s_backward, %s: %zu cases agree%s a gate of each channel\n", rule.name, name.c_str(), cases.size(),
                  rule.low_rank ? ", all with" : ", and as many with");
    }
  });
#ifndef WRITESAE_CPU_ONLY
  for (const Rule& rule : RULES) {
    if (rule.on_cuda == nullptr) continue;
    for (const auto schedule : {tile::twin::Schedule::forward, tile::twin::Schedule::reverse}) {
      tile::twin::settings.schedule = schedule;
      for (const Case& c : cases) check(rule, false, c, 0);
    }
    std::printf("%s_backward, CUDA kernels under the host twin: %zu cases agree\n", rule.name, cases.size());
  }
#endif
}
