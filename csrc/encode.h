// encode: a_i(t) = sum_x v_ix^T S_t w_ix for every atom i of every encoded head, which under one gate a head is
// e^g a_i(t-1) + sum_r sum_x (v_ix . left_r)(right_r . w_ix), under one a key channel what encode_channels_kernel.h says, and of
// each token the k largest of a + b, or those above a threshold, or those at given features. Letters: B row, T position,
// Hl left heads, H value heads, Hs encoded heads, R writes a token, K key size, V value size, F features, r rank of an
// atom, N sequences.
#pragma once

#include <cstdint>
#include <vector>

#include "edits.h"
#include "element.h"
#include "parallel.h"

namespace writesae {

struct EncodeParams {
  int64_t B, T, Hl, H, Hs, R, K, V, F, rank, N;
  bool channels;              // a gate for every key channel
  const float* decay;         // [B, T, H], or [B, T, H, K] with channels
  View left;                  // [B, T, Hl, R, K]  four strides; the last axis has stride 1
  View right;                 // [B, T, H, R, V]   likewise
  const int64_t* heads;       // [Hs]
  View v_enc;                 // [Hs, F, r, K]  last stride 1
  View w_enc;                 // [Hs, F, r, V]  last stride 1
  const float* b_enc;         // [Hs, F] or null (zero)
  const float* carry_in;      // [N, Hs, F] or null (zero); null with channels
  const float* states;        // with channels, [N, Hs, K, V] before each sequence's first token, or null (zero)
  const int64_t* cu_seqlens;  // [N + 1] or null; then B = 1
  EditList edits;             // all of kind add, before the read
  bool bf16;                  // operands of the products rounded to bfloat16, sums in float32
  float* carry_out;           // [N, Hs, F]

  // Exactly one of the three: k > 0, threshold, or at.
  int64_t k;
  float* values;           // [B, T, Hs, k], or [B, T, Hs, m] with `at`
  int64_t* indices;        // [B, T, Hs, k]
  const float* threshold;  // [Hs, F]
  const int64_t* at;       // [B, T, Hs, m]
  int64_t m;
};

// What threshold mode finds: for each encoded head, runs in token order.
struct EncodeFound {
  std::vector<std::vector<float>> values;     // [Hs]
  std::vector<std::vector<int32_t>> indices;  // [Hs]
  int64_t* counts;                            // [B * T * Hs]
};

// Gradients of a function of activations at chosen features, on a device: those of the factors (dv, dw, d_carry) or those of
// the writes (d_left, d_right); the pointers of the others are null. No edits.
struct EncodeBackwardParams {
  EncodeParams rows;  // with `at`, m
  const float* grad;  // [B, T, Hs, m] gradient of the activations at `at`
  float* dv;          // [Hs, F, r, K]
  float* dw;          // [Hs, F, r, V]
  float* d_carry;     // [N, Hs, F] of the activations before each sequence's first token
  float* d_left;      // [B, T, Hs, R, K] each encoded head's share
  float* d_right;     // [B, T, Hs, R, V]
};

// How the two products are taken. Sums are float32 in all of them.
enum class Precision : int { bf16, tf32, fp32 };

namespace cpu {

void encode(const EncodeParams& p, EncodeFound* found, const Parallel& parallel);

}  // namespace cpu

namespace cuda {

enum class EncodeMode : int { topk, count, fill, at };

// Where mode count puts its counts, and fill, given their exclusive sums, what it finds. All on the device.
struct EncodeFindings {
  int64_t* counts;         // [B * T * Hs]
  const int64_t* offsets;  // [B * T * Hs]
  float* values;
  int64_t* indices;
};

// Bytes of device memory a call needs beside its outputs.
int64_t encode_scratch(const EncodeParams& p, Precision precision, EncodeMode mode);

// Everything p points to is on the device, and `scratch`. Does not wait. Every mode writes carry_out. p.bf16 is not read.
void encode(const EncodeParams& p, Precision precision, EncodeMode mode, const EncodeFindings& findings, void* scratch,
            void* stream);

int64_t encode_backward_scratch(const EncodeBackwardParams& p);
void encode_backward(const EncodeBackwardParams& p, void* scratch, void* stream);

// offsets[i] = counts[0] + .. + counts[i - 1], i up to n; returns the last, and waits for it.
int64_t encode_offsets(const int64_t* counts, int64_t n, int64_t* offsets, void* stream);

// Cuts sequences into segments of this many tokens from now on; 0 for the length that takes the least time. For tests.
void encode_force_segment(int tokens);
// Shares the features of a segment among so many blocks from now on, where the k largest are asked for; 0 likewise.
void encode_force_parts(int parts);

// How a top-k call of such sizes is cut: tokens of a segment, blocks that share its features, heads at a time, blocks that the
// device runs at once, candidates kept a token, and the share of those blocks that work.
struct EncodeOutline {
  int segment, parts, heads, slots, capacity;
  double busy;
};
EncodeOutline encode_outline(const EncodeParams& p, Precision precision);

}  // namespace cuda
}  // namespace writesae
