// encode's backward on CUDA: what it costs, and its launches.
//
// A token and head at K = V = 128, F = 2,048: four products of 2 K F (or V F) FLOP for the factors, as many for the writes:
// 2.1 MFLOP each, in three tf32 products 6.3. At the 350 TFLOP/s that tf32 could reach, 16 heads x 32,768 tokens would take
// 9.4 ms each; operands are split in registers as they are read (8 instructions for each 16 x 8 x 8 step's left operand and
// 4 for the right) and nothing is fetched ahead, so a third of that is to be expected. Computed, not measured.
// Finding the gradients that fall into a tile reads the m indices of every token once for each tile: 12 KB a token and head
// at m = 32 (32 to 64 tiles), from L2.
// Shared memory: 121 KB a block at a depth of 128. A device that has 99 KB runs it with half of the rows, 77 KB, whose others
// go past twice as often; at a depth of 256 no plan fits it, and it is refused.
// Blocks: for the writes one for every 64 tokens, for the factors one for every 64 features of a head, or several, each with
// a part of the tokens, where that would leave the chip half empty. Stored beside the outputs: for the writes F floats a
// chunk of 64 tokens, 1.6 % of the pre-activations; for the factors, with parts, as many gradients, at most 64 MB.
#include "encode_backward.cuh"

#include "encode_launch.h"

namespace writesae::cuda {
namespace {

constexpr int LEAST_SEGMENTS = 4;          // of a part
constexpr int64_t PARTS_BYTES = 64 << 20;  // of the sums of all parts

struct Layout {
  int depth, length;  // K and V padded to; tokens of a segment
  int own;            // rows of a block
  int segments;
  int each, parts;  // segments of a part
  int64_t unit_at, tails_at, sums_at, bytes;
};

constexpr size_t floats(int count) { return tile::shared_piece(4 * count); }

// What a Lambda takes.
template <class L>
constexpr size_t lambda_shared() {
  return floats(L::SIZE) + floats(L::TOKENS) + floats(L::FEATURES);
}

// What a block of `own` rows takes.
template <int D, int OWN, bool FEATURES_OWN>
constexpr size_t block_shared() {
  using Lambdas = Lambda<FEATURES_OWN ? OTHERS : OWN, FEATURES_OWN ? OWN : OTHERS>;
  return floats(2 * OWN * D) + floats(2 * OTHERS * D) + floats(2 * OWN * OTHERS) + lambda_shared<Lambdas>();
}

// f(depth, rows of a block), both as types' `value`s.
template <class F>
auto with_sizes(int depth, int own, const F& f) {
  const auto of = [&](auto depth) {
    constexpr int D = decltype(depth)::value;
    if (fewer_rows(D) != owned_rows(D) && own == fewer_rows(D))
      return f(depth, std::integral_constant<int, fewer_rows(D)>{});
    return f(depth, std::integral_constant<int, owned_rows(D)>{});
  };
  return depth == 32    ? of(std::integral_constant<int, 32>{})
         : depth == 64  ? of(std::integral_constant<int, 64>{})
         : depth == 128 ? of(std::integral_constant<int, 128>{})
                        : of(std::integral_constant<int, 256>{});
}

template <bool FEATURES_OWN>
size_t shared_of(int depth, int own) {
  return with_sizes(
      depth, own, [](auto d, auto rows) { return block_shared<decltype(d)::value, decltype(rows)::value, FEATURES_OWN>(); });
}

// Throws where the device has too little shared memory.
Layout layout_of(const EncodeBackwardParams& p) {
  const EncodeParams& e = p.rows;
  Layout x = {};
  x.depth = padded_size(e.K, e.V);
  const auto shared = [&] {
    return p.d_left != nullptr ? shared_of<false>(x.depth, x.own) : shared_of<true>(x.depth, x.own);
  };
  x.own = owned_rows(x.depth);
  if (shared() > tile::shared_limit()) x.own = fewer_rows(x.depth);
  tile::require_shared(std::string(p.d_left != nullptr ? "encode_writes_backward" : "encode_backward") +
                           ": K = " + std::to_string(e.K) + ", V = " + std::to_string(e.V),
                       shared());
  x.length = p.d_left != nullptr ? x.own : OTHERS;
  x.segments = static_cast<int>(e.cu_seqlens != nullptr ? e.T / x.length + e.N : e.B * ((e.T + x.length - 1) / x.length));
  x.each = 1, x.parts = x.segments;
  const int64_t own = x.own, gradients = 4 * e.Hs * e.F * e.rank * (e.K + e.V);
  if (p.d_left == nullptr) {
    const int64_t blocks = (e.F + own - 1) / own * e.rank * e.Hs, wanted = 2 * int64_t{tile::multiprocessors()} / blocks;
    const int64_t most = std::min<int64_t>({wanted, x.segments / LEAST_SEGMENTS, PARTS_BYTES / gradients});
    x.each = most > 1 ? static_cast<int>((x.segments + most - 1) / most) : std::max(x.segments, 1);
    x.parts = (x.segments + x.each - 1) / x.each;
  }
  x.unit_at = padded(x.segments * int64_t{sizeof(Segment)});
  x.tails_at = x.unit_at + padded(4 * UNIT_SIZE);
  x.sums_at = x.tails_at + padded(4 * int64_t{x.parts} * e.Hs * e.F);
  x.bytes = x.sums_at + (p.d_left == nullptr && x.parts > 1 ? x.parts * gradients : 0);
  return x;
}

template <bool FEATURES_OWN>
void run(const EncodeBackwardParams& p, const Layout& x, const Segment* segments, const float* tails, tile::Stream stream) {
  with_sizes(x.depth, x.own, [&](auto depth, auto rows) {
    constexpr int D = decltype(depth)::value, OWN = decltype(rows)::value;
    const EncodeParams& e = p.rows;
    const int64_t blocks = FEATURES_OWN ? (e.F + OWN - 1) / OWN * e.rank : x.segments * e.R;
    const tile::Grid grid = {static_cast<unsigned>(blocks), static_cast<unsigned>(e.Hs),
                             FEATURES_OWN ? static_cast<unsigned>(x.parts) : 1};
    tile::launch(FEATURES_OWN ? "encode_backward" : "encode_backward: writes", encode_backward_kernel<D, OWN, FEATURES_OWN>,
                 grid, BACKWARD_THREADS, block_shared<D, OWN, FEATURES_OWN>(), stream, p, segments, x.segments, x.each,
                 tails);
  });
}

template <int TOKENS>
void run_tails(const EncodeBackwardParams& p, const Layout& x, const Segment* segments, float* tails, tile::Stream stream) {
  const EncodeParams& e = p.rows;
  const tile::Grid grid = {static_cast<unsigned>((e.F + TAIL_FEATURES - 1) / TAIL_FEATURES), static_cast<unsigned>(e.Hs),
                           static_cast<unsigned>(e.N < TAIL_SEQUENCES ? e.N : TAIL_SEQUENCES)};
  tile::launch("encode_backward: tails", tails_kernel<TOKENS>, grid, BACKWARD_THREADS,
               lambda_shared<Lambda<TOKENS, TAIL_FEATURES>>(), stream, p, segments, x.segments, x.each, tails);
}

void add_parts(const float* from, int parts, int64_t size, float* to, tile::Stream stream) {
  const tile::Grid grid = {static_cast<unsigned>((size + 255) / 256), 1, 1};
  tile::launch("encode_backward: add parts", add_parts_kernel, grid, 256, 0, stream, from, parts, size, to);
}

}  // namespace

int64_t encode_backward_scratch(const EncodeBackwardParams& p) { return layout_of(p).bytes; }

void encode_backward(const EncodeBackwardParams& p, void* scratch, void* stream_) {
  const auto stream = static_cast<tile::Stream>(stream_);
  const Layout x = layout_of(p);
  char* memory = static_cast<char*>(scratch);
  auto* segments = reinterpret_cast<Segment*>(memory);
  EncodePlan plan = {};
  plan.segment = x.length, plan.segments = x.segments;
  cut_sequences(p.rows, plan, segments, reinterpret_cast<float*>(memory + x.unit_at), stream);
  auto* tails = reinterpret_cast<float*>(memory + x.tails_at);
  const bool writes = p.d_left != nullptr;
  if (writes || x.parts > 1) {
    if (x.length == 64) {
      run_tails<64>(p, x, segments, tails, stream);
    } else {
      run_tails<32>(p, x, segments, tails, stream);
    }
  }
  if (writes) return run<false>(p, x, segments, tails, stream);
  if (x.parts == 1) return run<true>(p, x, segments, tails, stream);
  const int64_t of_v = p.rows.Hs * p.rows.F * p.rows.rank * p.rows.K, of_w = of_v / p.rows.K * p.rows.V;
  EncodeBackwardParams part = p;
  part.dv = reinterpret_cast<float*>(memory + x.sums_at), part.dw = part.dv + x.parts * of_v;
  run<true>(part, x, segments, tails, stream);
  add_parts(part.dv, x.parts, of_v, p.dv, stream);
  add_parts(part.dw, x.parts, of_w, p.dw, stream);
}

}  // namespace writesae::cuda
