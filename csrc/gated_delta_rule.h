// gated_delta_rule: S_t = e^g (I - beta k k^T) S_{t-1} + beta k v^T, o_t = scale S_t^T q_t, with its writes, snapshots and
// edits. Letters as everywhere: B row, T position, Hk key heads, H value heads, K key size, V value size, N sequences.
#pragma once

#include "edits.h"
#include "element.h"
#include "parallel.h"
#include "scan.h"

namespace writesae {

struct GatedDeltaRuleParams {
  int64_t B, T, Hk, H, K, V, N;
  View q, k;     // [B, T, Hk, K]  last stride 1
  View v;        // [B, T, H, V]   last stride 1
  View g, beta;  // [B, T, H]
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
  float* snapshots;    // [P, H, K, V]
};

// Gradients of everything gated_delta_rule returns with respect to everything it takes. Recomputes the states from the
// increments of the forward; a write that was removed before its read is none to differentiate.
struct GatedDeltaRuleBackwardParams {
  GatedDeltaRuleParams in;               // as the forward had it; its outputs are not looked at
  View right;                            // [B, T, H, V]  float32, contiguous: the forward's increments
  View d_o;                              // [B, T, H, V]  last stride 1; data null where there is no gradient, as below
  View d_right;                          // [B, T, H, V]  last stride 1
  const float* d_left;                   // [B, T, Hk, K]
  const float* d_final_state;            // [N, H, K, V]
  const float* d_snapshots;              // [P, H, K, V]
  void *d_q, *d_k, *d_v, *d_g, *d_beta;  // contiguous, each of its input's type
  float* d_initial_state;                // [N, H, K, V]
  float* d_edit_left;                    // [E, K]
  float* d_edit_right;                   // [E, V]
};

// One token of every row, the state updated in place.
struct GatedDeltaRuleStepParams {
  int64_t B, Hk, H, K, V;
  View q, k;     // [B, Hk, K]  last stride 1
  View v;        // [B, H, V]   last stride 1
  View g, beta;  // [B, H]
  float scale;
  bool use_qk_l2norm;
  float* state;    // [B, H, K, V]  read and written
  EditList edits;  // position ignored
  void* o;         // [B, H, V] of o_type
  Element o_type;
  float* left;   // [B, Hk, K] or null
  float* right;  // [B, H, V] or null
};

namespace cpu::gated_delta_rule {

void forward(const GatedDeltaRuleParams& p, const Parallel& parallel);
void backward(const GatedDeltaRuleBackwardParams& p, const Parallel& parallel);
void step(const GatedDeltaRuleStepParams& p, const Parallel& parallel);

}  // namespace cpu::gated_delta_rule

namespace cuda::gated_delta_rule {

// All pointers are the device's, and nothing is read back: launches on `stream` (a cudaStream_t) and returns. `workspace`
// has so many bytes, 256-byte aligned. K <= 256.
int64_t forward_workspace(const GatedDeltaRuleParams& p, Plan plan = {});
void forward(const GatedDeltaRuleParams& p, void* workspace, void* stream, Plan plan = {});
int64_t backward_workspace(const GatedDeltaRuleBackwardParams& p);
void backward(const GatedDeltaRuleBackwardParams& p, void* workspace, void* stream);
void step(const GatedDeltaRuleStepParams& p, void* stream);

}  // namespace cuda::gated_delta_rule
}  // namespace writesae
