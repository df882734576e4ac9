// The backward of selective_scan on the CPU: scheduling here, arithmetic in selective_scan_backward_kernel.h.
//
// An item of work is a sixteenth of the channels, through all sequences: it alone sums over time, and sums over channels are made of
// sixteen parts in their order, so that no result depends on the number of threads. Memory: B T K floats twice for each of the
// sixteen, and of a worker K floats a channel of WIDTH for every 32 tokens of a sequence, edit and snapshot.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/selective_scan_sequences.h"
#include "parallel.h"
#include "selective_scan.h"

namespace writesae::cpu::selective_scan {
namespace {

constexpr int64_t ITEMS = 16;
constexpr int64_t WIDTH = 128;  // channels of an item at once, a multiple of 16

// The ends of every sequence's pieces: of at most `tokens`, and where an edit or a snapshot stands.
class Pieces {
 public:
  Pieces(const SelectiveScanParams& p, const Sequences& sequences, int64_t tokens) {
    for (int64_t n = 0; n < p.N; n++) {
      const Sequence s = sequences.at(n);
      firsts_.push_back(static_cast<int64_t>(ends_.size()));
      const EditRange range = edits_of(p.edits, n, 0);
      int64_t edit = range.begin;
      const int64_t* shot = s.shots;
      for (int64_t first = 0; first < s.length; first = ends_.back()) {
        int64_t end = std::min(first + tokens, s.length);
        while (edit < range.end && p.edits.index[4 * edit + 1] < first) edit++;
        while (shot < s.shots_end && p.places[2 * *shot + 1] < first) shot++;
        if (edit < range.end) end = std::min(end, p.edits.index[4 * edit + 1] + 1);
        if (shot < s.shots_end) end = std::min(end, p.places[2 * *shot + 1] + 1);
        ends_.push_back(end);
      }
      most = std::max(most, static_cast<int64_t>(ends_.size()) - firsts_.back());
    }
    firsts_.push_back(static_cast<int64_t>(ends_.size()));
  }
  const int64_t* of(int64_t n) const { return ends_.data() + firsts_[n]; }
  int64_t count(int64_t n) const { return firsts_[n + 1] - firsts_[n]; }
  int64_t most = 0;

 private:
  std::vector<int64_t> firsts_, ends_;
};

// Where the sums over channels of one item of work go, as floats: d_B and d_C by token, d_left by edit.
struct Sums {
  float *d_B, *d_C;  // [B, T, K]
  float* d_left;     // [E, K]
};

#define WRITESAE_KERNEL "cpu/selective_scan_backward_kernel.h"
#include "cpu/each_isa.h"

// Sums of items, one after the other, to their type.
void add_up(const float* parts, int64_t items, int64_t size, int64_t begin, int64_t end, float* line, Element type,
            void* to) {
  std::memcpy(line, parts + begin, (end - begin) * sizeof(float));
  for (int64_t item = 1; item < items; item++)
    for (int64_t i = begin; i < end; i++) line[i - begin] += parts[item * size + i];
  portable::convert_out(type, line, static_cast<char*>(to) + begin * element_size(type), end - begin);
}

}  // namespace

void backward(const SelectiveScanBackwardParams& p, const Parallel& parallel) {
#define WRITESAE_KERNELS(set) set::backward_block
  const auto backward_block = WRITESAE_OF_ISA(WRITESAE_KERNELS);
  const SelectiveScanParams& in = p.in;
  const Sequences sequences(in);
  const Pieces pieces(in, sequences, portable::TILE);
  const int64_t rows = in.B * in.T * in.K, edits = in.edits.count * in.K;
  const int64_t width = round_up((in.V + ITEMS - 1) / ITEMS, 16), items = (in.V + width - 1) / width;
  const int64_t block = std::min(width, WIDTH), size = round_up(portable::backward_memory(in.K, block, pieces.most), 16);
  const Buffer memory(size * parallel.threads), sums_B(items * rows), sums_C(items * rows), sums_left(items * edits);
  std::fill_n(p.d_edit_right, in.edits.count * in.V, 0.0f);
  for_each(parallel, items, [&](int64_t i, int64_t worker) {
    const Sums to = {sums_B + i * rows, sums_C + i * rows, sums_left + i * edits};
    std::memset(to.d_B, 0, rows * sizeof(float));
    std::memset(to.d_C, 0, rows * sizeof(float));
    std::memset(to.d_left, 0, edits * sizeof(float));
    for (int64_t at = i * width, end = std::min(at + width, in.V); at < end; at += block)
      backward_block(p, sequences, pieces, at, std::min(block, end - at), to, memory + worker * size);
  });
  constexpr int64_t PART = 1024;
  const Buffer lines(PART * parallel.threads);
  for_each(parallel, (rows + PART - 1) / PART, [&](int64_t i, int64_t worker) {
    const int64_t end = std::min(rows, (i + 1) * PART);
    float* const line = lines + worker * PART;
    add_up(sums_B + 0, items, rows, i * PART, end, line, in.write.type, p.d_write);
    add_up(sums_C + 0, items, rows, i * PART, end, line, in.read.type, p.d_read);
  });
  if (edits == 0) return;
  const Buffer line(edits);
  add_up(sums_left + 0, items, edits, 0, edits, line + 0, Element::f32, p.d_edit_left);
}

}  // namespace writesae::cpu::selective_scan
