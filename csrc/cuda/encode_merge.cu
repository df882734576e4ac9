// What parts of the features have selected, merged: of each token and head `parts` lists of k entries, each descending, ties
// to the lowest feature, and features of an earlier list lower. So the next of the result is the largest head of a list, the
// earliest list's where they tie. A group of lanes, the next power of two of `parts`, has a token and head; k steps.
#include "encode_launch.h"

namespace writesae::cuda {
namespace {

constexpr int WARPS_MERGING = 4;

// A block has rows of [B * T][heads], as many as its warps have groups.
__global__ void __launch_bounds__(WARPS_MERGING* tile::WARP) merge_kernel(EncodeParams p, EncodeWork work, int group) {
  const int lane = tile::lane(), part = lane % group, groups = tile::WARP / group, k = static_cast<int>(p.k);
  const int64_t rows = p.B * p.T * work.heads;
  const int64_t row = (int64_t{tile::block_x()} * WARPS_MERGING + tile::warp()) * groups + lane / group;
  const bool there = row < rows && part < work.parts;
  const int64_t list = (part * rows + row) * p.k;
  const int64_t to = row < rows ? (row / work.heads * p.Hs + work.head0 + row % work.heads) * p.k : 0;
  int at = 0, key = there ? work.part_keys[list] : LAST_KEY;
  for (int i = 0; i < k; i++) {
    // Larger keys first, then earlier lists.
    int64_t best = int64_t{key} * tile::WARP + (tile::WARP - 1 - part);
    const int64_t own = best;
    for (int step = 1; step < group; step *= 2) {
      const int64_t other = tile::shuffle_xor(best, step);
      best = other > best ? other : best;
    }
    if (!there || own != best) continue;
    const float value = from_key(key);
    p.values[to + i] = value < 0 ? 0.0f : value;  // a NaN stays
    p.indices[to + i] = work.part_features[list + at];
    key = ++at < k ? work.part_keys[list + at] : LAST_KEY;
  }
}

}  // namespace

void merge_parts(const EncodeParams& p, const EncodeWork& work, tile::Stream stream) {
  int group = 1;
  while (group < work.parts) group *= 2;
  const int64_t each = WARPS_MERGING * (tile::WARP / group), rows = p.B * p.T * work.heads;
  const tile::Grid grid = {static_cast<unsigned>((rows + each - 1) / each), 1, 1};
  tile::launch("encode: merge", merge_kernel, grid, WARPS_MERGING * tile::WARP, 0, stream, p, work, group);
}

}  // namespace writesae::cuda
