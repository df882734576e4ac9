// The kernel of encode. The arithmetic behind its shape is in encode.cu.
//
// A block has one head and one segment of a sequence. It walks the segment in chunks of rows; each warp holds its own rows'
// operands in registers, and the dictionary streams past in tiles of 16 features, packed so that a lane's share of a matrix
// product is 16 bytes in a row (see pack in encode_segments.cu). For each tile:
//    P = v left^T, Q = w right^T     features down, rows of the stream across; lane (g, c) = (lane / 4, lane % 4) of a warp
//                                    has features g and g + 8, and of its warp's rows SPAN consecutive ones, from SPAN c on
//    the running sum of P Q          within a lane; across the four lanes of a feature; across warps, one barrier later
//    a + b, through shared memory    so that a lane has a token, and selects (encode_select.cuh)
// The second half of a tile runs after the next barrier, so that a tile costs one. Running sums at the end of a chunk are
// carried in device memory, F floats a block, in two places by turns: a chunk may be done again from what it began with.
#pragma once

#include "encode_numbers.cuh"
#include "encode_rows.cuh"
#include "encode_select.cuh"
#include "tile.cuh"

namespace writesae::cuda {

constexpr int WARPS = 4;           // at most
constexpr float GUESS = 0.25f;     // how far below the lowest k-th largest of the chunk before a bar begins, relatively
constexpr int64_t WIDE = 1 << 16;  // features that 16 bits can name

struct EncodeWork {
  const tile::Vec16* dictionary;  // [heads][tiles][rank] packed tiles
  const Segment* segments;
  const float* unit;    // [UNIT_SIZE]
  const float* states;  // [segments][heads][K, V] before each segment that is not the first of its sequence
  const float* reach;   // [segments][heads] product of the gates from the sequence's beginning to the segment's
  float* carries;       // [segments][heads][2][F], or null where every block has one chunk
  int head0, heads;     // of the Hs encoded heads, those of this launch
  int tiles, capacity;
  int parts, part;  // blocks that share the tiles of a segment, this many tiles each
  Mode mode;
  int m0, m;               // which of the `at` indices of a token
  int64_t* counts;         // [B * T * Hs], mode count
  const int64_t* offsets;  // [B * T * Hs], mode fill
  float* found_values;
  int64_t* found_indices;
  int *part_keys, *part_features;  // [parts][B * T][heads][k], where there is more than one part: what to merge
};

// Operands of a warp's rows: registers, or shared memory where there are too many.
template <Precision P, int D, bool HELD = Numbers<P, D>::HELD>
class Operands {
  using N = Numbers<P, D>;

 public:
  __device__ explicit Operands(uint32_t*) {}
  __device__ __forceinline__ void set(int side, int step, int column, const uint32_t (&b)[N::PLANES][2]) {
#pragma unroll
    for (int i = 0; i < N::PLANES; i++) x_[side][step][column][i][0] = b[i][0], x_[side][step][column][i][1] = b[i][1];
  }
  __device__ __forceinline__ void get(int side, int step, int column, uint32_t (&b)[N::PLANES][2]) const {
#pragma unroll
    for (int i = 0; i < N::PLANES; i++) b[i][0] = x_[side][step][column][i][0], b[i][1] = x_[side][step][column][i][1];
  }

 private:
  uint32_t x_[2][N::STEPS][N::COLUMNS][N::PLANES][2];
};

template <Precision P, int D>
class Operands<P, D, false> {
  using N = Numbers<P, D>;
  static_assert(N::COLUMNS == 1, "operands in shared memory: one column tile a warp");

 public:
  __device__ explicit Operands(uint32_t* shared) : x_(shared + tile::lane()) {}
  __device__ __forceinline__ void set(int side, int step, int, const uint32_t (&b)[N::PLANES][2]) {
#pragma unroll
    for (int i = 0; i < 2 * N::PLANES; i++)
      x_[((side * N::STEPS + step) * 2 * N::PLANES + i) * tile::WARP] = b[i / 2][i % 2];
  }
  __device__ __forceinline__ void get(int side, int step, int, uint32_t (&b)[N::PLANES][2]) const {
#pragma unroll
    for (int i = 0; i < 2 * N::PLANES; i++)
      b[i / 2][i % 2] = x_[((side * N::STEPS + step) * 2 * N::PLANES + i) * tile::WARP];
  }

 private:
  uint32_t* x_;
};

// A row's share of one side's operands, from its elements of type E in memory.
template <Precision P, int D, class E>
__device__ __forceinline__ void load_operand(Operands<P, D>& operands, const void* data, int side, int column, int size,
                                             bool bf16 = false) {
  using N = Numbers<P, D>;
  const int c = tile::lane() % 4, width = P == Precision::tf32 ? 1 : 2;
  const E* from = static_cast<const E*>(data) + width * c;
  const auto number = [&](int at) {
    if (width * c + at >= size) return 0.0f;
    if constexpr (sizeof(E) == 4)
      return from[at];
    else
      return bf16 ? tile::to_float(tile::bf16{from[at]}) : tile::to_float(tile::f16{from[at]});
  };
#pragma unroll
  for (int s = 0; s < N::STEPS; s++) {
    uint32_t b[N::PLANES][2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int at = N::STEP * s + 4 * width * i;
      uint32_t parts[N::PLANES];
      convert<P>(number(at), width == 2 ? number(at + 1) : 0.0f, parts);
#pragma unroll
      for (int plane = 0; plane < N::PLANES; plane++) b[plane][i] = parts[plane];
    }
    operands.set(side, s, column, b);
  }
}

// Neighbours in shared memory, by 16 bytes where there are as many. Registers are short: what a lane needs twice a tile
// (the gates of its rows) is better read again than kept.
template <int SPAN>
__device__ __forceinline__ void load_span(const uint32_t* from, float (&to)[SPAN]) {
  if constexpr (SPAN % 4 == 0) {
#pragma unroll
    for (int s = 0; s < SPAN; s += 4) {
      const tile::Vec16 four = *reinterpret_cast<const tile::Vec16*>(from + s);
#pragma unroll
      for (int i = 0; i < 4; i++) to[s + i] = tile::bits_to_float(four.x[i]);
    }
  } else {
#pragma unroll
    for (int s = 0; s < SPAN; s++) to[s] = tile::bits_to_float(from[s]);
  }
}
template <int SPAN>
__device__ __forceinline__ void store_span(uint32_t* to, const uint32_t (&from)[SPAN]) {
  if constexpr (SPAN % 4 == 0) {
#pragma unroll
    for (int s = 0; s < SPAN; s += 4)
      *reinterpret_cast<tile::Vec16*>(to + s) = {{from[s], from[s + 1], from[s + 2], from[s + 3]}};
  } else {
#pragma unroll
    for (int s = 0; s < SPAN; s++) to[s] = from[s];
  }
}

// The running sums of a sequence that ends with this block's segment, from scratch to where the call wants them. What this
// needs it works out again: the kernel has no register to keep it in.
__device__ __forceinline__ void finish(const EncodeParams& p, const EncodeWork& work, const float* from) {
  const Segment segment = work.segments[tile::block_x()];
  if (!segment.final || work.carries == nullptr) return;
  const int tile0 = tile::block_z() * work.part, tile1 = work.tiles < tile0 + work.part ? work.tiles : tile0 + work.part;
  const int F = static_cast<int>(p.F), f1 = F < tile1 * TILE ? F : tile1 * TILE;
  float* const to = p.carry_out + (segment.n * p.Hs + work.head0 + tile::block_y()) * F;
  for (int f = tile0 * TILE + tile::thread(); f < f1; f += tile::block_threads()) to[f] = from[f];
}

// TOPK: the mode is topk, or any other.
template <Precision P, int D, bool TOPK>
__global__ void __launch_bounds__(WARPS* tile::WARP, 2) encode_kernel(EncodeParams p, EncodeWork work) {
  using N = Numbers<P, D>;
  constexpr int ROWS = N::ROWS, COLUMNS = N::COLUMNS, PLANES = N::PLANES, STAGES = N::STAGES;
  constexpr int SPAN = 2 * COLUMNS;  // consecutive rows of a lane
  constexpr int X_STRIDE = ROWS + 4;
  const Segment segment = work.segments[tile::block_x()];
  if (segment.n < 0) return;
  const int slot = tile::block_y(), h = work.head0 + slot, F = static_cast<int>(p.F);
  const int head = static_cast<int>(p.heads[h]);
  if (head < 0 || head >= p.H) return;
  const int lane = tile::lane(), warp = tile::warp(), warps = tile::block_threads() / tile::WARP;
  const int g = lane / 4, c = lane % 4;

  tile::Shared shared;
  tile::Vec16* stages = shared.take<tile::Vec16>(STAGES * N::TILE_VECTORS);
  uint32_t* x = shared.take<uint32_t>(warps * TILE * X_STRIDE) + warp * TILE * X_STRIDE;
  float* ends = shared.take<float>(2 * WARPS * TILE);     // by parity of the tile: each warp's running sums, from zero
  uint32_t* passages = shared.take<uint32_t>(2 * WARPS);  // by parity of the chunk: product of each warp's gates
  uint32_t* gates = shared.take<uint32_t>(warps * ROWS) + warp * ROWS;
  int* full = shared.take<int>(2);            // by parity of the time: when a buffer was last nearly full
  int* again = shared.take<int>(1);           // the time of the last chunk that has to be done again
  float* lowest = shared.take<float>(WARPS);  // of the tokens each warp selected for last, the lowest k-th largest
  const int bytes = Candidates<ROWS>::bytes(work.capacity, F > WIDE);  // a warp
  const Candidates<ROWS> buffer = {tile::SharedBytes(shared.take<char>(warps * bytes) + warp * bytes), work.capacity,
                                   F > WIDE};
  uint32_t* held = nullptr;
  if constexpr (!N::HELD) held = shared.take<uint32_t>(warps * N::HELD_WORDS) + warp * N::HELD_WORDS;
  if (tile::thread() < 2) full[tile::thread()] = -1;
  if (tile::thread() == 0) *again = -1;

  const int64_t block_slot = int64_t{tile::block_x()} * work.heads + slot;
  const float* carry_in = p.carry_in == nullptr ? nullptr : p.carry_in + (segment.n * p.Hs + h) * F;
  float* const carry =
      work.carries != nullptr ? work.carries + block_slot * 2 * F : p.carry_out + (segment.n * p.Hs + h) * F;
  const bool begins = segment.first == 0;
  const float reach = begins ? 1.0f : work.reach[block_slot];
  const Stream stream(p, segment, head, begins ? nullptr : work.states + block_slot * p.K * p.V, work.unit);
  const int tile0 = tile::block_z() * work.part, tile1 = work.tiles < tile0 + work.part ? work.tiles : tile0 + work.part;
  const int f0 = tile0 * TILE, f1 = F < tile1 * TILE ? F : tile1 * TILE;
  const int k = static_cast<int>(p.k < f1 - f0 ? p.k : f1 - f0);
  const int half = k + (work.capacity - k) / 2, enough = half < work.capacity - TILE ? half : work.capacity - TILE;
  for (int f = f0 + tile::thread(); f < f1; f += tile::block_threads())
    carry[f] = carry_in != nullptr ? carry_in[f] * reach : 0.0f;
  if (stream.rows() == 0) {  // an empty sequence
    finish(p, work, carry);
    return;
  }

  const int rank = static_cast<int>(p.rank), steps = (tile1 - tile0) * rank;
  const int chunks = (stream.rows() + warps * ROWS - 1) / (warps * ROWS);
  const tile::Vec16* const dictionary =
      work.dictionary + (int64_t{slot} * work.tiles + tile0) * rank * N::TILE_VECTORS + tile::thread();
  const tile::Vec16* next = dictionary;
  int fetch_step = 0, fetch_stage = 0;
  const auto fetch = [&] {  // the next tile; the dictionary comes round again with every chunk
    tile::Vec16* to = stages + fetch_stage * N::TILE_VECTORS + tile::thread();
    if (warps == WARPS) {
      constexpr int THREADS = WARPS * tile::WARP;
      static_assert(N::TILE_VECTORS % THREADS == 0, "");
#pragma unroll
      for (int i = 0; i < N::TILE_VECTORS; i += THREADS) tile::copy_16(to + i, next + i);
    } else {
      for (int i = tile::thread(); i < N::TILE_VECTORS; i += tile::block_threads())
        tile::copy_16(to + i - tile::thread(), next + i - tile::thread());
    }
    tile::commit_copies();
    next += N::TILE_VECTORS;
    if (++fetch_step == steps) fetch_step = 0, next = dictionary;
    fetch_stage = fetch_stage + 1 == STAGES ? 0 : fetch_stage + 1;
  };
  for (int i = 0; i < STAGES - 1; i++) fetch();

  int stage = 0, time = 0;
  int carry_from = 0, carry_to = 0;  // the first chunk may overwrite what it starts from: nothing does it again
  bool repeat = false;               // the chunk is done again,
  uint32_t redo = 0xffffffffu;       // for these tokens of the warp
  Operands<P, D> operands(held);
  for (int chunk = 0; chunk < chunks;) {
    // ---- rows ------------------------------------------------------------------------------------------------------
    Row mine = {Row::none, 0, 0, 1.0f, false};
    if (lane < ROWS) mine = stream.row((chunk * warps + warp) * ROWS + lane);
    const bool active = mine.whole && (redo >> lane & 1u) != 0;
    const int place = active ? (segment.origin + mine.token) * static_cast<int>(p.Hs) + h : -1;
    const uint32_t exist = tile::ballot(mine.kind != Row::none || lane >= ROWS);
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) {
      const int from = SPAN * (g / 2) + 2 * n + g % 2;  // the row in column g of column tile n
      const int kind = tile::shuffle(mine.kind, from), token = tile::shuffle(mine.token, from);
      const int sub = tile::shuffle(mine.sub, from);
#pragma unroll
      for (int side = 0; side < 2; side++) {
        const Source row = side == 0 ? stream.left(kind, token, sub) : stream.right(kind, token, sub);
        const int size = static_cast<int>(side == 0 ? p.K : p.V);
        if (row.type == Element::f32) {
          load_operand<P, D, float>(operands, row.data, side, n, size);
        } else {
          const bool bf16 = row.type == Element::bf16;
          load_operand<P, D, uint16_t>(operands, row.data, side, n, size, bf16);
        }
      }
    }
    if (lane < ROWS) gates[lane] = tile::float_to_bits(mine.gate);
    tile::sync_warp();
    float passage = 1.0f;
    {
      float gate[SPAN];
      load_span(gates + SPAN * c, gate);
#pragma unroll
      for (int s = 0; s < SPAN; s++) passage *= gate[s];
    }
    // Products of the gates of lanes c - 1 and c (two), of those before c (before), of the whole warp.
    float before = tile::shuffle_up(passage, 1);
    const float two = c >= 1 ? passage * before : passage;
    const float far = tile::shuffle_up(two, 2);
    const float whole = c >= 2 ? two * far : two;
    before = tile::shuffle_up(whole, 1);
    before = c == 0 ? 1.0f : before;
    if (lane == 3) passages[chunk % 2 * WARPS + warp] = tile::float_to_bits(whole);

    Bar bar = {tile::bits_to_float(0x7fffffffu), false, 0};
    if constexpr (TOPK) {
      if (chunk > 0 && !repeat) {
        for (int w = 0; w < warps; w++) bar.height = lowest[w] >= bar.height ? bar.height : lowest[w];
        const float height = bar.height < 0 ? -bar.height : bar.height;
        bar.height -= GUESS * height + 1e-30f;  // NaN where it is infinite, or no token ended there
      }
    }
    if (work.mode == Mode::at && active) {
      const int64_t* at = p.at + int64_t{place} * p.m + work.m0;
      for (int i = 0; i < work.m; i++) {
        const bool known = at[i] >= 0 && at[i] < F;
        buffer.values()[i * buffer.STRIDE + lane] = known ? static_cast<uint32_t>(at[i]) : 0xffffffffu;
        if (!known) p.values[int64_t{place} * p.m + work.m0 + i] = tile::bits_to_float(0x7fffffffu);
      }
    }

    // ---- features --------------------------------------------------------------------------------------------------
    float product[2][SPAN], inflow[2] = {}, start[2] = {}, bias[2] = {};
    for (int j = tile0, rank_at = 0, step = 0; step <= steps; step++) {
      if (step < steps) tile::wait_copies<STAGES - 2>();
      tile::sync();  // this tile is there; all have read the stage before, and know the ends of the tile before
      if (step < steps) fetch();

      if (rank_at == 0 && step > 0) {
        // Of the tile before: running sums from what flows into the warp, then selection.
        const float* end = ends + (j - 1) % 2 * WARPS * TILE + g;
        float gate[SPAN], passed[WARPS];
        load_span(gates + SPAN * c, gate);
        load_span(passages + chunk % 2 * WARPS, passed);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float a = start[i];
#pragma unroll
          for (int w = 0; w < WARPS - 1; w++)
            if (w < warp) a = a * passed[w] + end[w * TILE + 8 * i];
          a = c == 0 ? a : a * before + inflow[i];
          uint32_t out[SPAN];
#pragma unroll
          for (int s = 0; s < SPAN; s++) {
            a = a * gate[s] + product[i][s];
            out[s] = tile::float_to_bits(a + bias[i]);
          }
          uint32_t* to = x + (8 * i + g) * X_STRIDE + SPAN * c;
          store_span(to, out);
          const int f = (j - 1) * TILE + 8 * i + g;
          if (warp == warps - 1 && c == 3 && f < F) carry[carry_to + f] = a;
        }
        tile::sync_warp();
        const int first = (j - 1) * TILE, width = F - first < TILE ? F - first : TILE;
        const uint32_t* column = x + (lane < ROWS ? lane : 0);
        if constexpr (TOPK) {
          // All warps empty their buffers at once, when one asks for it: one at a time they would wait for each other.
          if (full[(time + 1) % 2] == time - 1 && tile::any(bar.count > enough))
            bar = keep_largest(buffer, k, SLACK, active, bar);
          take_tile(buffer, column, X_STRIDE, first, width, active && !bar.closed, bar);
          const bool nearly = tile::any(bar.count > work.capacity - TILE);
          if (nearly && lane == 0) tile::atomic_max(full + time % 2, time);
        } else if (active && work.mode == Mode::at) {
          for (int i = 0; i < work.m; i++) {
            const int at = static_cast<int>(buffer.values()[i * buffer.STRIDE + lane]) - first;
            if (at >= 0 && at < width)
              p.values[int64_t{place} * p.m + work.m0 + i] = tile::bits_to_float(column[at * X_STRIDE]);
          }
        } else if (active) {
          const float* limit = p.threshold + int64_t{h} * F + first;
          for (int i = 0; i < width; i++) {
            const float value = tile::bits_to_float(column[i * X_STRIDE]);
            if (value <= limit[i]) continue;  // keeps a NaN
            if (work.mode == Mode::fill) {
              const int64_t to = work.offsets[place] + bar.count;
              work.found_values[to] = value;
              work.found_indices[to] = first + i;
            }
            bar.count++;
          }
        }
        tile::sync_warp();  // x is written again
      }
      if (step == steps) break;

      const tile::Vec16* packed = stages + stage * N::TILE_VECTORS;
      if (rank_at == 0) {
        time++;
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int f = j * TILE + 8 * i + g;
          start[i] = f < F ? carry[carry_from + f] : 0.0f;
          bias[i] = p.b_enc != nullptr && f < F ? p.b_enc[int64_t{h} * F + f] + 0.0f : 0.0f;  // + 0: no -0
        }
      }
      float large[2][COLUMNS][4] = {}, small[2][COLUMNS][4] = {};
#pragma unroll
      for (int side = 0; side < 2; side++)
#pragma unroll
        for (int s = 0; s < N::STEPS; s++) {
          uint32_t a[PLANES][4];
#pragma unroll
          for (int plane = 0; plane < PLANES; plane++) {
            const tile::Vec16 share = packed[((side * N::STEPS + s) * PLANES + plane) * tile::WARP + lane];
#pragma unroll
            for (int i = 0; i < 4; i++) a[plane][i] = share.x[i];
          }
#pragma unroll
          for (int n = 0; n < COLUMNS; n++) {
            uint32_t b[PLANES][2];
            operands.get(side, s, n, b);
            multiply<P>(large[side][n], small[side][n], a, b);
          }
        }
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int s = 0; s < SPAN; s++) {
          const int n = s / 2, at = 2 * i + s % 2;
          float left = large[0][n][at], right = large[1][n][at];
          if constexpr (P == Precision::fp32) left += small[0][n][at], right += small[1][n][at];
          product[i][s] = left * right;
        }
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      if (rank > 1) {  // the sum over the rank waits in x, which is free: registers are not
        uint32_t* sum = x + lane;
#pragma unroll
        for (int i = 0; i < 2 * SPAN; i++) {
          float& own = product[i / SPAN][i % SPAN];
          if (rank_at > 0) own += tile::bits_to_float(sum[i * tile::WARP]);
          sum[i * tile::WARP] = tile::float_to_bits(own);
        }
        if (++rank_at < rank) continue;
        tile::sync_warp();
      }

      rank_at = 0;
      float gate[SPAN];
      load_span(gates + SPAN * c, gate);
      if (exist != 0xffffffffu) {  // rows that do not exist add nothing, whatever the dictionary holds
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int s = 0; s < SPAN; s++)
            if ((exist >> (SPAN * c + s) & 1u) == 0) product[i][s] = 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float a = 0.0f;
#pragma unroll
        for (int s = 0; s < SPAN; s++) a = a * gate[s] + product[i][s];
        const float one = tile::shuffle_up(a, 1);
        if (c >= 1) a += passage * one;
        const float other = tile::shuffle_up(a, 2);
        if (c >= 2) a += two * other;
        inflow[i] = tile::shuffle_up(a, 1);
        if (c == 3) ends[(j % 2 * WARPS + warp) * TILE + 8 * i + g] = a;
      }
      j++;
    }

    // ---- results of the chunk ----------------------------------------------------------------------------------------
    if constexpr (TOPK) {
      const bool first = !repeat;
      redo = 0;
      float least = tile::bits_to_float(0x7f800000u);
      const uint32_t selected = tile::ballot(active);
      if (selected != 0) {
        bar = keep_largest(buffer, k, 0, active, bar);
        const bool done = active && bar.count >= k;
        redo = tile::ballot(active && !done);
        tally("chunks");
        tally("redone", first ? 0 : 1);
        tally("tokens", first ? tile::count_bits(selected) : 0);
        tally("tokens_redone", tile::count_bits(redo));
        least = done && bar.height < least ? bar.height : least;
        least = -tile::warp_max(-least);
        sort_entries(buffer, k, done);
        tile::sync_warp();
        Selected to = {p.values, p.indices, nullptr, nullptr};
        if (work.parts > 1) {
          const int64_t offset = tile::block_z() * p.B * p.T * work.heads * p.k;
          to = {nullptr, nullptr, work.part_keys + offset, work.part_features + offset};
        }
        const int row = work.parts > 1 ? place / static_cast<int>(p.Hs) * work.heads + slot : place;
        put_entries(buffer, static_cast<int>(p.k), k, done ? row : -1, to);
      }
      if (lane == 0) {
        lowest[warp] = first || least < lowest[warp] ? least : lowest[warp];
        if (redo != 0) tile::atomic_max(again, time);
      }
      tile::sync();  // and the buffer is filled again
      repeat = tile::any(*again == time);
    } else if (work.mode == Mode::count && active) {
      work.counts[place] = bar.count;
    }
    if (repeat) continue;
    redo = 0xffffffffu;
    chunk++;
    carry_from = carry_to;
    carry_to = F - carry_to;
  }
  tile::wait_copies<0>();
  tile::sync();
  finish(p, work, carry + carry_from);
}

// What a launch needs to know of an instance.
template <Precision P, int D>
struct Instance {
  using N = Numbers<P, D>;
  // Bytes of shared memory with `warps` warps, but for the candidates.
  static int fixed_shared(int warps) {
    const auto piece = [](int bytes) { return static_cast<int>(tile::shared_piece(bytes)); };
    return piece(N::STAGES * N::TILE_VECTORS * 16) + piece(warps * TILE * (N::ROWS + 4) * 4) + piece(2 * WARPS * TILE * 4) +
           piece(2 * WARPS * 4) + piece(warps * N::ROWS * 4) + 3 * 128 + piece(warps * N::HELD_WORDS * 4) + 128;
  }
};

}  // namespace writesae::cuda
