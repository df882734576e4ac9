// encode on CUDA: what it costs, and its launches.
//
// Arithmetic, a token and head, K = V = 128, F = 2,048, bf16 products: 2 (K + V) F = 1.05 MFLOP of matrix products, 1 KB in
// (float32 writes), 0.4 KB out at k = 32. Arithmetic intensity is no worry; keeping the matrix units busy is, since each
// of the 2,048 sums must also be multiplied, scanned, compared. Everything below is computed, not measured.
//
// Why so. A processor's four schedulers issue one instruction a cycle each. A product of 16 x 8 x 16 keeps a matrix unit
// busy 4 cycles at the data-sheet rate of an H100 (990 TFLOP/s), about 6 at what mma.sync reaches. Of a tile of 16 features
// x 32 rows, a warp issues (counted in sm_90a code): 64 products and 16 loads of operands; 35 to fetch the next tile; 100
// for the running sum, 75 for its first pass and P Q; 90 to compare with the bar; some 25 for each of the 4 or so rounds of
// appending (a tenth of all activations pass a bar that rises over 2,048 features: k (1 + ln(F / k)) plus the lag); 60 for
// the rest: about 490, against 256 to 400 cycles of the matrix unit. Raising the bar 4 to 5 times and sorting at the end
// adds 16,000 to 20,000 a chunk, to 63,000. Two warps a scheduler: 162,000 issue slots for 67 MFLOP, against 66,000 to
// 100,000 cycles of the matrix unit. So the bound is issue, not the matrix unit:
//    expected on an H100 (132 processors, 1.7 GHz): 370 TFLOP/s if every slot is filled, 280 to 330 as slots usually are:
//    35 to 42 % of a measured 790; 16 heads x 32,768 tokens in 1.7 to 2.0 ms. The risk is on the low side: lanes of a warp
//    that wait for its slowest in the append rounds, and two warps a scheduler to hide latency with.
// What would lift it: bars that start high (the activations at this token of the features that the token before had, any k
// of which bound the k-th largest from below: two tiles more, and most rounds and raises gone); wgmma.
//
// Operands. 128 registers a lane hold a warp's 32 rows (K + V = 256, bf16); the dictionary comes by 16 features through
// shared memory, in the order of fragments, 16 bytes a lane: no conflicts, and 4 KB read for every 32 products. From L2:
// F (K + V) 2 = 1 MB for each block's 128 rows: 4.3 GB in all of that example, 2.5 TB/s of the 5 or so that L2 gives.
// Device memory: writes in, codes out, 0.7 GB: 0.2 ms. Two blocks of 4 warps a processor (255 registers a lane; 25 KB of
// tiles, 9 KB of activations, 78 KB of candidates a block): when one selects, the other multiplies.
// fp32 takes 6 products in place of 1 and a quarter of the rows a warp (Numbers): about 80 TFLOP/s, 7 ms.
//
// Carry: a block walks its segment; between its warps one barrier a tile. Segments make up for few heads: their start
// states (32 KFLOP a token, as rows of the stream: K more a segment) cost 6 % at 2,048 tokens. What is stored beside the
// outputs is the packed dictionary, a state and F sums a segment (encode_plan.h): 0.8 % of the pre-activations there.
//
// Threshold mode runs twice, to count and to fill, with one number read by the host between them. Top k and chosen features
// never wait, and can be captured.
#include "encode_launch.h"

namespace writesae::cuda {
namespace {

int forced_segment = 0;

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

Kernel kernel_of(const EncodeParams& p, Precision precision) {
  const int depth = padded_size(p.K, p.V);
  return precision == Precision::bf16   ? encode_kernel_bf16(depth)
         : precision == Precision::tf32 ? encode_kernel_tf32(depth)
                                        : encode_kernel_fp32(depth);
}

EncodePlan plan_of(const EncodeParams& p, Precision precision, EncodeMode mode, const Kernel& kernel) {
  const int64_t candidates = mode == EncodeMode::topk ? p.k + SLACK + TILE : mode == EncodeMode::at ? 16 : 1;
  return plan_encode(p, precision, kernel.traits, static_cast<int>(candidates), machine(), forced_segment);
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
  if (p.channels) return channels_scratch(p, forced_segment);
  return decodes(p) ? 0 : plan_of(p, precision, mode, kernel_of(p, precision)).bytes;
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
  if (p.channels) return encode_channels(p, work, precision, forced_segment, scratch, stream);
  if (decodes(p)) return decode(p, work, stream);

  const Kernel kernel = kernel_of(p, precision);
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
  work.carries = reinterpret_cast<float*>(memory + plan.carries_at);
  work.tiles = plan.tiles;
  work.capacity = plan.capacity;
  cut_sequences(p, plan, segments, unit, stream);
  for (int head = 0; head < p.Hs; head += plan.heads) {
    work.head0 = head;
    work.heads = static_cast<int>(p.Hs - head < plan.heads ? p.Hs - head : plan.heads);
    pack_dictionary(p, work, plan, dictionary, stream);
    if (plan.split) segment_states(p, work, plan, states, reach, stream);
    const tile::Grid grid = {static_cast<unsigned>(plan.segments), static_cast<unsigned>(work.heads), 1};
    const int64_t parts = mode == EncodeMode::at ? p.m : 1, most = mode == EncodeMode::at ? plan.capacity : 1;
    for (int64_t i = 0; i < parts; i += most) {
      work.m0 = static_cast<int>(i);
      work.m = static_cast<int>(parts - i < most ? parts - i : most);
      tile::launch("encode", kernel.run, grid, plan.warps * tile::WARP, static_cast<size_t>(plan.shared), stream, p, work);
    }
  }
}

int64_t encode_offsets(const int64_t* counts, int64_t n, int64_t* offsets, void* stream_) {
  const auto stream = static_cast<tile::Stream>(stream_);
  tile::launch("encode: offsets", offsets_kernel, {1, 1, 1}, SCAN_THREADS, 256, stream, counts, n, offsets);
  int64_t total = 0;
  tile::read(&total, offsets + n, sizeof(total), stream);
  return total;
}

void encode_force_segment(int tokens) { forced_segment = tokens; }

}  // namespace writesae::cuda
