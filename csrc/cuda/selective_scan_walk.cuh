// selective_scan on CUDA: a sequence from its first token to its last, for the forward's outputs, or for the states from which
// the backward starts.
#pragma once

#include "selective_scan.cuh"

namespace writesae::cuda::selective_scan {

// FULL: writes o, right, snapshots and the final state; otherwise the state before each tile.
template <class S, bool FULL>
__global__ void __launch_bounds__(THREADS, BLOCKS) walk(const __grid_constant__ Given g) {
  const SelectiveScanParams& p = g.in;
  const Place at = place<S>(p);
  const Span span = span_of<S>(p, at.n);
  const int K = static_cast<int>(p.K), V = static_cast<int>(p.V);
  const bool inside = at.channel < V;
  tile::Shared shared;
  float* dt = shared.take<float>(S::ROWS);
  float* x = shared.take<float>(S::ROWS);
  float* B = shared.take<float>(S::FACTORS);
  float* C = FULL ? shared.take<float>(S::FACTORS) : nullptr;
  float s[S::EACH], rate[S::EACH];
  load_rates<S>(p, at, rate);
  load_state<S>(p.initial_state == nullptr ? nullptr : p.initial_state + at.n * p.K * V, at, K, V, s);
  const float skip = FULL && p.skip != nullptr && inside ? p.skip[at.channel] : 0.0f;
  const EditRange range = edits_of(p.edits, at.n, 0);
  int64_t edit = range.begin;
  for (int64_t first = 0; first < span.length; first += S::TOKENS) {
    const int count = static_cast<int>(span.length - first < S::TOKENS ? span.length - first : S::TOKENS);
    const int64_t origin = span.origin + first;
    if constexpr (!FULL) {
      store_state<S>(g.starts + (span.first_slot + first / S::TOKENS) * p.K * V, at, K, V, s);
      if (first + S::TOKENS >= span.length) break;  // what comes after is nobody's start
    }
    tile::sync();
    load_rows<S>(p.dt, span.row, origin, count, at.channel - at.slot, V, dt);
    load_rows<S>(p.x, span.row, origin, count, at.channel - at.slot, V, x);
    load_factors<S>(p.write, span.row, origin, count, K, B);
    if constexpr (FULL) load_factors<S>(p.read, span.row, origin, count, K, C);
    tile::sync();
#pragma unroll 1  // more at once takes registers that are not there
    for (int t = 0; t < count; t++) {
      const float step = dt[t * S::LD + at.slot], value = x[t * S::LD + at.slot];
      const bool edited = edit < range.end && position(p.edits, edit) == first + t;
      const Here here = edited ? edits_here(p.edits, edit, range.end, first + t) : Here{edit, edit, true, true};
      const float u = here.native ? step * value : 0.0f;
#pragma unroll
      for (int r = 0; r < S::EACH; r++)
        s[r] = tile::exponential(step * rate[r]) * s[r] + B[t * S::KEYS + at.part + S::PARTS * r] * u;
      if (edited) add_edits<S>(p, here, false, at, s);
      if constexpr (FULL) {
        float o = 0;
#pragma unroll
        for (int r = 0; r < S::EACH; r++) o += C[t * S::KEYS + at.part + S::PARTS * r] * s[r];
        o = sum_parts<S>(o);
        const int64_t to = (span.row * p.T + origin + t) * V + at.channel;
        if (inside && at.part == 0) cuda::write(p.o, p.x.type, to, o + skip * value);
        if (p.right != nullptr && inside && at.part == 0) p.right[to] = u;
      }
      if (edited) {
#pragma unroll
        for (int r = 0; r < S::EACH; r++)
          if (!here.kept) s[r] -= B[t * S::KEYS + at.part + S::PARTS * r] * u;
        add_edits<S>(p, here, true, at, s);
        edit = here.end;
      }
      if constexpr (FULL) {
        if (g.first_place != nullptr)
          for (int i = g.first_place[span.row * p.T + origin + t]; i != 0; i = g.next_place[i - 1])
            store_state<S>(p.snapshots + (i - 1) * p.K * V, at, K, V, s);
      }
    }
  }
  if constexpr (FULL) {
    // Only a column whose state has broken is looked through: see scan.h.
    if (p.first_nonfinite != nullptr && inside && at.part == 0 && !finite(s[0])) {
      int64_t t = 0;
      while (t < span.length && finite(p.right[(span.row * p.T + span.origin + t) * V + at.channel])) t++;
      if (t < span.length) note_nonfinite(p.first_nonfinite + span.row, span.origin + t);
    }
  }
  if constexpr (FULL) store_state<S>(p.final_state + at.n * p.K * V, at, K, V, s);
}

template <class S, bool FULL>
void launch_walk(const Given& g, tile::Stream stream) {
  const SelectiveScanParams& p = g.in;
  const auto blocks = static_cast<unsigned>(p.N * parts(p.V, S::CHANNELS));
  const size_t shared = 2 * tile::shared_piece(S::ROWS * 4) + (FULL ? 2 : 1) * tile::shared_piece(S::FACTORS * 4);
  tile::launch("selective_scan walk", walk<S, FULL>, {blocks, 1, 1}, THREADS, shared, stream, g);
}

}  // namespace writesae::cuda::selective_scan
