// A scan by its definition (scan.h), token by token in double: what the C++ checks of its kernels compare with.
#pragma once

#include "scan.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "harness.h"

namespace writesae::test {

// Of each sequence: batch row, first token, length.
using Sequences = std::vector<std::array<int64_t, 3>>;

// B rows of lengths[0] tokens, or one row of all of them, packed where there are several. `offsets` must outlive p.
inline Sequences lay_sequences(ScanParams& p, int64_t B, const std::vector<int64_t>& lengths,
                               std::vector<int64_t>& offsets) {
  p.B = B, p.N = B > 1 ? B : lengths.size();
  offsets = {0};
  for (int64_t length : lengths) offsets.push_back(offsets.back() + length);
  p.T = B > 1 ? lengths[0] : offsets.back();
  if (B == 1 && lengths.size() > 1) p.cu_seqlens = offsets.data();
  Sequences sequences;
  for (int64_t n = 0; n < p.N; n++)
    sequences.push_back(B > 1 ? std::array<int64_t, 3>{n, 0, p.T} : std::array<int64_t, 3>{0, offsets[n], lengths[n]});
  return sequences;
}

inline int64_t pick(int64_t n) { return static_cast<int64_t>(generator()() % n); }

// A place of some length: the first, the last, or any.
inline int64_t pick_position(int64_t length) { return std::array<int64_t, 3>{0, length - 1, pick(length)}[pick(3)]; }

// Edits of all kinds at random places, sorted, and a snapshot at each.
struct Picked {
  std::vector<std::array<int64_t, 4>> index;
  std::vector<std::array<int64_t, 2>> places;
  std::vector<float> left, right;

  // Gives them to a call that they outlive.
  void give(ScanParams& p) const {
    const int64_t count = index.size();
    p.edits = {count, index.empty() ? nullptr : index[0].data(), left.data(), right.data()};
    p.P = places.size(), p.places = places.empty() ? nullptr : places[0].data();
  }
};

inline Picked pick_edits(const ScanParams& p, const Sequences& sequences, int64_t count, float left_scale = 1,
                         int64_t (*position)(int64_t) = pick_position) {
  Picked out;
  while (static_cast<int64_t>(out.index.size()) < count) {
    const int64_t n = pick(p.N), length = sequences[n][2];
    if (length == 0) continue;
    const int64_t t = position(length);
    out.index.push_back({n, t, pick(p.H), pick(3) + 4 * pick(2)});
    out.places.push_back({n, t});
  }
  std::stable_sort(out.index.begin(), out.index.end(), [](const auto& x, const auto& y) {
    return std::array<int64_t, 3>{x[0], x[2], x[1]} < std::array<int64_t, 3>{y[0], y[2], y[1]};
  });
  out.left = normal(count * p.K, left_scale), out.right = normal(count * p.V);
  return out;
}

inline double value(const View& x, int64_t a, int64_t b, int64_t c, int64_t d = 0) {
  const void* at = x.at(a, b, c, d);
  if (x.type == Element::f32) return *static_cast<const float*>(at);
  const uint16_t bits = *static_cast<const uint16_t*>(at);
  if (x.type == Element::bf16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float y;
    std::memcpy(&y, &wide, 4);
    return y;
  }
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;  // finite numbers only
  const double y = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(fraction + 1024, exponent - 25);
  return bits & 0x8000 ? -y : y;
}

// beta in (0, 1) from normal numbers, and weak gates from the same; of channels, some strong and some closed as well. Sets
// p.g to what it returns.
inline std::vector<float> gates(ScanParams& p, bool channels, std::vector<float>& beta) {
  std::vector<float> g = channels ? normal(beta.size() * p.K) : beta;
  for (size_t i = 0; i < g.size(); i++) {
    g[i] = -0.2f * std::abs(g[i]);
    if (channels && i % 7 == 3) g[i] *= 40;
    if (channels && i % 59 == 5) g[i] = -std::numeric_limits<float>::infinity();
  }
  for (float& x : beta) x = 1 / (1 + std::exp(-x));
  const int64_t size = channels ? p.K : 1;
  p.channel_gate = channels, p.g = view(g, p.T * p.H * size, p.H * size, size, channels ? 1 : 0);
  return g;
}

// a and b of a low-rank erase as RWKV-7 has them, nearly: what a finds is halved, and a little goes elsewhere. Sets p.a and
// p.b to what it holds.
struct Erase {
  std::vector<float> a, b;

  explicit Erase(ScanParams& p) : a(normal(p.B * p.T * p.H * p.K)), b(a.size()) {
    const auto other = normal(a.size(), 0.1f / std::sqrt(static_cast<float>(p.K)));
    for (int64_t row = 0; row < p.B * p.T * p.H; row++) {
      float* const x = a.data() + row * p.K;
      float square = 0;
      for (int64_t i = 0; i < p.K; i++) square += x[i] * x[i];
      for (int64_t i = 0; i < p.K; i++) x[i] /= std::sqrt(square), b[row * p.K + i] = other[row * p.K + i] - 0.5f * x[i];
    }
    p.a = view(a, p.T * p.H * p.K, p.H * p.K, p.K, 1), p.b = p.a, p.b.data = b.data();
  }
};

struct Expected {
  std::vector<double> o, final_state, left, right, erased, snapshots;
};

// The definition, token by token. `reads`: of a delta rule, which erases what its key finds.
inline Expected plain(const ScanParams& p, const std::vector<std::array<int64_t, 3>>& sequences, bool reads = true) {
  const int64_t K = p.K, V = p.V;
  Expected out;
  out.o.resize(p.B * p.T * p.H * V), out.right.resize(p.B * p.T * p.H * V), out.left.resize(p.B * p.T * p.Hk * K);
  if (p.a.data != nullptr) out.erased.resize(out.right.size());
  out.final_state.resize(p.N * p.H * K * V), out.snapshots.resize(p.P * p.H * K * V);
  for (int64_t n = 0; n < p.N; n++)
    for (int64_t h = 0; h < p.H; h++) {
      const int64_t b = sequences[n][0], origin = sequences[n][1], hk = h / (p.H / p.Hk);
      std::vector<double> S(K * V, 0.0), k(K), q(K), u(V);
      if (p.initial_state != nullptr) std::copy_n(p.initial_state + (n * p.H + h) * K * V, K * V, S.begin());
      for (int64_t t = 0; t < sequences[n][2]; t++) {
        const int64_t at = origin + t;
        double kk = 1e-6, qq = 1e-6;
        for (int64_t i = 0; i < K; i++) {
          k[i] = value(p.k, b, at, hk, i), q[i] = value(p.q, b, at, hk, i);
          kk += k[i] * k[i], qq += q[i] * q[i];
        }
        for (int64_t i = 0; i < K; i++) {
          if (p.use_qk_l2norm) k[i] /= std::sqrt(kk), q[i] /= std::sqrt(qq);
          q[i] *= p.scale;
          out.left[((b * p.T + at) * p.Hk + hk) * K + i] = k[i];
        }
        bool native = true, kept = true;
        const auto here = [&](int64_t e) {
          const int64_t* x = p.edits.index + 4 * e;
          return x[0] == n && x[1] == t && x[2] == h;
        };
        for (int64_t e = 0; e < p.edits.count; e++) {
          native = native && !(here(e) && p.edits.kind(e).removes());
          kept = kept && !(here(e) && p.edits.kind(e).removes_after());
        }
        const auto add = [&](bool after) {
          for (int64_t e = 0; e < p.edits.count; e++)
            if (here(e) && p.edits.kind(e).adds() && p.edits.kind(e).after() == after)
              for (int64_t i = 0; i < K; i++)
                for (int64_t c = 0; c < V; c++)
                  S[i * V + c] += static_cast<double>(p.edits.left[e * K + i]) * p.edits.right[e * V + c];
        };
        for (int64_t c = 0; c < V; c++) {
          double read = 0, erased = 0;
          for (int64_t i = 0; i < K && p.a.data != nullptr; i++) erased += S[i * V + c] * value(p.a, b, at, h, i);
          if (p.a.data != nullptr) out.erased[((b * p.T + at) * p.H + h) * V + c] = erased;
          for (int64_t i = 0; i < K; i++) {
            S[i * V + c] *= std::exp(value(p.g, b, at, h, p.channel_gate ? i : 0));
            if (p.a.data != nullptr) S[i * V + c] += value(p.b, b, at, h, i) * erased;
            read += reads ? S[i * V + c] * k[i] : 0.0;
          }
          u[c] = native ? value(p.beta, b, at, h) * (value(p.v, b, at, h, c) - read) : 0.0;
          for (int64_t i = 0; i < K; i++) S[i * V + c] += k[i] * u[c];
        }
        add(false);
        for (int64_t c = 0; c < V; c++) {
          double sum = 0;
          for (int64_t i = 0; i < K; i++) sum += S[i * V + c] * q[i];
          out.o[((b * p.T + at) * p.H + h) * V + c] = sum;
          out.right[((b * p.T + at) * p.H + h) * V + c] = u[c];
          for (int64_t i = 0; i < K && !kept; i++) S[i * V + c] -= k[i] * u[c];
        }
        add(true);
        for (int64_t i = 0; i < p.P; i++)
          if (p.places[2 * i] == n && p.places[2 * i + 1] == t)
            std::copy(S.begin(), S.end(), out.snapshots.begin() + (i * p.H + h) * K * V);
      }
      std::copy(S.begin(), S.end(), out.final_state.begin() + (n * p.H + h) * K * V);
    }
  return out;
}

}  // namespace writesae::test
