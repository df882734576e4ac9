// One training step's sums at codes already chosen: the loss of every token and the gradients of all factors, from writes.
// Letters as in encode.h. With the state S_t, codes a and atoms A_i = sum_x v_ix w_ix^T:
//   error_t = ||S_t - M - sum_j a_j A_j||^2,  loss = sum_t weight_t error_t.
#pragma once

#include <cstdint>

#include "element.h"
#include "encode.h"
#include "parallel.h"

namespace writesae {

struct SaeTrainingParams {
  // Rows of the writes, sizes, and `m` features `at` of every token; v_enc, w_enc there are the encoder's factors.
  EncodeParams rows;
  // What to do. encoder: gradients of v_enc, w_enc, from `grad` or, with the decoder, from the loss through the codes
  // that are > 0. decoder: the error, and with `gradients` those of v_dec, w_dec. At least one of the two.
  bool encoder, decoder, gradients;
  const float* grad;       // [B, T, Hs, m] gradient of the activations, or null: then the loss gives it
  const float* values;     // [B, T, Hs, m] codes
  const float* weight;     // [B, T, Hs] or null (1); a token of weight 0 is left out, its error is 0
  View v_dec, w_dec;       // [Hs, F, r, K] and [Hs, F, r, V]  last stride 1
  const float* offset;     // [Hs, K, V] M, or null (0)
  const float* on_offset;  // [Hs, F] <A_i, M>, or null (0)
  const float* initial;    // [N, H, K, V] states before the first tokens, or null (0)

  // Results; those of parts not asked for may be null. Gradients of the loss.
  float* error;      // [B, T, Hs]
  float* d_values;   // [B, T, Hs, m] or null
  float* dv_enc;     // [Hs, F, r, K]
  float* dw_enc;     // [Hs, F, r, V]
  float* db_enc;     // [Hs, F] or null
  float* d_carry;    // [N, Hs, F] or null: gradient of the activations before each sequence's first token
  float* dv_dec;     // [Hs, F, r, K]  without the part through M, which is 2 usage_i M w_i
  float* dw_dec;     // [Hs, F, r, V]  likewise, 2 usage_i M^T v_i
  float* usage;      // [Hs, F] sum_t weight_t a_i(t)
  float* state_sum;  // [Hs, K, V] sum_t weight_t S_t
};

namespace cpu {

void sae_training(const SaeTrainingParams& p, const Parallel& parallel);

}  // namespace cpu
}  // namespace writesae
