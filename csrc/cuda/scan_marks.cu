// A scan's marks, in small kernels before the chunks: which native writes are not made, which snapshots a chunk has, and, for
// the backward, where chunks end.
#include <algorithm>

#include "scan_backward.cuh"
#include "scan_layout.cuh"

namespace writesae::cuda {
namespace {

// Which native writes are not made or do not stay, and which snapshots a chunk has.
__global__ void __launch_bounds__(128) mark(const __grid_constant__ Problem p, int chunk) {
  const int64_t i = static_cast<int64_t>(tile::block_x()) * 128 + tile::thread();
  if (i < p.edits.count) {
    const int64_t* x = p.edits.index + 4 * i;
    const int64_t t = p.cu_seqlens == nullptr ? x[0] * p.T + x[1] : p.cu_seqlens[x[0]] + x[1];
    if (p.edits.kind(i).removes()) p.removed[t * p.H + x[2]] = 1;
    if (p.edits.kind(i).removes_after()) p.gone[t * p.H + x[2]] = 1;
  }
  if (i < p.P) {
    const int64_t n = p.places[2 * i], t = p.places[2 * i + 1];
    const int64_t slot = (chunk == 64 ? sequence<64>(p, n).first_slot : sequence<32>(p, n).first_slot) + t / chunk;
    p.next_place[i] = tile::atomic_exchange(p.first_place + slot, static_cast<int>(i) + 1);
  }
}

// ---- where chunks end -------------------------------------------------------------------------------------------------

// Marks tokens after which an edit or a snapshot stands, and native writes that are not made.
__global__ void __launch_bounds__(128) mark_ends(const __grid_constant__ Backward b, uint8_t* ends) {
  const Problem& p = b.p;
  const int64_t i = static_cast<int64_t>(tile::block_x()) * 128 + tile::thread();
  const auto token = [&](int64_t n, int64_t t) { return p.cu_seqlens == nullptr ? n * p.T + t : p.cu_seqlens[n] + t; };
  if (i < p.edits.count) {
    const int64_t *x = p.edits.index + 4 * i, t = token(x[0], x[1]);
    ends[t] = 1;
    if (p.edits.kind(i).removes()) p.removed[t * p.H + x[2]] = 1;
    if (p.edits.kind(i).removes_after()) p.gone[t * p.H + x[2]] = 1;
  }
  if (i < p.P) ends[token(p.places[2 * i], p.places[2 * i + 1])] = 1;
}

// Chunks of at most C tokens that end at marked tokens: a warp per sequence. A sequence has at most one chunk more than
// without marks for every edit and snapshot in it, and its slots are as many further on as those before it have.
template <int C>
__global__ void __launch_bounds__(tile::WARP)
    cut(const __grid_constant__ Backward b, const uint8_t* ends, Cut* cuts, int64_t* spans) {
  const Problem& p = b.p;
  const int n = tile::block_x(), lane = tile::lane();
  const Sequence s = sequence<C>(p, n);
  int shots = 0;
  for (int64_t i = lane; i < p.P; i += tile::WARP) shots += p.places[2 * i] < n;
#pragma unroll
  for (int step = 1; step < tile::WARP; step *= 2) shots += tile::shuffle_xor(shots, step);
  const int64_t first_slot = s.first_slot + first_edit(p.edits, n, 0, 0) + shots;
  int64_t slot = first_slot;
  int begin = 0;
  const int length = static_cast<int>(s.length);
  for (int at = 0; at < length; at += tile::WARP) {
    const int t = at + lane;
    uint32_t marked = tile::ballot(t < length && (t == length - 1 || ends[s.row * p.T + s.origin + t] != 0));
    for (; marked != 0; marked &= marked - 1) {
      const int end = at + tile::lowest_bit(marked) + 1;
      while (begin < end) {
        const int count = end - begin < C ? end - begin : C;
        if (lane == 0) cuts[slot] = {n, begin, count};
        slot++, begin += count;
      }
    }
  }
  if (lane == 0) spans[2 * n] = first_slot, spans[2 * n + 1] = slot - first_slot;
}

// The snapshots of a place as a list, in order of their numbers.
template <int C>
__global__ void __launch_bounds__(128) list_shots(const __grid_constant__ Backward b) {
  const Problem& p = b.p;
  const int64_t i = static_cast<int64_t>(tile::block_x()) * 128 + tile::thread();
  if (i >= p.P) return;
  const int64_t n = p.places[2 * i], t = p.places[2 * i + 1];
  const auto same = [&](int64_t j) { return p.places[2 * j] == n && p.places[2 * j + 1] == t; };
  int64_t before = 0, after = i + 1;
  while (before < i && !same(before)) before++;
  while (after < p.P && !same(after)) after++;
  b.next_shot[i] = after < p.P ? static_cast<int>(after) + 1 : 0;
  if (before == i) b.first_shot[slot_ending<C>(b, n, t)] = static_cast<int>(i) + 1;
}

template <int C>
void cut_chunks(const Backward& b, const Cutting& to, tile::Stream stream) {
  const Problem& p = b.p;
  if (to.ends == nullptr) return;
  tile::zero(to.ends, p.B * p.T, stream);
  tile::zero(to.cuts, p.slots * sizeof(Cut), stream);
  if (p.removed != nullptr) tile::zero(p.removed, 2 * p.B * p.T * p.H, stream);
  const auto blocks = static_cast<unsigned>(parts(std::max(p.edits.count, p.P), 128));
  tile::launch("scan_backward mark_ends", mark_ends, {blocks, 1, 1}, 128, 0, stream, b, to.ends);
  tile::launch("scan_backward cut", cut<C>, {static_cast<unsigned>(p.N), 1, 1}, tile::WARP, 0, stream, b, to.ends, to.cuts,
               to.spans);
  if (p.P == 0) return;
  tile::zero(b.first_shot, p.slots * sizeof(int), stream);
  tile::launch("scan_backward list_shots", list_shots<C>, {static_cast<unsigned>(parts(p.P, 128)), 1, 1}, 128, 0, stream, b);
}

}  // namespace

void run_marks(const Problem& p, int chunk, tile::Stream stream) {
  clear_nonfinite(p.first_nonfinite, p.B, stream);
  if (p.removed != nullptr) tile::zero(p.removed, 2 * p.B * p.T * p.H, stream);
  if (p.first_place != nullptr) tile::zero(p.first_place, p.slots * sizeof(int), stream);
  const int64_t marks = std::max(p.edits.count, p.P);
  if (marks > 0) tile::launch("scan mark", mark, {static_cast<unsigned>(parts(marks, 128)), 1, 1}, 128, 0, stream, p, chunk);
}

void run_cuts(const Backward& b, const Cutting& to, int chunk, tile::Stream stream) {
  if (chunk == 64) {
    cut_chunks<64>(b, to, stream);
  } else {
    cut_chunks<32>(b, to, stream);
  }
}

}  // namespace writesae::cuda
