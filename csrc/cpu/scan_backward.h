// The backward of a scan on the CPU, of any write rule: scheduling here, arithmetic in scan_backward_kernel.h.
//
// An item of work is (sequence, value head, column block). Time is cut into segments of SEGMENT tokens, segments into
// pieces (see there). First every item runs its state forward, from the increments alone, and leaves it at the segments'
// starts: K V floats every 512 tokens, half of what v itself takes. Then the segments go from last to first: in each, every
// item rebuilds the states of its pieces and walks them back; what value heads and column blocks add to the same query and
// key lies apart until all are done, and is then summed in a fixed order, so the result does not depend on threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/isa.h"
#include "cpu/scan_form.h"
#include "cpu/scratch.h"
#include "parallel.h"
#include "scan.h"

namespace writesae::cpu::scan_backward {

using Params = ScanBackwardParams;

constexpr int C = 64;                  // tokens of a piece, at most
constexpr int64_t SEGMENT = 512;       // tokens between states that are kept
constexpr int64_t TOGETHER = 1 << 22;  // floats of unsummed parts kept at once, unless one sequence takes more
constexpr int64_t FEW = 8;             // with fewer heads than this in all, a head is split into blocks of 64 columns

struct Item {
  int64_t n, h, b, origin;  // sequence, value head, its batch row and first token
  int64_t block, blocks;    // of the value columns
  int64_t column, width;    // first column and number of columns of the block
  const int64_t* shots;     // places, sorted by (sequence, position)
};

// Positions [start, start + length) of a sequence; its edits and snapshots stand at its last token.
struct Piece {
  int64_t start, length, edit, edit_end, shot, shot_end;
};

#define WRITESAE_KERNEL "cpu/scan_backward_kernel.h"
#include "cpu/each_isa.h"

template <class Form>
struct Kernels {
  decltype(&portable::sweep<Form>) sweep;
  decltype(&portable::reverse<Form>) reverse;
  decltype(&portable::finish<Form>) finish;
};

#define WRITESAE_KERNELS(set) \
  Kernels<Form> { set::sweep<Form>, set::reverse<Form>, set::finish<Form> }
template <class Form>
Kernels<Form> kernels() {
  return WRITESAE_OF_ISA(WRITESAE_KERNELS);
}
#undef WRITESAE_KERNELS

struct Sequence {
  int64_t b, origin, length, segments;
};

// What a call is cut into.
class Plan {
 public:
  explicit Plan(const Params& params) : p(params), shots(params.in.P) {
    const ScanParams& in = p.in;
    for (int64_t n = 0; n < in.N; n++) {
      const int64_t origin = in.cu_seqlens != nullptr ? in.cu_seqlens[n] : 0;
      const int64_t length = in.cu_seqlens != nullptr ? in.cu_seqlens[n + 1] - origin : in.T;
      sequences.push_back({in.cu_seqlens != nullptr ? 0 : n, origin, length, (length + SEGMENT - 1) / SEGMENT});
    }
    for (int64_t i = 0; i < in.P; i++) shots[i] = i;
    std::sort(shots.begin(), shots.end(), [&](int64_t x, int64_t y) {
      const int64_t *a = in.places + x * 2, *b = in.places + y * 2;
      return a[0] != b[0] ? a[0] < b[0] : a[1] != b[1] ? a[1] < b[1] : x < y;
    });
    // By the problem alone, never by the number of threads.
    blocks = in.N * in.H < FEW ? (in.V + 63) / 64 : 1;
    width = (in.V + blocks - 1) / blocks;
    stride = 16 + ((in.channel_gate ? 3 : 2) + (in.a.data != nullptr ? 2 : 0)) * round_up(in.K, 16);
  }

  Item item(int64_t n, int64_t h, int64_t block) const {
    const Sequence& s = sequences[n];
    const int64_t column = block * width;
    return {n, h, s.b, s.origin, block, blocks, column, std::min(width, p.in.V - column), shots.data()};
  }

  std::vector<Piece> pieces(int64_t n, int64_t h, int64_t segment) const {
    std::vector<Piece> out;
    int64_t at = segment * SEGMENT, edit = first_edit(p.in.edits, n, h, at), shot = find_shot(n, at);
    const int64_t end = std::min(at + SEGMENT, sequences[n].length);
    while (at < end) {
      Piece piece = {at, std::min<int64_t>(C, end - at), edit, edit, shot, shot};
      const int64_t* e = p.in.edits.index + edit * 4;
      if (edit < p.in.edits.count && e[0] == n && e[2] == h) piece.length = std::min(piece.length, e[1] + 1 - at);
      if (shot < p.in.P && place(shot)[0] == n) piece.length = std::min(piece.length, place(shot)[1] + 1 - at);
      at += piece.length;
      piece.edit_end = edit = first_edit(p.in.edits, n, h, at);
      piece.shot_end = shot = find_shot(n, at);
      out.push_back(piece);
    }
    return out;
  }

  const Params& p;
  std::vector<Sequence> sequences;
  std::vector<int64_t> shots;
  int64_t blocks, width, stride;

 private:
  const int64_t* place(int64_t i) const { return p.in.places + shots[i] * 2; }

  int64_t find_shot(int64_t n, int64_t position) const {
    int64_t low = 0, high = p.in.P;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      const bool before = place(middle)[0] != n ? place(middle)[0] < n : place(middle)[1] < position;
      (before ? low : high) = before ? middle + 1 : middle;
    }
    return low;
  }
};

// Sequences [n0, n1) at once.
template <class Form>
void run_group(const Plan& plan, const Params& p, const Kernels<Form>& kernel, int64_t n0, int64_t n1,
               const Parallel& parallel) {
  const ScanParams& in = p.in;
  const int64_t members = n1 - n0, H = in.H, size = in.K * in.V, items = members * H * plan.blocks;
  int64_t segments = 0, tokens = 0, pieces = 2;
  std::vector<int64_t> slot(members);  // first row of parts of each sequence
  for (int64_t n = n0; n < n1; n++) {
    const Sequence& s = plan.sequences[n];
    segments = std::max(segments, s.segments);
    slot[n - n0] = tokens;
    tokens += std::min(s.length, SEGMENT);
    for (int64_t h = 0; h < H; h++)
      for (int64_t i = 0; i < s.segments; i++) pieces = std::max(pieces, static_cast<int64_t>(plan.pieces(n, h, i).size()));
    if (s.length > 0) continue;
    for (int64_t i = n * H * size; i < (n + 1) * H * size; i++)
      p.d_initial_state[i] = p.d_final_state != nullptr ? p.d_final_state[i] : 0.0f;
  }
  const int64_t worker_size =
      round_up(std::max(portable::memory_size<Form>(in.K, plan.width, pieces), 6 * round_up(in.K, 16)), 16);
  const Buffer memory(worker_size * parallel.threads), parts(tokens * H * plan.blocks * plan.stride);
  const Buffer starts(std::max<int64_t>(segments - 1, 0) * members * H * size);  // states before segments 1, 2, ...
  const auto start_of = [&](const Item& item, int64_t segment) -> const float* {
    const int64_t column = item.column;
    if (segment > 0) return starts + (((segment - 1) * members + item.n - n0) * H + item.h) * size + column;
    return in.initial_state == nullptr ? nullptr : in.initial_state + (item.n * H + item.h) * size + column;
  };
  const auto item_of = [&](int64_t i) {
    return plan.item(n0 + i / (H * plan.blocks), i / plan.blocks % H, i % plan.blocks);
  };

  for_each(parallel, segments > 1 ? items : 0, [&](int64_t i, int64_t worker) {
    const Item item = item_of(i);
    for (int64_t segment = 0; segment + 1 < plan.sequences[item.n].segments; segment++) {
      const std::vector<Piece> cut = plan.pieces(item.n, item.h, segment);
      kernel.sweep(p, item, cut.data(), cut.size(), start_of(item, segment), const_cast<float*>(start_of(item, segment + 1)),
                   memory + worker * worker_size);
    }
  });
  for (int64_t segment = segments - 1; segment >= 0; segment--) {
    for_each(parallel, items, [&](int64_t i, int64_t worker) {
      const Item item = item_of(i);
      const Sequence& s = plan.sequences[item.n];
      if (segment >= s.segments) return;
      const std::vector<Piece> cut = plan.pieces(item.n, item.h, segment);
      const int64_t at = (item.n * H + item.h) * size + item.column;
      const float* end = p.d_final_state == nullptr ? nullptr : p.d_final_state + at;
      if (segment + 1 < s.segments) end = p.d_initial_state + at;
      kernel.reverse(p, item, cut.data(), cut.size(), start_of(item, segment), end, p.d_initial_state + at,
                     parts + ((slot[item.n - n0] * H + item.h) * plan.blocks + item.block) * plan.stride,
                     H * plan.blocks * plan.stride, memory + worker * worker_size);
    });
    const int64_t runs = SEGMENT / C, group = H / in.Hk;
    for_each(parallel, members * runs, [&](int64_t i, int64_t worker) {
      const Sequence& s = plan.sequences[n0 + i / runs];
      const int64_t first = segment * SEGMENT + i % runs * C, last = std::min(first + C, s.length);
      for (int64_t t = first; t < last; t++)
        for (int64_t hk = 0; hk < in.Hk; hk++) {
          const int64_t row = (slot[i / runs] + t - segment * SEGMENT) * H + hk * group;
          kernel.finish(p, s.b, s.origin + t, hk, parts + row * plan.blocks * plan.stride, plan.blocks, plan.stride,
                        memory + worker * worker_size);
        }
    });
  }
}

template <class Form>
void backward_of(const ScanBackwardParams& given, const Parallel& parallel) {
  Params p = given;
  const Plan plan(p);
  const Kernels<Form> kernel = kernels<Form>();
  // Column blocks leave their shares of the edits' left sides apart, like those of queries and keys.
  const int64_t E = p.in.edits.count, K = p.in.K;
  const Buffer shares(plan.blocks > 1 ? E * plan.blocks * K : 0);
  if (plan.blocks > 1) p.d_edit_left = shares + 0;
  const int64_t per_token = p.in.H * plan.blocks * plan.stride;
  for (int64_t n0 = 0, n1; n0 < p.in.N; n0 = n1) {
    int64_t tokens = 0;
    for (n1 = n0; n1 < p.in.N && (n1 == n0 || tokens * per_token < TOGETHER); n1++)
      tokens += std::min(plan.sequences[n1].length, SEGMENT);
    run_group(plan, p, kernel, n0, n1, parallel);
  }
  for (int64_t e = 0; e < E && plan.blocks > 1; e++)
    for (int64_t i = 0; i < K; i++) {
      float sum = 0;
      for (int64_t c = 0; c < plan.blocks; c++) sum += p.d_edit_left[(e * plan.blocks + c) * K + i];
      given.d_edit_left[e * K + i] = sum;
    }
}

template <class Rule>
void backward(const ScanBackwardParams& p, const Parallel& parallel) {
  of_gate<Rule>(p.in.channel_gate, [&](auto form) { backward_of<decltype(form)>(p, parallel); });
}

}  // namespace writesae::cpu::scan_backward
