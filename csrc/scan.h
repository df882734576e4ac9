// What the scans of all write rules have in common, for their callers.
#pragma once

namespace writesae::cuda {

// How a call is laid out; zeros are chosen by its sizes. segments: of each sequence, walked at once; warps: 4 or 8, so
// 64 or 128 value columns a block; stages: chunks in shared memory at once, 1 or 2.
struct Plan {
  int segments = 0, warps = 0, stages = 0;
};

}  // namespace writesae::cuda
