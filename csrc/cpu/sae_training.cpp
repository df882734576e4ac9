// A training step's sums on the CPU: scheduling here, arithmetic in sae_training_kernel.h.
#include "sae_training.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"
#include "parallel.h"

namespace writesae::cpu {
namespace {

constexpr int64_t CHUNK = 32;         // rows; a multiple of every LANES
constexpr int64_t GROUP = 16;         // most tokens whose Gram matrices are made together
constexpr int64_t GROUP_ATOMS = 192;  // and most atoms, unless one token has more: three such matrices stay in cache

// Consecutive rows of one sequence of the head's block.
struct Chunk {
  int64_t first, count, sequence;
  int64_t begin;  // the sequence that starts here, else -1
};

// One worker's sums of one head, rows padded to whole vectors.
struct Sums {
  float *dv_enc, *dw_enc, *dv_dec, *dw_dec;  // [F r][Kp] or [F r][Vp]
  float *db_enc, *usage;                     // [F]
  float* state_sum;                          // [Kp][ldv]
};

// One worker's scratch. Leading dimensions: K and V padded to whole vectors, and further so that no two rows of a tile
// fall on the same lines of the first cache.
struct Work {
  int64_t Kp, Vp, ldk, ldv, lav, law, ldg, group_limit;
  Arena memory;
  float *state_t, *state;  // [Vp + CHUNK][ldk]: S^T, then left; [Kp + CHUNK][ldv]: S, then right
  float *left_t, *right_t, *scaled, *decay, *decay_t, *gamma;
  float *v, *w;                                                                  // [atoms][lav], [atoms][law]
  float *on_left, *on_right, *spread, *codes, *grad, *on_state, *made, *anchor;  // [atoms][CHUNK], anchor [atoms]
  float *image, *dv, *dw;
  float *group_v, *group_w, *group_t, *gram_v, *gram_w, *mixed, *code_columns, *code_rows, *made_columns;
  float *weight, *distance;  // [CHUNK]
  int64_t* token;            // [CHUNK]  (b T + t) Hs + h, or -1
  int32_t *slot, *local, *seen, *member;
  float** rows;
  std::vector<int32_t> features;
  float reach = 1;                // product of the gates from the sequence's start to the chunk
  bool fresh = true;              // the state before the chunk is zero
  bool restart = true;            // norm and product are to be taken from the state
  double norm = 0, product = 0;   // ||S||^2 and <M, S>
  const float* offset = nullptr;  // [Kp][ldv]
  const float* later = nullptr;   // of every row of the head: the weight it has in sum_t weight_t S_t
  double offset_norm = 0;

  float* left() const { return state_t + Vp * ldk; }
  float* right() const { return state + Kp * ldv; }

  explicit Work(const SaeTrainingParams& p) : Work(p, std::min(p.rows.F, CHUNK * p.rows.m) * p.rows.rank) {}

 private:
  Work(const SaeTrainingParams& p, int64_t atoms)
      : Kp(round_up(p.rows.K, 16)),
        Vp(round_up(p.rows.V, 16)),
        ldk(Kp + 16),
        ldv(Vp + 16),
        lav(Kp + CHUNK),
        law(Vp + CHUNK),
        group_limit(std::min(atoms, std::max(GROUP_ATOMS, p.rows.m * p.rows.rank))),
        memory(0) {
    ldg = round_up(group_limit, 16) + 16;
    // Twice over the same list: first to count, then to hand out.
    for (const bool counting : {true, false}) {
      int64_t bytes = 0;
      const auto take = [&](auto*& pointer, int64_t count) {
        using T = std::remove_reference_t<decltype(*pointer)>;
        bytes += round_up(count * sizeof(T), LINE);
        if (!counting) pointer = memory.take<T>(count);
      };
      const int64_t larger = std::max(Kp, Vp), group = round_up(group_limit, 16);
      take(state_t, (Vp + CHUNK) * ldk), take(state, (Kp + CHUNK) * ldv);
      take(left_t, Kp * CHUNK), take(right_t, Vp * CHUNK), take(scaled, (larger + 16) * CHUNK);
      take(decay, CHUNK * CHUNK), take(decay_t, CHUNK * CHUNK), take(gamma, CHUNK);
      take(v, atoms * lav), take(w, atoms * law);
      for (float** x : {&on_left, &on_right, &spread, &codes}) take(*x, atoms * CHUNK);
      take(anchor, atoms), take(weight, CHUNK), take(distance, CHUNK), take(token, CHUNK);
      take(slot, CHUNK * p.rows.m), take(local, p.rows.F);
      take(rows, std::max({atoms, larger, CHUNK}));
      if (p.decoder) {
        for (float** x : {&on_state, &made, &grad}) take(*x, atoms * CHUNK);
        take(image, atoms * Kp), take(dv, atoms * Kp), take(dw, atoms * Vp);
        take(group_v, group * ldk), take(group_w, group * ldv), take(group_t, larger * ldg);
        for (float** x : {&gram_v, &gram_w, &mixed}) take(*x, group * ldg);
        take(code_columns, group * GROUP), take(code_rows, GROUP * ldg), take(made_columns, group * GROUP);
        take(seen, atoms), take(member, group_limit + p.rows.m * p.rows.rank);
      }
      if (counting) memory = Arena(bytes);
    }
    std::fill(local, local + p.rows.F, -1);
    features.reserve(atoms);
  }
};

#define WRITESAE_KERNEL "cpu/sae_training_kernel.h"
#include "cpu/each_isa.h"

struct Kernels {
  decltype(&portable::run_chunk) run;
  decltype(&portable::skip_chunk) skip;
};

#define WRITESAE_KERNELS(set) \
  Kernels { set::run_chunk, set::skip_chunk }
Kernels kernels() { return WRITESAE_OF_ISA(WRITESAE_KERNELS); }

// Chunks [first, last) of one sequence, worked through in order from the state before them.
struct Segment {
  int64_t first, last;
  int64_t saved;  // where the state before it lies among the saved ones, or -1: it starts a sequence
};

std::vector<Chunk> chunks_of(const Block& block) {
  std::vector<Chunk> chunks;
  int64_t sequence = 0;
  const int64_t count = block.rows.size();
  for (int64_t first = 0, size; first < count; first += size) {
    if (block.rows[first].begin >= 0) sequence = block.rows[first].begin;
    size = 1;
    while (size < CHUNK && first + size < count && block.rows[first + size].begin < 0) size++;
    chunks.push_back({first, size, sequence, block.rows[first].begin});
  }
  return chunks;
}

// Whole sequences where they occupy the threads; else they are cut, at the price of running over their states first.
std::vector<Segment> segments_of(const std::vector<Chunk>& chunks, bool may_cut, int64_t threads) {
  int64_t sequences = 0, total = chunks.size(), saved = 0;
  for (const Chunk& chunk : chunks) sequences += chunk.begin >= 0;
  const bool cut = may_cut && threads > 1 && sequences < 4 * threads && sequences % threads != 0;
  const int64_t most = cut ? std::max<int64_t>(1, (total + 4 * threads - 1) / (4 * threads)) : total;
  std::vector<Segment> segments;
  for (int64_t first = 0, last; first < total; first = last) {
    last = first + 1;
    while (last < total && last - first < most && chunks[last].begin < 0) last++;
    segments.push_back({first, last, chunks[first].begin >= 0 ? -1 : saved++});
  }
  return segments;
}

// Of every row, what its addition weighs in sum_t weight_t S_t.
std::vector<float> later_weights(const SaeTrainingParams& p, int64_t h, const Block& block) {
  std::vector<float> later(block.rows.size());
  double sum = 0;
  for (int64_t i = static_cast<int64_t>(later.size()) - 1; i >= 0; i--) {
    const Row& row = block.rows[i];
    if (row.end >= 0) sum = 0;
    const int64_t place = row.slot < 0 ? 0 : block.tokens[row.slot] * p.rows.Hs + h;
    if (row.slot >= 0) sum += p.weight != nullptr ? p.weight[place] : 1.0f;
    later[i] = static_cast<float>(sum);
    sum *= row.gate;
  }
  return later;
}

// Every worker's sums of one head, and their total into the results.
class AllSums {
 public:
  AllSums(const SaeTrainingParams& p, const Work& w, int64_t workers) : p_(p), Kp_(w.Kp), Vp_(w.Vp), ldv_(w.ldv) {
    const int64_t atoms = p.rows.F * p.rows.rank;
    // Rows that need no padding are summed where they belong, by the first worker.
    direct_ = Kp_ == p.rows.K && Vp_ == p.rows.V;
    for (int64_t i = 0; i < workers; i++) {
      Sums s = {};
      const bool own = !direct_ || i > 0;
      if (p.encoder && own) s.dv_enc = take(atoms * Kp_), s.dw_enc = take(atoms * Vp_);
      if (p.decoder && p.gradients && own) s.dv_dec = take(atoms * Kp_), s.dw_dec = take(atoms * Vp_);
      s.db_enc = take(p.rows.F), s.usage = take(p.rows.F);
      if (p.decoder && p.gradients) s.state_sum = take(Kp_ * ldv_);
      workers_.push_back(s);
    }
  }

  void clear(int64_t h, int64_t worker) {
    const int64_t atoms = p_.rows.F * p_.rows.rank;
    Sums& s = workers_[worker];
    if (direct_ && worker == 0) {
      const int64_t at = h * atoms;
      if (p_.encoder) s.dv_enc = p_.dv_enc + at * p_.rows.K, s.dw_enc = p_.dw_enc + at * p_.rows.V;
      if (p_.decoder && p_.gradients) s.dv_dec = p_.dv_dec + at * p_.rows.K, s.dw_dec = p_.dw_dec + at * p_.rows.V;
    }
    const auto zero = [](float* x, int64_t n) {
      if (x != nullptr) std::memset(x, 0, n * sizeof(float));
    };
    zero(s.dv_enc, atoms * Kp_), zero(s.dw_enc, atoms * Vp_), zero(s.dv_dec, atoms * Kp_), zero(s.dw_dec, atoms * Vp_);
    zero(s.db_enc, p_.rows.F), zero(s.usage, p_.rows.F), zero(s.state_sum, Kp_ * ldv_);
  }

  const Sums& of(int64_t worker) const { return workers_[worker]; }

  // Adds up `rows` rows of every worker, in a fixed order, a slice of the rows at a time.
  void total(int64_t h, const Parallel& parallel) const {
    const int64_t atoms = p_.rows.F * p_.rows.rank, K = p_.rows.K, V = p_.rows.V;
    if (p_.encoder) {
      add(parallel, p_.dv_enc + h * atoms * K, K, &Sums::dv_enc, Kp_, atoms);
      add(parallel, p_.dw_enc + h * atoms * V, V, &Sums::dw_enc, Vp_, atoms);
      if (p_.db_enc != nullptr) add(parallel, p_.db_enc + h * p_.rows.F, p_.rows.F, &Sums::db_enc, p_.rows.F, 1);
    }
    if (p_.decoder && p_.gradients) {
      add(parallel, p_.dv_dec + h * atoms * K, K, &Sums::dv_dec, Kp_, atoms);
      add(parallel, p_.dw_dec + h * atoms * V, V, &Sums::dw_dec, Vp_, atoms);
      add(parallel, p_.usage + h * p_.rows.F, p_.rows.F, &Sums::usage, p_.rows.F, 1);
      add(parallel, p_.state_sum + h * K * V, V, &Sums::state_sum, ldv_, K);
    }
  }

 private:
  float* take(int64_t count) {
    memory_.emplace_back(count);
    return memory_.back() + 0;
  }

  void add(const Parallel& parallel, float* to, int64_t width, float* Sums::* from, int64_t ld, int64_t rows) const {
    constexpr int64_t SLICE = 64;
    for_each(parallel, (rows + SLICE - 1) / SLICE, [&](int64_t slice, int64_t) {
      for (int64_t i = slice * SLICE; i < std::min(rows, (slice + 1) * SLICE); i++)
        for (size_t worker = 0; worker < workers_.size(); worker++) {
          const float* x = workers_[worker].*from + i * ld;
          float* out = to + i * width;
          if (x == out) continue;
          if (worker == 0) {
            std::memcpy(out, x, width * sizeof(float));
          } else {
            for (int64_t j = 0; j < width; j++) out[j] += x[j];
          }
        }
    });
  }

  const SaeTrainingParams& p_;
  int64_t Kp_, Vp_, ldv_;
  bool direct_;
  std::vector<Buffer> memory_;
  std::vector<Sums> workers_;
};

}  // namespace

void sae_training(const SaeTrainingParams& p, const Parallel& parallel) {
  const EncodeParams& e = p.rows;
  const Kernels kernel = kernels();
  if (p.decoder) std::fill(p.error, p.error + e.B * e.T * e.Hs, 0.0f);
  if (p.d_values != nullptr) std::fill(p.d_values, p.d_values + e.B * e.T * e.Hs * e.m, 0.0f);
  if (p.d_carry != nullptr) std::fill(p.d_carry, p.d_carry + e.N * e.Hs * e.F, 0.0f);
  const int64_t workers = std::max(1, parallel.threads);
  std::vector<Work> work;
  work.reserve(workers);
  for (int64_t i = 0; i < workers; i++) work.emplace_back(p);
  const Work& sizes = work[0];
  AllSums sums(p, sizes, workers);
  const int64_t state_floats = sizes.Kp * sizes.ldv, state_t_floats = sizes.Vp * sizes.ldk;
  Buffer offset(state_floats);
  for (int64_t h = 0; h < e.Hs; h++) {
    Block block;
    Stream(e, e.heads[h]).next(block, INT64_MAX);
    const std::vector<Chunk> chunks = chunks_of(block);
    const std::vector<Segment> segments = segments_of(chunks, p.d_carry == nullptr, workers);
    std::vector<float> later;
    double offset_norm = 0;
    if (p.decoder) {
      later = later_weights(p, h, block);
      std::memset(offset + 0, 0, state_floats * sizeof(float));
      for (int64_t i = 0; p.offset != nullptr && i < e.K * e.V; i++) {
        const float x = p.offset[h * e.K * e.V + i];
        (offset + i / e.V * sizes.ldv)[i % e.V] = x;
        offset_norm += static_cast<double>(x) * x;
      }
    }
    // States before the segments that start inside a sequence.
    std::vector<Buffer> saved;
    std::vector<float> reach;
    for (const Segment& segment : segments)
      if (segment.saved >= 0) saved.emplace_back(state_floats + state_t_floats);
    for (size_t i = 0; i + 1 < segments.size(); i++) {
      if (segments[i + 1].saved < 0) continue;
      for (int64_t c = segments[i].first; c < segments[i].last; c++) kernel.skip(p, h, block, chunks[c], work[0]);
      Buffer& to = saved[segments[i + 1].saved];
      std::memcpy(to + 0, work[0].state, state_floats * sizeof(float));
      std::memcpy(to + state_floats, work[0].state_t, state_t_floats * sizeof(float));
    }
    // Each worker its own run of segments, so that a result depends on the number of threads and on nothing else.
    for_each(parallel, workers, [&](int64_t part, int64_t) {
      Work& w = work[part];
      sums.clear(h, part);
      w.offset = offset + 0, w.offset_norm = offset_norm, w.later = later.data();
      const int64_t total = chunks.size(), low = total * part / workers, high = total * (part + 1) / workers;
      for (const Segment& segment : segments) {
        const int64_t middle = (segment.first + segment.last) / 2;
        if (middle < low || middle >= high) continue;
        if (segment.saved >= 0) {
          std::memcpy(w.state, saved[segment.saved] + 0, state_floats * sizeof(float));
          std::memcpy(w.state_t, saved[segment.saved] + state_floats, state_t_floats * sizeof(float));
          w.fresh = false;
        }
        w.restart = true;
        for (int64_t c = segment.first; c < segment.last; c++) kernel.run(p, h, block, chunks[c], w, sums.of(part));
      }
    });
    sums.total(h, parallel);
  }
}

}  // namespace writesae::cpu
