// The forward and the step of a scan on the CPU, of any write rule: scheduling here, arithmetic in scan_kernel.h.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/first_nonfinite.h"
#include "cpu/isa.h"
#include "cpu/scan_form.h"
#include "cpu/scratch.h"
#include "parallel.h"
#include "scan.h"

namespace writesae::cpu::scan {

// The work common to the column blocks of one (sequence, value head) in one tile.
struct Item {
  int64_t n, h, b, origin;      // sequence, value head, its batch row and first token
  int64_t first, last, length;  // positions of the tile inside the sequence, and its whole length
  int64_t until, ahead;         // the walk prefetches to position `until`, and rows to prepare `ahead` tokens on, or 0,
  int64_t block, blocks;        // of which this column block takes its share
  bool load, store;             // whether the state comes from memory, and goes there
  const float* prepared;        // [chunk][K / 16][ROWS][16]
  const float* dots;            // [chunk][DOTS][C][C]
  const float* gate;            // [tile]  e^g, where it is a head's
  const float* beta;            // [tile]
  int64_t edit, edit_end;       // edits of (sequence, head) from this tile on
  const int64_t* shots;         // places of this sequence from this tile on, rising position
  const int64_t* shots_end;
};

#define WRITESAE_KERNEL "cpu/scan_kernel.h"
#include "cpu/each_isa.h"

constexpr int64_t CHUNK = portable::C;        // the same for every instruction set: the scratch layout depends on it
constexpr int64_t PART = 64;                  // tokens an item of preparation takes
constexpr int64_t AHEAD = 32, STRETCH = 256;  // tokens prepared at once, and walked, by a thread that does both
constexpr int64_t SCRATCH_FLOATS = 1 << 20;   // prepared keys and queries kept at once: about the second-level cache

// The kernels of one instruction set.
template <class Form>
struct Kernels {
  int lanes, vectors;
  decltype(&portable::prepare<Form>) prepare;
  decltype(&portable::read) read;
  decltype(&portable::run_columns<Form>) run_columns;
  decltype(&portable::step_head<Form>) step_head;
};

#define WRITESAE_KERNELS(set) \
  Kernels<Form> { set::LANES, set::VECTORS, set::prepare<Form>, set::read, set::run_columns<Form>, set::step_head<Form> }
template <class Form>
Kernels<Form> kernels() {
  return WRITESAE_OF_ISA(WRITESAE_KERNELS);
}
#undef WRITESAE_KERNELS

struct Sequence {
  int64_t b, origin, length;
};

// A page of new memory comes with the first write to it. Threads that write different columns of the same rows would meet
// at every page, each waiting for it: a tenth of the time of one long head. So one of them goes ahead, with a byte a page.
inline void touch(void* rows, int64_t row_size, int64_t first, int64_t last) {
  constexpr int64_t PAGE = 4096;
  char* const begin = static_cast<char*>(rows) + first * row_size;
  for (int64_t i = 0; i < (last - first) * row_size; i += PAGE) *static_cast<volatile char*>(begin + i) = 0;
}

// One token of every row and head. fill(row and head, its state) runs first, near the arithmetic.
template <class Form, class Fill>
void one_token(const ScanStepParams& p, const Parallel& parallel, const Fill& fill) {
  const Kernels<Form> kernel = kernels<Form>();
  const int64_t worker_size = (Form::LOW_RANK ? 5 : 3) * round_up(p.K, 16) + (p.K + 1) * kernel.lanes * kernel.vectors;
  const Buffer memory(worker_size * parallel.threads);
  for_each(parallel, p.B * p.H, [&](int64_t i, int64_t worker) {
    const int64_t b = i / p.H, h = i % p.H;
    const EditRange edits = edits_of(p.edits, b, h);  // positions play no part here
    fill(i, p.state + i * p.K * p.V);
    kernel.step_head(p, b, h, edits.begin, edits.end, memory + worker * worker_size);
  });
}

// A scan of one token, as a model decoding with a cache asks for: nothing is prepared, so nothing is set up for it.
template <class Form>
void scan_one_token(const ScanParams& p, const Parallel& parallel) {
  const auto row = [](const View& x) { return View{x.data, x.type, {x.stride[0], x.stride[2], x.stride[3]}}; };
  ScanStepParams step = {};
  step.B = p.B, step.Hk = p.Hk, step.H = p.H, step.K = p.K, step.V = p.V;
  step.q = row(p.q), step.k = row(p.k), step.v = row(p.v), step.g = row(p.g), step.beta = row(p.beta);
  step.a = row(p.a), step.b = row(p.b);
  step.channel_gate = p.channel_gate;
  step.scale = p.scale, step.use_qk_l2norm = p.use_qk_l2norm;
  step.state = p.final_state, step.edits = p.edits;
  step.o = p.o, step.o_type = p.o_type, step.left = p.left, step.right = p.right, step.erased = p.erased;
  const int64_t size = p.K * p.V, row_size = p.H * size;
  one_token<Form>(step, parallel, [&](int64_t i, float* state) {
    if (p.initial_state != nullptr) {
      std::memcpy(state, p.initial_state + i * size, size * sizeof(float));
    } else {
      std::memset(state, 0, size * sizeof(float));
    }
  });
  for (int64_t i = 0; i < p.P; i++) {
    const float* final_state = p.final_state + p.places[i * 2] * row_size;
    std::memcpy(p.snapshots + i * row_size, final_state, row_size * sizeof(float));
  }
}

// Snapshot places by sequence, then position.
class Shots {
 public:
  explicit Shots(const ScanParams& p) : places_(p.places), order_(p.P) {
    for (int64_t i = 0; i < p.P; i++) order_[i] = i;
    std::sort(order_.begin(), order_.end(), [&](int64_t x, int64_t y) {
      const int64_t *a = places_ + x * 2, *b = places_ + y * 2;
      return a[0] != b[0] ? a[0] < b[0] : a[1] < b[1];
    });
  }
  const int64_t* find(int64_t n, int64_t position) const {
    return std::partition_point(order_.data(), order_.data() + order_.size(), [&](int64_t i) {
      const int64_t* place = places_ + i * 2;
      return place[0] != n ? place[0] < n : place[1] < position;
    });
  }

 private:
  const int64_t* places_;
  std::vector<int64_t> order_;
};

// What a tile [first, last) of a sequence's value head is, but for what was prepared.
inline Item item_of(const ScanParams& p, const Shots& shots, int64_t n, const Sequence& s, int64_t h, int64_t first,
                    int64_t last) {
  Item item = {};
  item.n = n, item.h = h, item.b = s.b, item.origin = s.origin, item.length = s.length;
  item.first = first, item.last = item.until = std::min(last, s.length);
  item.edit = first_edit(p.edits, n, h, first), item.edit_end = first_edit(p.edits, n, h, s.length);
  item.shots = shots.find(n, first), item.shots_end = shots.find(n, s.length);
  item.load = item.store = true;
  return item;
}

// With enough heads and sequences for all threads: an item is a stretch of a head's tokens, prepared and walked in turns of
// AHEAD by one thread, whose second-level cache holds all that passes between them. Items are handed out so that a stretch
// comes after the one before it, for which it waits if another thread still has it.
template <class Form>
void by_head(const ScanParams& p, const Parallel& parallel, const Kernels<Form>& kernel,
             const std::vector<Sequence>& sequences, const Shots& shots) {
  constexpr int64_t ROWS = portable::ROWS<Form>, DOTS = portable::DOTS<Form>;
  struct Stretch {
    int64_t n, first;
  };
  std::vector<Stretch> stretches;
  std::vector<int64_t> running(p.N);
  for (int64_t n = 0; n < p.N; n++) running[n] = n;
  for (int64_t first = 0; !running.empty(); first += STRETCH) {
    for (int64_t n : running) stretches.push_back({n, first});
    const auto done = [&](int64_t n) { return sequences[n].length <= first + STRETCH; };
    running.erase(std::remove_if(running.begin(), running.end(), done), running.end());
  }
  std::vector<std::atomic<int64_t>> walked(p.N * p.H);

  const int64_t padded = round_up(p.K, 16), width = kernel.vectors * kernel.lanes, blocks = (p.V + width - 1) / width;
  const int64_t prepared_size = AHEAD / CHUNK * padded * ROWS, dots_size = AHEAD / CHUNK * DOTS * CHUNK * CHUNK;
  const int64_t rows_size = portable::SCRATCH_ROWS<Form> * padded;
  const int64_t block_size = round_up(portable::block_memory<Form>(p.K, width), 16);
  const int64_t worker_size = 2 * prepared_size + dots_size + AHEAD + rows_size + blocks * block_size;
  const Buffer memory(worker_size * parallel.threads);
  for_each(parallel, static_cast<int64_t>(stretches.size()) * p.H, [&](int64_t i, int64_t worker) {
    const auto [n, begin] = stretches[i / p.H];
    const int64_t h = i % p.H;
    const Sequence& s = sequences[n];
    const int64_t end = std::min(begin + STRETCH, s.length);
    float* const prepared = memory + worker * worker_size;
    float* const dots = prepared + 2 * prepared_size;
    float* const beta = dots + dots_size;
    float* const rows = beta + AHEAD;
    float* const states = rows + rows_size;
    std::atomic<int64_t>& reached = walked[n * p.H + h];
    while (reached.load(std::memory_order_acquire) < begin) std::this_thread::yield();
    for (int64_t first = begin, turn = 0; first == begin || first < end; first += AHEAD, turn ^= 1) {
      const int64_t last = std::min(first + AHEAD, end);
      kernel.prepare(p, s.b, s.origin, first, last, h, first == begin, rows, prepared + turn * prepared_size, dots);
      for (int64_t t = first; t < last; t++) beta[t - first] = kernel.read(p.beta, s.b, s.origin + t, h);
      Item item = item_of(p, shots, n, s, h, first, last);
      item.prepared = prepared + turn * prepared_size, item.dots = dots, item.gate = item.beta = beta;
      item.until = end, item.ahead = AHEAD, item.blocks = blocks;
      item.load = first == begin, item.store = last == end;
      for (item.block = 0; item.block < blocks; item.block++)
        kernel.run_columns(p, item, item.block * width, kernel.vectors, states + item.block * block_size);
    }
    reached.store(end, std::memory_order_release);
  });
}

template <class Form>
void forward_of(const ScanParams& p, const Parallel& parallel) {
  if (p.T == 1 && p.cu_seqlens == nullptr) return scan_one_token<Form>(p, parallel);
  const Kernels<Form> kernel = kernels<Form>();
  const int64_t K = p.K, V = p.V;
  std::vector<Sequence> sequences;
  int64_t longest = 0, total = 0;
  for (int64_t n = 0; n < p.N; n++) {
    if (p.cu_seqlens != nullptr) {
      sequences.push_back({0, p.cu_seqlens[n], p.cu_seqlens[n + 1] - p.cu_seqlens[n]});
    } else {
      sequences.push_back({n, 0, p.T});
    }
    longest = std::max(longest, sequences.back().length), total += sequences.back().length;
  }
  const Shots shots(p);
  if constexpr (Form::CHANNEL)
    if (total * p.H >= longest * parallel.threads) return by_head(p, parallel, kernel, sequences, shots);

  // A tile: so many tokens, and so many sequences side by side, that what is prepared for them stays near the core.
  constexpr int64_t ROWS = portable::ROWS<Form>, DOTS = portable::DOTS<Form>;
  const int64_t heads = Form::CHANNEL ? p.H : p.Hk, values = p.H / heads;  // heads to prepare, value heads of each
  const int64_t padded = round_up(K, 16), per_token = heads * (ROWS * padded / CHUNK + DOTS * CHUNK) + p.H * 2;
  int64_t tile = std::min<int64_t>(std::max<int64_t>(SCRATCH_FLOATS / per_token / PART * PART, PART), 1024);
  tile = std::min(tile, round_up(std::max<int64_t>(longest, 1), CHUNK));
  const int64_t together = std::clamp<int64_t>(SCRATCH_FLOATS / (per_token * tile), 1, std::max<int64_t>(p.N, 1));
  const int64_t chunks = round_up(tile, CHUNK) / CHUNK, parts = (tile + PART - 1) / PART;
  const int64_t prepared_size = chunks * padded * ROWS, dots_size = chunks * DOTS * CHUNK * CHUNK;
  const Buffer prepared(together * heads * prepared_size), dots(together * heads * dots_size);
  const Buffer gate(together * p.H * tile), beta(together * p.H * tile);
  // Blocks of two vectors, unless that would leave threads without work.
  int vectors = kernel.vectors;
  const auto blocks_of = [&](int count) { return (V + count * kernel.lanes - 1) / (count * kernel.lanes); };
  if (together * p.H * blocks_of(vectors) < parallel.threads) vectors = 1;
  const int64_t width = vectors * kernel.lanes, blocks = blocks_of(vectors);
  const int64_t memory_size = round_up(portable::block_memory<Form>(K, width), 16);
  const int64_t rows_size = portable::SCRATCH_ROWS<Form> * padded;
  const int64_t worker_size = std::max(memory_size, rows_size);
  const Buffer memory(worker_size * parallel.threads);

  for (int64_t n0 = 0; n0 < p.N; n0 += together) {
    const int64_t members = std::min(together, p.N - n0);
    int64_t longest_here = 1;  // an empty sequence still copies its initial state
    for (int64_t n = n0; n < n0 + members; n++) longest_here = std::max(longest_here, sequences[n].length);
    for (int64_t first = 0; first < longest_here; first += tile) {
      for_each(parallel, members * heads * parts, [&](int64_t i, int64_t worker) {
        const int64_t m = i / (heads * parts), head = i / parts % heads, part = i % parts;
        const Sequence& s = sequences[n0 + m];
        const int64_t from = first + part * PART, to = std::min({from + PART, first + tile, s.length});
        if (from >= to) return;
        if (head == 0) {  // the rows of all heads lie together
          const int64_t row = s.b * p.T + s.origin;
          touch(p.o, p.H * V * element_size(p.o_type), row + from, row + to);
          for (float* written : {p.right, Form::LOW_RANK ? p.erased : nullptr})
            if (written != nullptr) touch(written, p.H * V * sizeof(float), row + from, row + to);
        }
        const int64_t chunk = (m * heads + head) * chunks + part * PART / CHUNK;
        kernel.prepare(p, s.b, s.origin, from, to, head, true, memory + worker * worker_size,
                       prepared + chunk * padded * ROWS, dots + chunk * DOTS * CHUNK * CHUNK);
        for (int64_t h = head * values; h < (head + 1) * values; h++)
          for (int64_t t = from; t < to; t++) {
            const int64_t at = (m * p.H + h) * tile + t - first;
            if constexpr (!Form::CHANNEL) *(gate + at) = std::exp(kernel.read(p.g, s.b, s.origin + t, h));
            *(beta + at) = kernel.read(p.beta, s.b, s.origin + t, h);
          }
      });
      for_each(parallel, members * p.H * blocks, [&](int64_t i, int64_t worker) {
        const int64_t m = i / (p.H * blocks), h = i / blocks % p.H, n = n0 + m, head = h / values;
        const Sequence& s = sequences[n];
        if (first > 0 && first >= s.length) return;
        Item item = item_of(p, shots, n, s, h, first, first + tile);
        item.prepared = prepared + (m * heads + head) * prepared_size;
        item.dots = dots + (m * heads + head) * dots_size;
        item.gate = gate + (m * p.H + h) * tile;
        item.beta = beta + (m * p.H + h) * tile;
        kernel.run_columns(p, item, i % blocks * width, vectors, memory + worker * worker_size);
      });
    }
  }
}

template <class Rule>
void forward(const ScanParams& p, const Parallel& parallel) {
  of_gate<Rule>(p.channel_gate, [&](auto form) { forward_of<decltype(form)>(p, parallel); });
  if (p.first_nonfinite == nullptr) return;
  note_first_nonfinite({p.B, p.T, p.H, p.V, p.right, p.erased, p.first_nonfinite}, p.N, p.cu_seqlens, p.edits, p.K,
                       p.final_state);
}

template <class Rule>
void step(const ScanStepParams& p, const Parallel& parallel) {
  of_gate<Rule>(p.channel_gate, [&](auto form) { one_token<decltype(form)>(p, parallel, [](int64_t, float*) {}); });
  if (p.first_nonfinite != nullptr) note_first_nonfinite({p.B, 1, p.H, p.V, p.right, p.erased, p.first_nonfinite});
}

}  // namespace writesae::cpu::scan
