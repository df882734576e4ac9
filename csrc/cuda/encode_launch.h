// The parts of encode on CUDA and how they call each other.
#pragma once

#include "encode_kernel.cuh"
#include "encode_plan.h"

namespace writesae::cuda {

void cut_sequences(const EncodeParams& p, const EncodePlan& plan, Segment* segments, float* unit, tile::Stream stream);
void pack_dictionary(const EncodeParams& p, const EncodeWork& work, const EncodePlan& plan, tile::Vec16* out,
                     tile::Stream stream);
// The states and gate products before every segment.
void segment_states(const EncodeParams& p, const EncodeWork& work, const EncodePlan& plan, float* states, float* reach,
                    tile::Stream stream);

// Of what the parts of a launch selected, the k largest of each token.
void merge_parts(const EncodeParams& p, const EncodeWork& work, tile::Stream stream);

// From activations without bias, sums [B][count][Hs][F], of the tokens first .. first + count - 1 of every batch row.
void select_from(const EncodeParams& p, const EncodeWork& work, const float* sums, int first, int count,
                 tile::Stream stream);

// Under channel gates. `forced`: tokens of a chunk, 0 to choose.
int64_t channels_scratch(const EncodeParams& p, int forced);
void encode_channels(const EncodeParams& p, const EncodeWork& work, Precision precision, int forced, void* scratch,
                     tile::Stream stream);

// One token of every sequence; nothing of `work` but the mode and where counts and findings go.
void decode(const EncodeParams& p, const EncodeWork& work, tile::Stream stream);

// One precision's kernels, each in a file of its own: by padded size (32, 64, 128, 256).
struct Kernel {
  void (*run)(EncodeParams, EncodeWork);
  Traits traits;
};
Kernel encode_kernel_bf16(int depth, bool topk);
Kernel encode_kernel_tf32(int depth, bool topk);
Kernel encode_kernel_fp32(int depth, bool topk);

template <Precision P, int D>
Kernel encode_kernel_of(bool topk) {
  using N = Numbers<P, D>;
  return {topk ? encode_kernel<P, D, true> : encode_kernel<P, D, false>,
          {N::ROWS, N::TILE_VECTORS * 16, Instance<P, D>::fixed_shared, Candidates<N::ROWS>::bytes}};
}

template <Precision P>
Kernel encode_kernel_of(int depth, bool topk) {
  return depth == 32    ? encode_kernel_of<P, 32>(topk)
         : depth == 64  ? encode_kernel_of<P, 64>(topk)
         : depth == 128 ? encode_kernel_of<P, 128>(topk)
                        : encode_kernel_of<P, 256>(topk);
}

}  // namespace writesae::cuda
