// selective_scan, the write rule with a gate of each entry of the state: for key n and channel c
//     S_t[n, c] = e^{dt_t[c] A[c, n]} S_{t-1}[n, c] + B_t[n] u_t[c],   u_t = dt_t x_t,   o_t[c] = sum_n C_t[n] S_t[n, c] + D[c] x_t[c]
// It is no scan of scan.h: its gates differ by entry, so no products of matrices serve several tokens; the work is one exponential
// an entry and token. Letters: B row, T position, V channel, K key (Mamba's state size), N sequences. One head.
#pragma once

#include <cstdint>

#include "edits.h"
#include "element.h"
#include "parallel.h"

namespace writesae {

struct SelectiveScanParams {
  int64_t B, T, V, K, N;
  View x, dt;                  // [B, T, V]  stride 1 of the last axis, or of the one before
  View rates;                  // [V, K]     A
  View write, read;            // [B, T, K]  B and C, last stride 1
  const float* skip;           // [V] D, or null
  const float* initial_state;  // [N, K, V] or null (zero); may be final_state
  const int64_t* cu_seqlens;   // [N + 1] or null; then B = 1
  EditList edits;              // of head 0
  int64_t P;
  const int64_t* places;     // [P, 2]  (row, position)
  void* o;                   // [B, T, V] of x's type
  float* final_state;        // [N, K, V]
  float* right;              // [B, T, V] u as written, or null
  float* snapshots;          // [P, K, V]
  int64_t* first_nonfinite;  // [B] or null: as in scan.h
};

// Gradients of everything it returns with respect to everything it takes. States are computed once more; a write that was
// removed before its read is none to differentiate.
struct SelectiveScanBackwardParams {
  SelectiveScanParams in;               // as the forward had it; its outputs are not looked at
  View d_o, d_right;                    // [B, T, V]  last stride 1; data null where there is no gradient, as below
  const float* d_final_state;           // [N, K, V]
  const float* d_snapshots;             // [P, K, V]
  void *d_x, *d_dt, *d_write, *d_read;  // contiguous, each of its input's type
  float* d_rates;                       // [V, K]
  float* d_skip;                        // [V]
  float* d_initial_state;               // [N, K, V]
  float* d_edit_left;                   // [E, K]
  float* d_edit_right;                  // [E, V]
};

namespace cpu::selective_scan {

void forward(const SelectiveScanParams& p, const Parallel& parallel);
void backward(const SelectiveScanBackwardParams& p, const Parallel& parallel);

}  // namespace cpu::selective_scan

namespace cuda::selective_scan {

// All pointers are the device's; launches on `stream` (a cudaStream_t) and returns. `workspace`: so many bytes. K <= 256.
int64_t forward_workspace(const SelectiveScanParams& p);
void forward(const SelectiveScanParams& p, void* workspace, void* stream);
int64_t backward_workspace(const SelectiveScanBackwardParams& p);
void backward(const SelectiveScanBackwardParams& p, void* workspace, void* stream);

}  // namespace cuda::selective_scan

}  // namespace writesae
