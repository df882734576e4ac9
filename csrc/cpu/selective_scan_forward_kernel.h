// The forward's kernel, compiled for each instruction set by selective_scan.cpp (no include guard on purpose).
#include "cpu/transpose_kernel.h"

#include "cpu/selective_scan_kernel.h"

inline int64_t forward_memory(int64_t K, int64_t width) {
  const int64_t padded = (width + 15) / 16 * 16;
  return block_floats(K, width) + (3 * TILE + 1) * padded + 2 * TILE * ((K + 15) / 16 * 16) + 4 * TILE;
}

// Channels [channel, channel + width) of one sequence. shots: its snapshots, by position.
inline void forward_block(const SelectiveScanParams& p, const Sequence& s, int64_t channel, int64_t width, float* memory) {
  const int64_t K = p.K, V = p.V;
  const Block block = open_block(p, channel, width, memory);
  const int64_t ld = block.ld;
  float* const dt = memory + block_floats(K, width);
  float* const u = dt + TILE * ld;
  float* const o = u + TILE * ld;
  float* const row = o + TILE * ld;
  float* const B = row + ld;
  float* const C = B + TILE * K;
  float* const line = C + TILE * K;
  load_state(block, p.initial_state == nullptr ? nullptr : p.initial_state + s.n * K * V, V);
  const EditRange range = edits_of(p.edits, s.n, 0);
  int64_t edit = range.begin;
  const int64_t* shot = s.shots;
  for (int64_t first = 0; first < s.length; first += TILE) {
    const int64_t count = s.length - first < TILE ? s.length - first : TILE, origin = s.origin + first;
    load_tile(p.dt, s.b, origin, count, channel, width, ld, ld, dt, line);
    load_tile(p.x, s.b, origin, count, channel, width, ld, ld, o, line);
    for (int64_t t = 0; t < count; t++) {
      convert_in(p.write.type, p.write.at(s.b, origin + t, 0), B + t * K, K);
      convert_in(p.read.type, p.read.at(s.b, origin + t, 0), C + t * K, K);
    }
    for (int64_t i = 0; i < count * ld; i += LANES) store(u + i, load(dt + i) * load(o + i));
    for (int64_t c = 0; c < ld; c++) row[c] = c < width && p.skip != nullptr ? p.skip[channel + c] : 0.0f;
    for (int64_t t = 0; t < count; t++)
      for (int64_t c = 0; c < ld; c += LANES)
        store(o + t * ld + c, p.skip == nullptr ? Vec{} : load(o + t * ld + c) * load(row + c));
    for (int64_t e = edit; e < range.end && position(p.edits, e) < first + count; e++)
      if (p.edits.kind(e).removes()) std::memset(u + (position(p.edits, e) - first) * ld, 0, ld * sizeof(float));
    for (int64_t t = 0; t < count && p.right != nullptr; t++)
      std::memcpy(p.right + (s.b * p.T + origin + t) * V + channel, u + t * ld, width * sizeof(float));

    for (int64_t at = 0; at < count;) {
      // Up to and with the next token at which something stands.
      int64_t stop = count;
      if (edit < range.end) stop = std::min(stop, position(p.edits, edit) - first + 1);
      if (shot < s.shots_end) stop = std::min(stop, p.places[2 * *shot + 1] - first + 1);
      for (int64_t v = 0; v < block.vectors; v++) {
        const int64_t part = at * ld + v * LANES;
        const Run run = {K,          stop - at,
                         ld,         dt + part,
                         u + part,   B + at * K,
                         C + at * K, block.rates + v * K * LANES,
                         o + part,   block.state + v * K * LANES};
        advance<true>(run, load(block.bound + v * LANES));
      }
      at = stop;
      const int64_t last = at - 1, here = edit;
      while (edit < range.end && position(p.edits, edit) == first + last) edit++;
      bool kept = true;
      for (int64_t e = here; e < edit; e++) {
        kept = kept && !p.edits.kind(e).removes_after();
        if (!p.edits.kind(e).adds() || p.edits.kind(e).after()) continue;
        load_right(block, p.edits, V, e, row);
        const float* left = p.edits.left + e * K;
        float reach = 0;
        for (int64_t n = 0; n < K; n++) reach += C[last * K + n] * left[n];
        for (int64_t c = 0; c < ld; c += LANES) store(o + last * ld + c, load(o + last * ld + c) + load(row + c) * reach);
        add_outer(block, block.state, 1, left, row);
      }
      if (!kept) add_outer(block, block.state, -1, B + last * K, u + last * ld);
      for (int64_t e = here; e < edit; e++) {
        if (!p.edits.kind(e).adds() || !p.edits.kind(e).after()) continue;
        load_right(block, p.edits, V, e, row);
        add_outer(block, block.state, 1, p.edits.left + e * K, row);
      }
      for (; shot < s.shots_end && p.places[2 * *shot + 1] == first + last; shot++)
        store_state(block, block.state, p.snapshots + *shot * K * V, V);
    }
    for (int64_t t = 0; t < count; t++) {
      const int64_t to = (s.b * p.T + origin + t) * V + channel;
      convert_out(p.x.type, o + t * ld, static_cast<char*>(p.o) + to * element_size(p.x.type), width);
    }
  }
  store_state(block, block.state, p.final_state + s.n * K * V, V);
}
