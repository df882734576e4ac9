// encode on the CPU: scheduling here, arithmetic in encode_kernel.h.
#include "encode.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "cpu/bf16.h"
#include "cpu/isa.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"
#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace writesae::cpu {
namespace {

constexpr int PANEL = 16;             // atoms
constexpr int64_t SMALL = 8;          // rows a call may have and still leave the dictionary unpacked
constexpr int64_t OWN_ROWS = 96;      // rows a head goes on by at once with a thread to itself: keys stay in its cache
constexpr int64_t SHARED_ROWS = 384;  // with all threads: fewer barriers, keys in the shared cache
constexpr int64_t EVERY_MT = 48;      // what both are multiples of: rows of a register tile of every kernel
constexpr int64_t KEY_BYTES = int64_t{8} << 20;   // of keys kept then, whatever F
constexpr int64_t SCRATCH_ROWS = PANEL + 1;       // of packing
constexpr int64_t PART = 4;                       // tokens an item of selection takes
constexpr int64_t ALONE_FLOATS = 1 << 20;         // of dictionary that one thread reads alone when the call is small
constexpr int64_t OWN_BYTES = int64_t{48} << 20;  // scratch up to which every thread takes a head of its own

// Steps of a row of `size` bfloat16 in pairs: whole tiles of AMX.
inline int64_t pair_steps(int64_t size) { return round_up(size, 32) / 2; }

}  // namespace

#define WRITESAE_PAIRS 0
#define WRITESAE_KERNEL "cpu/encode_kernel.h"
#include "cpu/each_isa.h"

#undef WRITESAE_PAIRS
#define WRITESAE_PAIRS 1
namespace portable_pairs {
#define WRITESAE_LANES 4
#include "cpu/simd.h"

#include "cpu/encode_pack_kernel.h"
#undef WRITESAE_LANES
}  // namespace portable_pairs

#if defined(__x86_64__)
WRITESAE_TARGET_BEGIN_AVX512_BF16
namespace avx512_bf16 {
#define WRITESAE_LANES 16
#include "cpu/simd.h"

#include "cpu/encode_kernel.h"
#undef WRITESAE_LANES
}  // namespace avx512_bf16
WRITESAE_TARGET_END
#endif

#if WRITESAE_AMX
WRITESAE_TARGET_BEGIN_AMX
namespace amx {
namespace base = avx512;
namespace pairs = portable_pairs;

// One tile of sums, 0, and one each of rows and atoms. The compiler does not know what memory these instructions touch.
struct Tiles {
  static void begin() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64};
      uint8_t rows[16] = {16, 16, 16};
    } shape;
    __asm__ volatile("" ::: "memory");
    _tile_loadconfig(&shape);
  }
  static void end() { _tile_release(); }
  static void zero() { _tile_zero(0); }
  static void multiply_add(const float* rows, int64_t stride, const float* atoms) {
    _tile_loadd(1, rows, static_cast<int>(stride * sizeof(float)));
    _tile_loadd(2, atoms, 64);
    _tile_dpbf16ps(0, 1, 2);
  }
  static void store(float* to) {
    _tile_stored(0, to, 64);
    __asm__ volatile("" ::: "memory");
  }
};

#include "cpu/encode_tiles_kernel.h"
}  // namespace amx
WRITESAE_TARGET_END
#endif

namespace plain_tiles {
namespace base = portable;
namespace pairs = portable_pairs;

struct Tiles {
  float sums[16][PANEL];

  static void begin() {}
  static void end() {}
  void zero() { std::memset(sums, 0, sizeof(sums)); }
  void multiply_add(const float* rows, int64_t stride, const float* atoms) {
    for (int i = 0; i < 16; i++)
      for (int j = 0; j < 16; j++)
        for (int f = 0; f < PANEL; f++) {
          const uint32_t x = portable::float_to_bits(rows[i * stride + j]);
          const uint32_t y = portable::float_to_bits(atoms[j * PANEL + f]);
          sums[i][f] += portable::bits_to_float(x << 16) * portable::bits_to_float(y << 16);
          sums[i][f] += portable::bits_to_float(x & 0xffff0000u) * portable::bits_to_float(y & 0xffff0000u);
        }
  }
  void store(float* to) const { std::memcpy(to, sums, sizeof(sums)); }
};

#include "cpu/encode_tiles_kernel.h"
}  // namespace plain_tiles

namespace {

// The kernels of one instruction set.
struct Kernels {
  int64_t tile;  // rows of a register tile
  decltype(&portable::steps) steps;
  decltype(&portable::pack_panel) pack_panel;
  decltype(&portable::pack_rows) pack_rows;
  decltype(&portable::run_panel) run_panel;
  decltype(&portable::pack_gates) pack_gates;
  decltype(&portable::run_panel_channels) run_panel_channels;
  decltype(&portable::run_panel_unpacked) run_panel_unpacked;
  decltype(&portable::select_largest) select_largest;
  decltype(&portable::select_above) select_above;
  decltype(&portable::pick) pick;
  decltype(&portable::to_key_scalar) to_key;
};

#define WRITESAE_KERNELS(name)                                                                                             \
  Kernels {                                                                                                                \
    name::MT, name::steps, name::pack_panel, name::pack_rows, name::run_panel, name::pack_gates, name::run_panel_channels, \
        name::run_panel_unpacked, name::select_largest, name::select_above, name::pick, name::to_key_scalar                \
  }

Kernels kernels() { return WRITESAE_OF_ISA(WRITESAE_KERNELS); }

// The same with products of bfloat16. Where these round alone, the packing does it, as EncodeParams::bf16 says.
Kernels bf16_kernels() {
  Kernels chosen = kernels();
  const Bf16 unit = bf16();
  if (unit == Bf16::rounded) return chosen;
  chosen.steps = pair_steps;
  chosen.pack_panel = portable_pairs::pack_panel;
  if (unit == Bf16::tiles) {
    chosen.tile = plain_tiles::MT;
    chosen.pack_rows = plain_tiles::pack_rows, chosen.run_panel = plain_tiles::run_panel;
  }
#if defined(__x86_64__)
  if (unit == Bf16::avx512_bf16) {
    chosen.tile = avx512_bf16::MT, chosen.pack_panel = avx512_bf16::pack_panel;
    chosen.pack_rows = avx512_bf16::pack_rows, chosen.run_panel = avx512_bf16::run_panel;
  }
#endif
#if WRITESAE_AMX
  if (unit == Bf16::amx) {
    chosen.tile = amx::MT;
    chosen.pack_rows = amx::pack_rows, chosen.run_panel = amx::run_panel;
  }
#endif
  return chosen;
}

// What is the same for all heads.
struct Plan {
  const EncodeParams& p;
  EncodeFound* found;
  Kernels kernel;
  int64_t panels, depth, stride, select_bytes;

  Plan(const EncodeParams& params, EncodeFound* f)
      : p(params),
        found(f),
        kernel(params.bf16 && !params.channels ? bf16_kernels() : kernels()) {
    panels = (p.F + 15) / 16;
    depth = 1;
    if (p.k > 0)
      while (depth < 64 && p.F / (2 * depth) >= 4 * p.k) depth *= 2;
    stride = round_up(p.F, 16 * depth);
    // Entries; maxima of groups; groups and places.
    select_bytes = round_up((stride + 16) * 8 + stride * 4 + (2 * stride + 16) * 4, 64);
  }

  int64_t v_size() const { return p.rank * kernel.steps(p.K) * 16; }
  int64_t w_size() const { return p.rank * kernel.steps(p.V) * 16; }
  int64_t left_size() const { return kernel.steps(p.K) * kernel.tile; }
  int64_t right_size() const { return kernel.steps(p.V) * kernel.tile; }
  int64_t gate_size() const { return p.channels ? p.K * kernel.tile : 0; }
  int64_t tile_size() const { return left_size() + right_size() + gate_size(); }
  // What a panel carries from block to block: activations, or S w.
  int64_t carry_size() const { return p.channels ? p.rank * p.K * PANEL : PANEL; }
  // Bytes run_head needs beyond selection, which needs select_bytes a thread.
  int64_t head_bytes(int64_t rows) const {
    const int64_t floats =
        panels * (v_size() + w_size() + carry_size()) + 2 * (rows / kernel.tile) * tile_size() + (rows + 2) * stride;
    return floats * 4 + 64 * 16;
  }
  int64_t worker_bytes() const {
    return round_up(std::max(select_bytes, SCRATCH_ROWS * round_up(std::max(p.K, p.V), 32) * 4), 64);
  }

  void fill_limits(int64_t h, float* bias, int32_t* limits) const {
    for (int64_t f = 0; f < stride; f++) {
      const bool exists = f < p.F;
      bias[f] = exists && p.b_enc != nullptr ? p.b_enc[h * p.F + f] + 0.0f : 0.0f;  // + 0: no -0
      limits[f] = exists && p.threshold != nullptr ? kernel.to_key(p.threshold[h * p.F + f]) : INT_MAX;
    }
  }

  // Selects from the keys of one token. `values`, `indices` and the return value (their number) are for a threshold.
  int64_t select(int64_t h, int64_t token, int32_t* keys, const int32_t* limits, int32_t& hint, char* memory,
                 std::vector<float>& values, std::vector<int32_t>& indices) const {
    const int64_t place = token * p.Hs + h;
    for (int64_t f = p.F; f < stride; f++) keys[f] = INT_MIN;  // after the fact: 0 times infinity may be there
    if (p.k > 0) {
      kernel.select_largest(keys, stride, depth, p.k, hint, memory, p.values + place * p.k, p.indices + place * p.k);
    } else if (p.threshold != nullptr) {
      return found->counts[place] = kernel.select_above(keys, limits, stride, values, indices);
    } else {
      kernel.pick(keys, p.at + place * p.m, p.m, p.values + place * p.m);
    }
    return 0;
  }

  void append(int64_t h, const std::vector<float>& values, const std::vector<int32_t>& indices) const {
    found->values[h].insert(found->values[h].end(), values.begin(), values.end());
    found->indices[h].insert(found->indices[h].end(), indices.begin(), indices.end());
  }
};

// One head from its first row to its last. Two parallel regions a block: panels; then selection, beside the packing of
// the next block's rows. A barrier between them, and never a split along time, keeps the running sum the same whatever
// the number of threads.
void run_head(const Plan& plan, int64_t h, int64_t block_rows, const Parallel& parallel, Arena& arena, char* worker_memory) {
  const EncodeParams& p = plan.p;
  const Kernels& kernel = plan.kernel;
  const int64_t v_size = plan.v_size(), w_size = plan.w_size(), tile_size = plan.tile_size();
  const int64_t tiles = block_rows / kernel.tile, worker_bytes = plan.worker_bytes();
  arena.clear();
  float* v = arena.take<float>(plan.panels * v_size);
  float* w = arena.take<float>(plan.panels * w_size);
  float* carry = arena.take<float>(plan.panels * plan.carry_size());
  float* packed[2] = {arena.take<float>(tiles * tile_size), arena.take<float>(tiles * tile_size)};
  float* bias = arena.take<float>(plan.stride);
  int32_t* limits = arena.take<int32_t>(plan.stride);
  int32_t* keys = arena.take<int32_t>(block_rows * plan.stride);
  plan.fill_limits(h, bias, limits);
  const auto scratch = [&](int64_t worker) { return worker_memory + worker * worker_bytes; };
  const auto left_of = [&](int which) { return packed[which]; };
  const auto right_of = [&](int which) { return packed[which] + tiles * plan.left_size(); };
  const auto gates_of = [&](int which) { return right_of(which) + tiles * plan.right_size(); };

  Block blocks[2];
  Stream stream(p, p.heads[h], kernel.tile);
  std::vector<int32_t> hints(parallel.threads, 0);
  std::vector<std::vector<float>> values((block_rows + PART - 1) / PART);
  std::vector<std::vector<int32_t>> indices(values.size());
  const auto pack_rows = [&](int which, int64_t tile, int64_t worker) {
    float* const row = reinterpret_cast<float*>(scratch(worker));
    kernel.pack_rows(p, blocks[which], tile, row, left_of(which) + tile * plan.left_size(),
                     right_of(which) + tile * plan.right_size());
    if (p.channels) kernel.pack_gates(p, blocks[which], tile, row, gates_of(which) + tile * plan.gate_size());
  };
  const auto tiles_of = [&](int which) {
    return (static_cast<int64_t>(blocks[which].rows.size()) + kernel.tile - 1) / kernel.tile;
  };

  int now = 0;
  bool more = stream.next(blocks[now], block_rows);
  for_each(parallel, plan.panels + tiles_of(now), [&](int64_t i, int64_t worker) {
    float* rows = reinterpret_cast<float*>(scratch(worker));
    if (i >= plan.panels) {
      pack_rows(now, i - plan.panels, worker);
      return;
    }
    kernel.pack_panel(p.v_enc, h, i, p.F, p.rank, p.K, p.bf16, rows, v + i * v_size);
    kernel.pack_panel(p.w_enc, h, i, p.F, p.rank, p.V, p.bf16, rows, w + i * w_size);
  });
  while (more) {
    const Block& block = blocks[now];
    for_each(parallel, plan.panels, [&](int64_t i, int64_t) {
      if (p.channels) {
        kernel.run_panel_channels(p, block, h, i, v + i * v_size, w + i * w_size, left_of(now), right_of(now), gates_of(now),
                                  bias + i * 16, carry + i * plan.carry_size(), keys, plan.stride);
      } else {
        kernel.run_panel(p, block, h, i, v + i * v_size, w + i * w_size, left_of(now), right_of(now), bias + i * 16,
                         carry + i * 16, keys, plan.stride);
      }
    });
    more = stream.next(blocks[1 - now], block_rows);
    const int64_t slots = block.tokens.size(), parts = (slots + PART - 1) / PART;
    for_each(parallel, parts + tiles_of(1 - now), [&](int64_t i, int64_t worker) {
      if (i >= parts) {
        pack_rows(1 - now, i - parts, worker);
        return;
      }
      values[i].clear();
      indices[i].clear();
      for (int64_t s = i * PART; s < std::min((i + 1) * PART, slots); s++)
        plan.select(h, block.tokens[s], keys + s * plan.stride, limits, hints[worker], scratch(worker), values[i],
                    indices[i]);
    });
    if (p.threshold != nullptr)
      for (int64_t i = 0; i < parts; i++) plan.append(h, values[i], indices[i]);
    now = 1 - now;
  }
}

// All heads of a call so short that reading the dictionary once is the whole work: decoding.
void run_small(const Plan& plan, const Parallel& parallel) {
  const EncodeParams& p = plan.p;
  const int64_t stride = plan.stride;
  const int64_t together = std::clamp<int64_t>((int64_t{4} << 20) / (SMALL * stride), 1, p.Hs);
  Arena arena(together * ((SMALL * (p.K + p.V) + (SMALL + 2) * stride) * 4 + 64 * 5));
  Arena memory(plan.worker_bytes() * parallel.threads);
  char* worker_memory = memory.take<char>(0);
  for (int64_t h0 = 0; h0 < p.Hs; h0 += together) {
    const int64_t members = std::min(together, p.Hs - h0);
    arena.clear();
    std::vector<Block> blocks(members);
    std::vector<float*> left(members), right(members), bias(members);
    std::vector<int32_t*> keys(members), limits(members);
    for (int64_t i = 0; i < members; i++) {
      left[i] = arena.take<float>(SMALL * p.K), right[i] = arena.take<float>(SMALL * p.V);
      bias[i] = arena.take<float>(stride);
      keys[i] = arena.take<int32_t>(SMALL * stride), limits[i] = arena.take<int32_t>(stride);
      plan.fill_limits(h0 + i, bias[i], limits[i]);
      Stream(p, p.heads[h0 + i]).next(blocks[i], SMALL);
      for (size_t r = 0; r < blocks[i].rows.size(); r++) {
        const Row& row = blocks[i].rows[r];
        portable::convert_in(row.left_type, row.left, left[i] + r * p.K, p.K);
        portable::convert_in(row.right_type, row.right, right[i] + r * p.V, p.V);
        if (!p.bf16) continue;
        portable::round_to_bfloat(left[i] + r * p.K, p.K);
        portable::round_to_bfloat(right[i] + r * p.V, p.V);
      }
    }
    for_each(parallel, members * plan.panels, [&](int64_t item, int64_t worker) {
      const int64_t i = item / plan.panels, panel = item % plan.panels;
      plan.kernel.run_panel_unpacked(p, blocks[i], h0 + i, panel, left[i], right[i], bias[i] + panel * 16,
                                     reinterpret_cast<float*>(worker_memory + worker * plan.worker_bytes()), keys[i],
                                     stride);
    });
    std::vector<std::vector<float>> values(members);
    std::vector<std::vector<int32_t>> indices(members);
    for_each(parallel, members, [&](int64_t i, int64_t worker) {
      int32_t hint = 0;
      for (size_t s = 0; s < blocks[i].tokens.size(); s++)
        plan.select(h0 + i, blocks[i].tokens[s], keys[i] + s * stride, limits[i], hint,
                    worker_memory + worker * plan.worker_bytes(), values[i], indices[i]);
    });
    if (p.threshold != nullptr)
      for (int64_t i = 0; i < members; i++) plan.append(h0 + i, values[i], indices[i]);
  }
}

}  // namespace

void encode(const EncodeParams& p, EncodeFound* found, const Parallel& parallel) {
  const Plan plan(p, found);
  for (int64_t n = 0; n < p.N && p.cu_seqlens != nullptr && !p.channels; n++)
    if (p.cu_seqlens[n] == p.cu_seqlens[n + 1])
      for (int64_t i = n * p.Hs * p.F; i < (n + 1) * p.Hs * p.F; i++)
        p.carry_out[i] = p.carry_in != nullptr ? p.carry_in[i] : 0.0f;
  if (!p.channels && p.B * p.T * p.R + p.edits.count <= SMALL) {
    // Reading a small dictionary takes a tenth of a millisecond: waking other threads can take longer.
    const bool alone = p.Hs * p.F * p.rank * (p.K + p.V) <= ALONE_FLOATS;
    run_small(plan, alone ? Parallel{1, nullptr} : parallel);
    return;
  }
  // A head to every thread where that leaves none idle; else all threads on one head at a time.
  const int64_t threads = std::max(1, parallel.threads);
  const bool even = p.Hs % threads == 0 || p.Hs >= 4 * threads;
  const bool own = threads == 1 || (even && threads * (plan.head_bytes(OWN_ROWS) + plan.worker_bytes()) <= OWN_BYTES);
  Arena memory(plan.worker_bytes() * threads);
  char* worker_memory = memory.take<char>(0);
  if (!own) {
    const int64_t fit = KEY_BYTES / (plan.stride * 4) / EVERY_MT * EVERY_MT;
    const int64_t rows = std::clamp<int64_t>(fit, EVERY_MT, SHARED_ROWS);
    Arena arena(plan.head_bytes(rows));
    for (int64_t h = 0; h < p.Hs; h++) run_head(plan, h, rows, parallel, arena, worker_memory);
    return;
  }
  std::vector<Arena> arenas;
  for (int64_t i = 0; i < std::min(threads, p.Hs); i++) arenas.emplace_back(plan.head_bytes(OWN_ROWS));
  for_each(parallel, p.Hs, [&](int64_t h, int64_t worker) {
    run_head(plan, h, OWN_ROWS, Parallel{1, nullptr}, arenas[worker], worker_memory + worker * plan.worker_bytes());
  });
}

}  // namespace writesae::cpu
