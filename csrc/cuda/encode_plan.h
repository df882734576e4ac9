// How a call of encode is cut to fit the machine: host arithmetic, the same for the device and its twin.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

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
  int tiles;              // of 16 features
  int segment, segments;  // tokens of a segment; how many, at most
  bool split;             // whether any sequence may have more than one
  int heads;              // at a time
  // Device scratch: where its pieces are, and its size.
  int64_t table_at, unit_at, states_at, reach_at, carries_at, bytes;
};

constexpr int MAX_SIZE = 256;          // of K and V
constexpr int64_t SCRATCH = 17 << 20;  // bytes that each of dictionary and states may take of any call; or, of the
constexpr double DICTIONARY_SHARE = 0.004, STATES_SHARE = 0.005;  // pre-activations (float32) not stored, these shares

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
};

// `candidates`: how many a token needs at least (topk: k and some more; at: one or more). `forced_segment`: 0 to choose.
inline EncodePlan plan_encode(const EncodeParams& p, Precision precision, const Traits& traits, int candidates,
                              const Machine& machine, int forced_segment) {
  EncodePlan plan = {};
  plan.precision = precision;
  plan.depth = padded_size(p.K, p.V);
  plan.tiles = static_cast<int>((p.F + 15) / 16);
  // Shared memory: as many warps a processor as fit with the candidates they need, in two blocks rather than in one.
  const int most = std::max(16, std::min(plan.tiles * 16, 4 * candidates));
  const int least = std::min(candidates, most), stride = traits.rows + 1;
  const auto room = [&](int limit, int warps) { return (limit - traits.fixed_shared(warps) - 256) / (warps * stride * 8); };
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
  plan.shared = traits.fixed_shared(plan.warps) + 2 * ((plan.warps * plan.capacity * stride * 4 + 127) / 128 * 128);
  const int blocks = (plan.shared <= half ? 2 : 1) * machine.processors;

  // Heads at a time, by what their packed dictionaries take; then the segment that takes the least time.
  const auto budget_of = [&](double share) {
    return std::max<int64_t>(SCRATCH, static_cast<int64_t>(share * 4 * p.B * p.T * p.Hs * p.F));
  };
  const int64_t budget = budget_of(DICTIONARY_SHARE), states_budget = budget_of(STATES_SHARE);
  const int64_t dictionary = static_cast<int64_t>(plan.tiles) * p.rank * traits.tile_bytes;
  const int64_t groups = (p.Hs + std::max<int64_t>(1, budget / dictionary) - 1) / std::max<int64_t>(1, budget / dictionary);
  plan.heads = static_cast<int>(std::min<int64_t>((p.Hs + groups - 1) / groups, 65535));
  const int64_t chunk = plan.warps * traits.rows, longest = p.T;
  const auto count = [&](int64_t length) {
    return p.cu_seqlens != nullptr ? p.T / length + p.N : p.B * ((p.T + length - 1) / length);
  };
  const auto state_bytes = [&](int64_t length) { return 4 * count(length) * plan.heads * (p.K * p.V + p.F + 1); };
  int64_t best = longest;
  const auto cost = [&](int64_t length) {
    const int64_t rows = (std::min(length, longest) * p.R + (length < longest ? p.K : 0) + chunk - 1) / chunk * chunk;
    return (count(length) * plan.heads + blocks - 1) / blocks * rows;
  };
  for (int64_t length = 512; length < longest; length *= 2)
    if (state_bytes(length) <= states_budget && cost(length) < cost(best)) best = length;
  if (forced_segment > 0) best = std::min<int64_t>(forced_segment, longest);
  plan.segment = static_cast<int>(best);
  plan.split = best < longest;
  plan.segments = static_cast<int>(count(best));

  int64_t at = padded(dictionary * plan.heads);
  plan.table_at = at, at += padded(plan.segments * 20);
  plan.unit_at = at, at += padded(4 * 512);
  plan.states_at = at, at += plan.split ? padded(4 * int64_t{plan.segments} * plan.heads * p.K * p.V) : 0;
  plan.reach_at = at, at += plan.split ? padded(4 * int64_t{plan.segments} * plan.heads) : 0;
  plan.carries_at = at, at += plan.split ? padded(4 * int64_t{plan.segments} * plan.heads * p.F) : 0;
  plan.bytes = at;
  return plan;
}

}  // namespace writesae::cuda
