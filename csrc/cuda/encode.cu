// encode on CUDA: what it costs, and its launches.
//
// Arithmetic, a token and head, K = V = 128, F = 2,048, bf16 products: 2 (K + V) F = 1.05 MFLOP of matrix products, 1 KB in
// (float32 writes), 0.4 KB out at k = 32. Arithmetic intensity is no worry; keeping the matrix units busy is, since each
// of the 2,048 sums must also be multiplied, scanned, compared. Everything below is computed, not measured.
//
// Floor. Sums of the compiler's own stall counts on the path of a warp (sm_90, bf16, depth 128, by nvdisasm's control bits),
// a tile of 16 features x 32 rows at a time; steps of selection counted on the host twin over 1,024 tokens with gates that
// forget in some 12, first chunk included. What latencies and shared pipes add is not in it.
//    a tile: 150 to wait for it and fetch another; 220 for the running sum; 145 to find what passes; 81 for each of 1.5 rounds
//        of appending (two entries a lane); 80 to see whether a buffer is full; 413 for 64 products (6.4 cycles each), 100
//        before and 125 after them: 1,350, 128 times                                                   173,000 cycles
//    bars: 4.3 raises of 4,300 beside what they count, 17 counts of 1,070                                 37,000
//    the k largest sorted in registers, written out                                                        9,000
// 219,000 cycles for 33.5 MFLOP, two warps a scheduler: 275 TFLOP/s on an H100 (132 processors, 1.7 GHz), 16 heads x 32,768
// tokens in 2.1 ms. Bars that started open, a round an entry, searches through generic loads and a sort by ranks made it
// 391,000 (176,000; 3.5 rounds of 102; 7.9 raises of 19,000; 20,000) and 154 TFLOP/s: 1.79 times as much. With gates that
// forget in 600 tokens, or in one, 1.75 and 1.80 times. So the products' own time, 53,000, is a quarter: what would lift it
// further is a running sum that stays in registers over more rows, bars compared before values pass through memory, wgmma.
//
// Bars. The lowest k-th largest of the chunk before (128 rows), less a quarter of itself, is where the next chunk begins:
// 5 to 10 % of the activations pass it, then bars rise. Tokens left with fewer than k candidates are done again with an open
// bar, the whole chunk with them; from its carry, which is why running sums have two places by turns. Of the default
// dictionary's and of synthetic tokens none was (1,024 each); 0.7 times the last token's k-th largest, which passes fewer,
// would have to do 30 to 70 % of chunks again, since one token of 128 is enough.
//
// Operands. 128 registers a lane hold a warp's 32 rows (K + V = 256, bf16); the dictionary comes by 16 features through
// shared memory, in the order of fragments, 16 bytes a lane: no conflicts, and 4 KB read for every 32 products. From L2:
// F (K + V) 2 = 1 MB for each block's 128 rows: 4.3 GB in all of that example, 2.1 TB/s of the 5 or so that L2 gives.
// Device memory: writes in, codes out, 0.7 GB: 0.2 ms. Two blocks of 4 warps a processor (255 registers a lane; 24 KB of
// tiles, 9 KB of activations, 76 KB of candidates of 6 bytes a block): when one selects, the other multiplies.
// fp32 takes 6 products in place of 1 and a quarter of the rows a warp (Numbers): about 80 TFLOP/s, 7 ms.
//
// Plans (encode_plan.h). A block walks its segment; between its warps one barrier a tile. Where heads are too few for the
// machine, sequences are cut into segments, whose start states (32 KFLOP a token, as rows of the stream: K more a segment)
// cost a chunk each; and features are shared by blocks, whose lists another kernel merges (encode_merge.cu). Of 264 slots,
// K = V = 128, F = 2,048, k = 32, bf16: 16 heads x 1,024 tokens, 4 segments and 4 parts, 91 % busy; x 8,192, 16 segments, 96;
// x 32,768, 16 segments, 97; 288 heads, 16 to 288 at a time, 91 to 97; one head 94 to 97 (tests print it). What is stored
// beside the outputs: the packed dictionary, a state and 2 F sums a segment (0.9 % of the pre-activations at 32,768 tokens),
// lists of parts (at most 48 MB).
//
// Threshold mode runs twice, to count and to fill, with one number read by the host between them. Top k and chosen features
// never wait, and can be captured.
#include "encode_launch.h"

namespace writesae::cuda {
namespace {

Forced forced = {};

Machine machine() {
#if defined(__CUDACC__)
  static thread_local int known = -1;
  static thread_local Machine it;
  int device = 0;
  tile::check(cudaGetDevice(&device), "encode");
  if (device != known) {
    const auto read = [&](cudaDeviceAttr what) {
      int value = 0;
      tile::check(cudaDeviceGetAttribute(&value, what, device), "encode");
      return value;
    };
    it = {read(cudaDevAttrMultiProcessorCount), read(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          read(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
    known = device;
  }
  return it;
#else
  return {tile::multiprocessors(), static_cast<int>(tile::shared_limit()), static_cast<int>(tile::processor_shared())};
#endif
}

bool decodes(const EncodeParams& p) { return p.T == 1 && p.cu_seqlens == nullptr && p.N <= 65535; }

Kernel kernel_of(const EncodeParams& p, Precision precision, EncodeMode mode) {
  const int depth = padded_size(p.K, p.V);
  const bool topk = mode == EncodeMode::topk;
  return precision == Precision::bf16   ? encode_kernel_bf16(depth, topk)
         : precision == Precision::tf32 ? encode_kernel_tf32(depth, topk)
                                        : encode_kernel_fp32(depth, topk);
}

EncodePlan plan_of(const EncodeParams& p, Precision precision, EncodeMode mode, const Kernel& kernel) {
  const bool selects = mode == EncodeMode::topk;
  const int64_t candidates = selects ? p.k + SLACK + TILE : mode == EncodeMode::at ? 16 : 1;
  return plan_encode(p, precision, kernel.traits, selects, static_cast<int>(candidates), machine(), forced);
}

// One block: n is the number of tokens and heads of a call.
constexpr int SCAN_THREADS = 1024, SCAN_EACH = 8;
__global__ void __launch_bounds__(SCAN_THREADS) offsets_kernel(const int64_t* counts, int64_t n, int64_t* offsets) {
  tile::Shared shared;
  int64_t* sums = shared.take<int64_t>(tile::WARP);
  int64_t done = 0;
  for (int64_t start = 0; start < n; start += SCAN_THREADS * SCAN_EACH) {
    const int64_t first = start + tile::thread() * SCAN_EACH;
    int64_t own = 0;
    for (int64_t i = first; i < first + SCAN_EACH && i < n; i++) own += counts[i];
    int64_t upto = own;
    for (int step = 1; step < tile::WARP; step *= 2) {
      const int64_t other = tile::shuffle_up(upto, step);
      if (tile::lane() >= step) upto += other;
    }
    if (tile::lane() == tile::WARP - 1) sums[tile::warp()] = upto;
    tile::sync();
    int64_t at = done + upto - own;
    for (int w = 0; w < SCAN_THREADS / tile::WARP; w++) {
      if (w < tile::warp()) at += sums[w];
      done += sums[w];
    }
    for (int64_t i = first; i < first + SCAN_EACH && i < n; i++) {
      offsets[i] = at;
      at += counts[i];
    }
    tile::sync();
  }
  if (tile::thread() == 0) offsets[n] = done;
}

}  // namespace

int64_t encode_scratch(const EncodeParams& p, Precision precision, EncodeMode mode) {
  if (p.channels) return channels_scratch(p, forced.segment);
  return decodes(p) ? 0 : plan_of(p, precision, mode, kernel_of(p, precision, mode)).bytes;
}

void encode(const EncodeParams& p, Precision precision, EncodeMode mode, const EncodeFindings& findings, void* scratch,
            void* stream_) {
  const auto stream = static_cast<tile::Stream>(stream_);
  EncodeWork work = {};
  work.mode = static_cast<Mode>(mode);
  work.counts = findings.counts;
  work.offsets = findings.offsets;
  work.found_values = findings.values;
  work.found_indices = findings.indices;
  if (p.channels) return encode_channels(p, work, precision, forced.segment, scratch, stream);
  if (decodes(p)) return decode(p, work, stream);

  const Kernel kernel = kernel_of(p, precision, mode);
  const EncodePlan plan = plan_of(p, precision, mode, kernel);
  char* memory = static_cast<char*>(scratch);
  auto* dictionary = reinterpret_cast<tile::Vec16*>(memory);
  auto* segments = reinterpret_cast<Segment*>(memory + plan.table_at);
  auto* unit = reinterpret_cast<float*>(memory + plan.unit_at);
  auto* states = reinterpret_cast<float*>(memory + plan.states_at);
  auto* reach = reinterpret_cast<float*>(memory + plan.reach_at);
  work.dictionary = dictionary;
  work.segments = segments;
  work.unit = unit;
  work.states = states;
  work.reach = reach;
  work.carries = plan.carries_at > 0 ? reinterpret_cast<float*>(memory + plan.carries_at) : nullptr;
  work.part_keys = reinterpret_cast<int*>(memory + plan.part_keys_at);
  work.part_features = reinterpret_cast<int*>(memory + plan.part_features_at);
  work.tiles = plan.tiles;
  work.parts = plan.parts;
  work.part = plan.part;
  work.capacity = plan.capacity;
  cut_sequences(p, plan, segments, unit, stream);
  for (int head = 0; head < p.Hs; head += plan.heads) {
    work.head0 = head;
    work.heads = static_cast<int>(p.Hs - head < plan.heads ? p.Hs - head : plan.heads);
    pack_dictionary(p, work, plan, dictionary, stream);
    if (plan.split) segment_states(p, work, plan, states, reach, stream);
    const tile::Grid grid = {static_cast<unsigned>(plan.segments), static_cast<unsigned>(work.heads),
                             static_cast<unsigned>(plan.parts)};
    const int64_t chosen = mode == EncodeMode::at ? p.m : 1, most = mode == EncodeMode::at ? plan.capacity : 1;
    for (int64_t i = 0; i < chosen; i += most) {
      work.m0 = static_cast<int>(i);
      work.m = static_cast<int>(chosen - i < most ? chosen - i : most);
      tile::launch("encode", kernel.run, grid, plan.warps * tile::WARP, static_cast<size_t>(plan.shared), stream, p, work);
    }
    if (plan.parts > 1) merge_parts(p, work, stream);
  }
}

int64_t encode_offsets(const int64_t* counts, int64_t n, int64_t* offsets, void* stream_) {
  const auto stream = static_cast<tile::Stream>(stream_);
  tile::launch("encode: offsets", offsets_kernel, {1, 1, 1}, SCAN_THREADS, 256, stream, counts, n, offsets);
  int64_t total = 0;
  tile::read(&total, offsets + n, sizeof(total), stream);
  return total;
}

EncodeOutline encode_outline(const EncodeParams& p, Precision precision) {
  const Kernel kernel = kernel_of(p, precision, EncodeMode::topk);
  const EncodePlan plan = plan_of(p, precision, EncodeMode::topk, kernel);
  return {plan.segment, plan.parts, plan.heads, plan.slots, plan.capacity, plan_busy(p, plan, kernel.traits, true)};
}

void encode_force_segment(int tokens) { forced.segment = tokens; }
void encode_force_parts(int parts) { forced.parts = parts; }

}  // namespace writesae::cuda
