// A scan, the recurrence of a write rule, for its callers: what every rule takes and returns. With G_t the gate (a number, or
// a diagonal matrix with a channel gate) and k, q as used, after normalisation and scale:
//     S_t = G_t S_{t-1} + k u^T      u = beta (v - (G_t S_{t-1})^T k)  of a delta rule,   u = beta v  of an additive one
//     o_t = S_t^T q_t
// with its writes, snapshots and edits. A low-rank erase is a second write, S_t = G_t S_{t-1} + b (a^T S_{t-1}) + k u^T: a
// reads the state before its gate, and what edits delete or replace is k u^T alone. Letters as everywhere: B row, T position,
// Hk key heads, H value heads, K key size, V value size, N sequences.
#pragma once

#include <cstdint>

#include "edits.h"
#include "element.h"
#include "parallel.h"

namespace writesae {

struct ScanParams {
  int64_t B, T, Hk, H, K, V, N;
  View q, k;     // [B, T, Hk, K]  last stride 1
  View v;        // [B, T, H, V]   last stride 1
  View g, beta;  // [B, T, H]; g [B, T, H, K], last stride 1, with a channel gate
  View a, b;     // [B, T, H, K]  last stride 1: the low-rank erase; data null without one
  bool channel_gate;
  float scale;
  bool use_qk_l2norm;
  const float* initial_state;  // [N, H, K, V] or null (zero)
  const int64_t* cu_seqlens;   // [N + 1] or null; then B = 1
  EditList edits;
  int64_t P;
  const int64_t* places;  // [P, 2]  (row, position)
  void* o;                // [B, T, H, V] of o_type
  Element o_type;
  float* final_state;  // [N, H, K, V]
  float* left;         // [B, T, Hk, K] or null
  float* right;        // [B, T, H, V] or null
  float* erased;       // [B, T, H, V] a_t^T S_{t-1}, the right side of the erase's write, whose left is b; or null
  float* snapshots;    // [P, H, K, V]
  // [B] or null; needs right: where in its row, as t H + h, the first NaN or infinity of right and erased stands, -1 for none.
  // Kernels read increments again for it only where a state has broken: one that is not finite leaves its value column of the
  // state so for good, whatever the key (0 times infinity is NaN) and the gate.
  int64_t* first_nonfinite;
};

// Gradients of everything a scan returns with respect to everything it takes. Recomputes the states from the
// increments of the forward; a write that was removed before its read is none to differentiate.
struct ScanBackwardParams {
  ScanParams in;                         // as the forward had it; its outputs are not looked at
  View right;                            // [B, T, H, V]  float32, contiguous: the forward's increments
  View erased;                           // [B, T, H, V]  the same, of its low-rank erase; data null without one
  View d_o;                              // [B, T, H, V]  last stride 1; data null where there is no gradient, as below
  View d_right;                          // [B, T, H, V]  last stride 1
  View d_erased;                         // [B, T, H, V]  last stride 1
  const float* d_left;                   // [B, T, Hk, K]
  const float* d_final_state;            // [N, H, K, V]
  const float* d_snapshots;              // [P, H, K, V]
  void *d_q, *d_k, *d_v, *d_g, *d_beta;  // contiguous, each of its input's type
  void *d_a, *d_b;                       // the same; null without a low-rank erase
  float* d_initial_state;                // [N, H, K, V]
  float* d_edit_left;                    // [E, K]
  float* d_edit_right;                   // [E, V]
};

// One token of every row, the state updated in place.
struct ScanStepParams {
  int64_t B, Hk, H, K, V;
  View q, k;     // [B, Hk, K]  last stride 1
  View v;        // [B, H, V]   last stride 1
  View g, beta;  // [B, H]; g [B, H, K], last stride 1, with a channel gate
  View a, b;     // [B, H, K]  last stride 1: the low-rank erase; data null without one
  bool channel_gate;
  float scale;
  bool use_qk_l2norm;
  float* state;    // [B, H, K, V]  read and written
  EditList edits;  // position ignored
  void* o;         // [B, H, V] of o_type
  Element o_type;
  float* left;               // [B, Hk, K] or null
  float* right;              // [B, H, V] or null
  float* erased;             // [B, H, V] or null
  int64_t* first_nonfinite;  // [B] or null: the first head of a row, as above
};

namespace cuda {

// How a call is laid out; zeros are chosen by its sizes. segments: of each sequence, walked at once; warps: 4 or 8, so
// 64 or 128 value columns a block; stages: chunks in shared memory at once, 1 or 2.
struct Plan {
  int segments = 0, warps = 0, stages = 0;
};

}  // namespace cuda
}  // namespace writesae
