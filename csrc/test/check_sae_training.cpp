// The training kernel against a plain double-precision step on states: every instruction set, one and three threads, every
// result poisoned beforehand, every buffer exactly as large as it must be.
#include "sae_training.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "test/harness.h"

using namespace writesae;
using namespace writesae::test;

namespace {

struct Case {
  int64_t Hl, H, K, V, F, rank, R, m;
  std::vector<int64_t> lengths;  // packed into one row
  bool initial, offset, weights;
  int64_t edits;  // encoder alone: with the decoder there are none
};

using Doubles = std::vector<double>;

// Gradients of sum_t weight_t ||S_t - M - sum_j a_j A_j||^2, the encoder's through the codes above 0; or, without a
// decoder, those of the activations given `grad`.
struct Expected {
  Doubles error, d_values, dv_enc, dw_enc, db_enc, d_carry, dv_dec, dw_dec, usage, state_sum;
};

Expected plain(const SaeTrainingParams& p, const std::vector<int64_t>& heads) {
  const EncodeParams& e = p.rows;
  const int64_t K = e.K, V = e.V, F = e.F, rank = e.rank;
  Expected out;
  out.error.assign(e.T * e.Hs, 0), out.d_values.assign(e.T * e.Hs * e.m, 0);
  for (Doubles* x : {&out.dv_enc, &out.dv_dec}) x->assign(e.Hs * F * rank * K, 0);
  for (Doubles* x : {&out.dw_enc, &out.dw_dec}) x->assign(e.Hs * F * rank * V, 0);
  out.db_enc.assign(e.Hs * F, 0), out.usage.assign(e.Hs * F, 0), out.d_carry.assign(e.N * e.Hs * F, 0);
  out.state_sum.assign(e.Hs * K * V, 0);
  const auto number = [](const View& x, int64_t a, int64_t b, int64_t c, int64_t d, int64_t i) {
    return static_cast<double>(static_cast<const float*>(x.at(a, b, c, d))[i]);
  };
  for (int64_t h = 0; h < e.Hs; h++)
    for (int64_t n = 0; n < e.N; n++) {
      const int64_t head = heads[h];
      Doubles S(K * V, 0.0);
      if (p.initial != nullptr)
        for (int64_t i = 0; i < K * V; i++) S[i] = p.initial[(n * e.H + head) * K * V + i];
      double reach = 1;
      for (int64_t t = e.cu_seqlens[n]; t < e.cu_seqlens[n + 1]; t++) {
        const double gate = std::exp(e.decay[t * e.H + head]);
        reach *= gate;
        for (double& x : S) x *= gate;
        for (int64_t r = 0; r < e.R; r++)
          for (int64_t i = 0; i < K; i++)
            for (int64_t c = 0; c < V; c++)
              S[i * V + c] += number(e.left, 0, t, head / (e.H / e.Hl), r, i) * number(e.right, 0, t, head, r, c);
        for (int64_t x = 0; x < e.edits.count; x++)
          if (e.edits.index[4 * x] == n && e.edits.index[4 * x + 1] == t - e.cu_seqlens[n] &&
              e.edits.index[4 * x + 2] == head)
            for (int64_t i = 0; i < K; i++)
              for (int64_t c = 0; c < V; c++)
                S[i * V + c] += static_cast<double>(e.edits.left[x * K + i]) * e.edits.right[x * V + c];
        const int64_t place = t * e.Hs + h;
        const double weight = p.weight != nullptr ? p.weight[place] : 1.0;
        if (weight == 0) continue;
        // matrix v and w times a matrix, for feature f's pair x
        const auto pull = [&](const Doubles& matrix, const View& v, const View& w, int64_t f, double by, Doubles& dv,
                              Doubles& dw) {
          for (int64_t x = 0; x < rank; x++)
            for (int64_t i = 0; i < K; i++)
              for (int64_t c = 0; c < V; c++) {
                dv[((h * F + f) * rank + x) * K + i] += by * matrix[i * V + c] * number(w, h, f, x, 0, c);
                dw[((h * F + f) * rank + x) * V + c] += by * matrix[i * V + c] * number(v, h, f, x, 0, i);
              }
        };
        if (!p.decoder) {
          for (int64_t j = 0; j < e.m; j++) {
            const int64_t f = e.at[place * e.m + j];
            const double g = p.grad[place * e.m + j];
            pull(S, e.v_enc, e.w_enc, f, g, out.dv_enc, out.dw_enc);
            out.db_enc[h * F + f] += g, out.d_carry[(n * e.Hs + h) * F + f] += g * reach;
          }
          continue;
        }
        Doubles made(K * V, 0.0), residual = S, no_offset;
        for (int64_t j = 0; j < e.m; j++)
          for (int64_t x = 0; x < rank; x++)
            for (int64_t i = 0; i < K; i++)
              for (int64_t c = 0; c < V; c++)
                made[i * V + c] += p.values[place * e.m + j] * number(p.v_dec, h, e.at[place * e.m + j], x, 0, i) *
                                   number(p.w_dec, h, e.at[place * e.m + j], x, 0, c);
        for (int64_t i = 0; i < K * V; i++) residual[i] -= made[i];
        no_offset = residual;  // the kernel leaves the part through M to its caller
        for (int64_t i = 0; i < K * V; i++) {
          if (p.offset != nullptr) residual[i] -= p.offset[h * K * V + i];
          out.error[place] += residual[i] * residual[i];
          out.state_sum[h * K * V + i] += weight * S[i];
        }
        for (int64_t j = 0; j < e.m; j++) {
          const int64_t f = e.at[place * e.m + j];
          const double a = p.values[place * e.m + j];
          double on = 0;
          for (int64_t x = 0; x < rank; x++)
            for (int64_t i = 0; i < K; i++)
              for (int64_t c = 0; c < V; c++)
                on += residual[i * V + c] * number(p.v_dec, h, f, x, 0, i) * number(p.w_dec, h, f, x, 0, c);
          out.d_values[place * e.m + j] = -2 * weight * on;
          pull(no_offset, p.v_dec, p.w_dec, f, -2 * weight * a, out.dv_dec, out.dw_dec);
          out.usage[h * F + f] += weight * a;
          if (a > 0) {
            pull(S, e.v_enc, e.w_enc, f, -2 * weight * on, out.dv_enc, out.dw_enc);
            out.db_enc[h * F + f] += -2 * weight * on;
          }
        }
      }
    }
  return out;
}

void check(const Case& c, int thread_count) {
  SaeTrainingParams p = {};
  EncodeParams& e = p.rows;
  std::vector<int64_t> offsets = {0}, heads;
  for (int64_t length : c.lengths) offsets.push_back(offsets.back() + length);
  for (int64_t h = c.H - 1; h >= 0; h -= 2) heads.push_back(h);
  e.B = 1, e.T = offsets.back(), e.Hl = c.Hl, e.H = c.H, e.Hs = heads.size(), e.R = c.R, e.K = c.K, e.V = c.V;
  e.F = c.F, e.rank = c.rank, e.N = c.lengths.size(), e.m = c.m;
  e.heads = heads.data(), e.cu_seqlens = offsets.data();
  auto decay = normal(e.T * e.H);
  for (float& x : decay) x = -0.1f * std::abs(x);
  decay[decay.size() / 2] = -std::numeric_limits<float>::infinity();
  const auto left = normal(e.T * c.Hl * c.R * c.K, 0.4f), right = normal(e.T * c.H * c.R * c.V);
  e.decay = decay.data();
  e.left = view(left, 0, c.Hl * c.R * c.K, c.R * c.K, c.K), e.right = view(right, 0, c.H * c.R * c.V, c.R * c.V, c.V);
  const int64_t v_size = e.Hs * c.F * c.rank * c.K, w_size = e.Hs * c.F * c.rank * c.V;
  const auto v_enc = normal(v_size, 0.3f), w_enc = normal(w_size, 0.3f), v_dec = normal(v_size, 0.3f);
  const auto w_dec = normal(w_size, 0.3f);
  const auto factor = [&](const std::vector<float>& x, int64_t size) {
    return view(x, c.F * c.rank * size, c.rank * size, size, 1);
  };
  e.v_enc = factor(v_enc, c.K), e.w_enc = factor(w_enc, c.V), p.v_dec = factor(v_dec, c.K), p.w_dec = factor(w_dec, c.V);
  auto values = normal(e.T * e.Hs * c.m), grad = values, weight = normal(e.T * e.Hs);
  std::vector<int64_t> at(values.size());
  for (size_t i = 0; i < at.size(); i++) {
    at[i] = generator()() % c.F;  // a feature may repeat in a token
    values[i] = generator()() % 4 == 0 ? 0 : values[i];
  }
  for (float& x : weight) x = generator()() % 3 == 0 ? 0 : x;
  e.at = at.data();
  const auto initial = normal(e.N * c.H * c.K * c.V), offset = normal(e.Hs * c.K * c.V);
  std::vector<float> on_offset(e.Hs * c.F);
  for (int64_t h = 0; h < e.Hs; h++)
    for (int64_t f = 0; f < c.F; f++) {
      double sum = 0;
      for (int64_t x = 0; x < c.rank; x++)
        for (int64_t i = 0; i < c.K; i++)
          for (int64_t j = 0; j < c.V; j++)
            sum += static_cast<double>(v_dec[((h * c.F + f) * c.rank + x) * c.K + i]) * offset[(h * c.K + i) * c.V + j] *
                   w_dec[((h * c.F + f) * c.rank + x) * c.V + j];
      on_offset[h * c.F + f] = static_cast<float>(sum);
    }
  auto error = poison(e.T * e.Hs), d_values = poison(values.size()), d_carry = poison(e.N * e.Hs * c.F);
  auto dv_enc = poison(v_size), dv_dec = dv_enc, dw_enc = poison(w_size), dw_dec = dw_enc;
  auto db_enc = poison(e.Hs * c.F), usage = db_enc, state_sum = poison(e.Hs * c.K * c.V);
  p.dv_enc = dv_enc.data(), p.dw_enc = dw_enc.data(), p.db_enc = db_enc.data();

  // The encoder alone, as the gradient of encode uses it.
  std::vector<std::array<int64_t, 4>> index;
  while (static_cast<int64_t>(index.size()) < c.edits) {
    const int64_t n = generator()() % e.N;
    if (c.lengths[n] == 0) continue;
    index.push_back({n, static_cast<int64_t>(generator()() % c.lengths[n]), static_cast<int64_t>(generator()() % c.H), 0});
  }
  std::stable_sort(index.begin(), index.end(), [](const auto& x, const auto& y) {
    return std::array<int64_t, 3>{x[0], x[2], x[1]} < std::array<int64_t, 3>{y[0], y[2], y[1]};
  });
  const auto edit_left = normal(c.edits * c.K), edit_right = normal(c.edits * c.V);
  e.edits = {c.edits, index.empty() ? nullptr : index[0].data(), edit_left.data(), edit_right.data()};
  p.encoder = p.gradients = true, p.grad = grad.data(), p.d_carry = d_carry.data();
  cpu::sae_training(p, threads(thread_count));
  const Expected alone = plain(p, heads);
  expect_close("encoder alone, v", dv_enc, alone.dv_enc);
  expect_close("encoder alone, w", dw_enc, alone.dw_enc);
  expect_close("encoder alone, b", db_enc, alone.db_enc);
  expect_close("carry", d_carry, alone.d_carry);

  // The whole step.
  e.edits = {};
  dv_enc = poison(v_size), dw_enc = poison(w_size), db_enc = poison(e.Hs * c.F);
  p.dv_enc = dv_enc.data(), p.dw_enc = dw_enc.data(), p.db_enc = db_enc.data(), p.d_carry = nullptr, p.grad = nullptr;
  p.decoder = true, p.values = values.data(), p.weight = c.weights ? weight.data() : nullptr;
  p.offset = c.offset ? offset.data() : nullptr, p.on_offset = c.offset ? on_offset.data() : nullptr;
  p.initial = c.initial ? initial.data() : nullptr;
  p.error = error.data(), p.dv_dec = dv_dec.data(), p.dw_dec = dw_dec.data(), p.usage = usage.data();
  p.state_sum = state_sum.data();
  cpu::sae_training(p, threads(thread_count));
  const Expected want = plain(p, heads);
  expect_close("error", error, want.error);
  expect_close("v_enc", dv_enc, want.dv_enc);
  expect_close("w_enc", dw_enc, want.dw_enc);
  expect_close("b_enc", db_enc, want.db_enc);
  expect_close("v_dec", dv_dec, want.dv_dec);
  expect_close("w_dec", dw_dec, want.dw_dec);
  expect_close("usage", usage, want.usage);
  expect_close("state_sum", state_sum, want.state_sum);

  // The decoder with gradients of the codes, and the error alone.
  p.encoder = false, p.d_values = d_values.data();
  cpu::sae_training(p, threads(thread_count));
  expect_close("d_values", d_values, want.d_values);
  expect_close("v_dec again", dv_dec, want.dv_dec);
  error = poison(error.size()), p.error = error.data();
  p.gradients = false, p.d_values = nullptr;
  cpu::sae_training(p, threads(thread_count));
  expect_close("error alone", error, want.error);
}

}  // namespace

int main() {
  const std::vector<Case> cases = {
      {1, 1, 1, 1, 1, 1, 1, 1, {1}, true, true, false, 2},
      {1, 2, 7, 5, 11, 1, 1, 3, {9}, true, true, true, 6},
      {2, 4, 20, 12, 40, 2, 2, 5, {33}, false, true, true, 12},
      {1, 1, 16, 32, 60, 1, 1, 6, {5, 0, 1, 70, 0, 32, 1, 0}, true, true, true, 9},
      {1, 1, 33, 40, 300, 1, 1, 40, {100}, true, false, false, 0},
      {1, 1, 32, 16, 250, 1, 1, 220, {34}, false, true, true, 0},  // a token with more atoms than a group
      {1, 1, 8, 8, 20, 1, 1, 4, {1500}, true, true, false, 15},
  };
  each_isa([&](const std::string& name) {
    for (const Case& c : cases)
      for (int thread_count : thread_counts()) check(c, thread_count);
    std::printf("sae_training, %s: %zu cases agree\n", name.c_str(), cases.size());
  });
}
