// How a call of encode is cut to fit the machine: host arithmetic, the same for the device and its twin.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "encode.h"

namespace writesae::cuda {

struct Machine {
  int processors, block_shared, processor_shared;  // bytes of shared memory a block, a processor
};

struct EncodePlan {
  Precision precision;
  int depth;              // K and V padded to it
  int warps;              // of a block
  int capacity;           // candidates a token
  int shared;             // bytes a block
  int slots;              // blocks that run at once
  int tiles;              // of 16 features
  int segment, segments;  // tokens of a segment; how many, at most
  bool split;             // whether any sequence may have more than one
  int parts, part;        // blocks that share the features of a segment; tiles of one
  int heads;              // at a time
  // Device scratch: where its pieces are, and its size. carries_at is 0 where no block needs them.
  int64_t table_at, unit_at, states_at, reach_at, carries_at, part_keys_at, part_features_at, bytes;
};

constexpr int MAX_SIZE = 256;  // of K and V
// Bytes that dictionary, states and what parts leave to be merged may take of any call; or, of the pre-activations
// (float32) that are not stored, these shares.
constexpr int64_t DICTIONARY_SCRATCH = 17 << 20, STATES_SCRATCH = 24 << 20, PARTS_SCRATCH = 48 << 20;
constexpr double DICTIONARY_SHARE = 0.004, STATES_SHARE = 0.005;
// Time a block spends beside its tiles, in that of a tile, as counted in encode.cu: a chunk's rows, its selection.
constexpr int ROWS_TIME = 4, SELECT_TIME = 24;
constexpr int MOST_PARTS = 32;  // the merge has a lane for each

inline int padded_size(int64_t K, int64_t V) {
  const int64_t size = std::max(K, V);
  return size <= 32 ? 32 : size <= 64 ? 64 : size <= 128 ? 128 : 256;
}

inline int64_t padded(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Of an instance of the kernel (Numbers).
struct Traits {
  int rows;        // of the stream a warp
  int tile_bytes;  // of the packed dictionary
  int (*fixed_shared)(int warps);
  int (*candidate_bytes)(int capacity, bool wide);  // of shared memory a warp
};

// What a test may decide instead of the plan; 0: the plan.
struct Forced {
  int segment, parts;
};

// How long the blocks of a launch take, in tiles.
struct BlockTimes {
  int64_t chunk;  // rows
  int64_t K, R;   // of the call
  bool selects;

  // A segment of so many tokens; not the first of its sequence: from a state. A block has so many tiles of it.
  int64_t of(int64_t tokens, bool from_state, int64_t tiles) const {
    const int64_t chunks = (tokens * R + (from_state ? K : 0) + chunk - 1) / chunk;
    const int64_t selecting = selects ? (tokens * R + chunk - 1) / chunk : 0;
    return chunks * (tiles + ROWS_TIME) + selecting * SELECT_TIME;
  }
};

// The share of the machine's block slots that work, of B sequences of T tokens under a plan: blocks go to slots in the order
// of their launch, each to the first that is free; the work of all over slots times the longest.
inline double plan_busy(const EncodeParams& p, const EncodePlan& plan, const Traits& traits, bool selects) {
  const BlockTimes times = {int64_t{plan.warps} * traits.rows, p.K, p.R, selects};
  double work = 0, room = 0;
  for (int64_t head = 0; head < p.Hs; head += plan.heads) {
    std::vector<int64_t> free(plan.slots, 0);  // a heap, the first to be free on top
    for (int part = 0; part < plan.parts; part++)
      for (int64_t h = head; h < std::min<int64_t>(head + plan.heads, p.Hs); h++)
        for (int64_t b = 0; b < p.B; b++)
          for (int64_t at = 0; at < p.T; at += plan.segment) {
            const int64_t tiles = std::min(plan.part, plan.tiles - part * plan.part);
            const int64_t time = times.of(std::min<int64_t>(plan.segment, p.T - at), at > 0, tiles);
            std::pop_heap(free.begin(), free.end(), std::greater<int64_t>());
            free.back() += time;
            std::push_heap(free.begin(), free.end(), std::greater<int64_t>());
            work += static_cast<double>(time);
          }
    room += static_cast<double>(plan.slots) * static_cast<double>(*std::max_element(free.begin(), free.end()));
  }
  return work / room;
}

// `selects`: the k largest of a token (and then features may be shared by blocks). `candidates`: how many a token needs at
// least (topk: k and some more; at: one or more).
inline EncodePlan plan_encode(const EncodeParams& p, Precision precision, const Traits& traits, bool selects, int candidates,
                              const Machine& machine, const Forced& forced) {
  EncodePlan plan = {};
  plan.precision = precision;
  plan.depth = padded_size(p.K, p.V);
  plan.tiles = static_cast<int>((p.F + 15) / 16);
  // Shared memory: as many warps a processor as fit with the candidates they need, in two blocks rather than in one.
  const auto eights = [](int x) { return (x + 7) / 8 * 8; };
  const bool wide = p.F > 65536;
  const int most = std::max(16, std::min(plan.tiles * 16, eights(4 * candidates)));
  const int least = std::min(eights(candidates), most);
  const auto room = [&](int limit, int warps) {
    return std::max(0, (limit - traits.fixed_shared(warps) - 128) / (warps * traits.candidate_bytes(8, wide)) * 8);
  };
  const int half = machine.processor_shared / 2 - 1024, whole = machine.block_shared;
  const struct {
    int limit, warps, spare;  // spare: where few more candidates fit than are needed, the bar is raised too often
  } ways[] = {{half, 4, 8}, {half, 3, 8}, {whole, 4, 0}, {half, 2, 0}, {whole, 3, 0}, {whole, 2, 0}, {whole, 1, 0}};
  for (const auto& way : ways) {
    plan.warps = way.warps;
    plan.capacity = room(way.limit, way.warps);
    if (plan.capacity >= std::min(least + way.spare, most)) break;
  }
  if (plan.capacity < least)
    throw std::runtime_error("encode: k = " + std::to_string(p.k) + " needs more shared memory than this device has (" +
                             std::to_string(machine.block_shared) + " bytes); use a smaller k or backend=\"reference\"");
  plan.capacity = std::min(plan.capacity, most);
  plan.shared =
      traits.fixed_shared(plan.warps) + (plan.warps * traits.candidate_bytes(plan.capacity, wide) + 127) / 128 * 128;
  plan.slots = (plan.shared <= half ? 2 : 1) * machine.processors;

  // Heads at a time, at most as many as their packed dictionaries allow; segments and parts: what takes the least time.
  const double unstored = 4.0 * static_cast<double>(p.B * p.T * p.Hs * p.F);
  const int64_t budget = std::max(DICTIONARY_SCRATCH, static_cast<int64_t>(DICTIONARY_SHARE * unstored));
  const int64_t states_budget = std::max(STATES_SCRATCH, static_cast<int64_t>(STATES_SHARE * unstored));
  const int64_t dictionary = static_cast<int64_t>(plan.tiles) * p.rank * traits.tile_bytes;
  const int64_t most_heads = std::min(std::max<int64_t>(1, budget / dictionary), int64_t{65535});
  const int64_t least_groups = (p.Hs + most_heads - 1) / most_heads;
  const int64_t chunk = plan.warps * traits.rows, longest = std::max<int64_t>(p.T, 1);
  const BlockTimes times = {chunk, p.K, p.R, selects};
  const auto count = [&](int64_t length) {
    return p.cu_seqlens != nullptr ? p.T / length + p.N : p.B * ((longest + length - 1) / length);
  };
  const auto state_bytes = [&](int64_t length, int64_t heads) {
    return 4 * count(length) * heads * (p.K * p.V + 2 * p.F + 1);
  };
  const auto part_bytes = [&](int parts, int64_t heads) { return 8 * p.B * p.T * heads * p.k * parts; };
  int64_t best = longest, best_heads = 1, best_cost = -1;
  int best_parts = 1;
  const auto consider = [&](int64_t length, int parts, int64_t groups, int64_t heads) {
    const int64_t tiles = (plan.tiles + parts - 1) / parts, blocks = count(length) * heads * parts;
    // As many rounds as the blocks need, each as long as the longest of them; sums of segments, the merge of parts.
    int64_t cost =
        (blocks + plan.slots - 1) / plan.slots * times.of(std::min(length, longest), length < longest, tiles * p.rank);
    if (length < longest) cost += p.B * p.T * p.R * heads * plan.tiles * p.rank / (chunk * plan.slots * 25);
    if (parts > 1) cost += 4 + p.B * p.T * heads * p.k * parts / 1000000;
    cost *= groups;
    if (best_cost < 0 || cost < best_cost) best = length, best_parts = parts, best_heads = heads, best_cost = cost;
  };
  const int64_t unit = std::max<int64_t>(1, chunk / std::max<int64_t>(p.R, 1));
  for (int64_t groups = least_groups; groups <= least_groups + std::min<int64_t>(least_groups - 1, 4); groups++) {
    const int64_t heads = (p.Hs + groups - 1) / groups;
    for (int parts = 1; parts <= (selects ? MOST_PARTS : 1); parts *= 2) {
      if (parts > 1 && (parts * 2 > plan.tiles || part_bytes(parts, heads) > PARTS_SCRATCH)) break;
      consider(longest, parts, groups, heads);
      for (int64_t n = 1; n * unit < longest; n += std::max<int64_t>(1, n / 16))
        if (state_bytes(n * unit, heads) <= states_budget) consider(n * unit, parts, groups, heads);
    }
  }
  plan.heads = static_cast<int>(best_heads);
  if (forced.segment > 0) best = std::min<int64_t>(forced.segment, longest), best_parts = 1;
  if (forced.parts > 0 && selects) best_parts = std::min(forced.parts, MOST_PARTS);
  plan.part = (plan.tiles + best_parts - 1) / best_parts;
  plan.parts = (plan.tiles + plan.part - 1) / plan.part;
  plan.segment = static_cast<int>(best);
  plan.split = best < longest;
  plan.segments = static_cast<int>(count(best));
  const bool chunks = plan.split || p.T * p.R + p.edits.count > chunk;  // a block may have more than one

  int64_t at = padded(dictionary * plan.heads);
  const auto take = [&](int64_t bytes) {
    const int64_t begin = at;
    at += padded(bytes);
    return begin;
  };
  const int64_t blocks = int64_t{plan.segments} * plan.heads;
  plan.table_at = take(plan.segments * 20);
  plan.unit_at = take(4 * 512);
  plan.states_at = take(plan.split ? 4 * blocks * p.K * p.V : 0);
  plan.reach_at = take(plan.split ? 4 * blocks : 0);
  plan.carries_at = chunks ? take(4 * blocks * 2 * p.F) : 0;
  plan.part_keys_at = take(plan.parts > 1 ? part_bytes(plan.parts, plan.heads) / 2 : 0);
  plan.part_features_at = take(plan.parts > 1 ? part_bytes(plan.parts, plan.heads) / 2 : 0);
  plan.bytes = at;
  return plan;
}

}  // namespace writesae::cuda
