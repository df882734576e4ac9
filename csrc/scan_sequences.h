// What a scan of any kind takes beside its tokens, from tensors, checked: its sequences, and the places in them.
#pragma once

#include "edit_list.h"
#include "tensors.h"

namespace writesae {

// Fills cu_seqlens, N, initial_state, edits, P and places of p, which has B, T, K, V, and N = B.
template <class Params>
void scan_sequences(const char* op, int64_t heads, const std::optional<Tensor>& initial_state,
                    const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& edit_index,
                    const std::optional<Tensor>& edit_left, const std::optional<Tensor>& edit_right,
                    const std::optional<Tensor>& snapshots, Params& p, std::vector<Tensor>& keep) {
  std::vector<int64_t> lengths(p.B, p.T);
  if (cu_seqlens.has_value()) {
    p.cu_seqlens = sequence_offsets(op, *cu_seqlens, p.B, p.T, keep);
    p.N = cu_seqlens->size(0) - 1;
    lengths.clear();
    for (int64_t n = 0; READABLE && n < p.N; n++) lengths.push_back(p.cu_seqlens[n + 1] - p.cu_seqlens[n]);
  }
  if (initial_state.has_value()) check_shape(op, "initial_state", *initial_state, {p.N, heads, p.K, p.V});
  p.initial_state = static_cast<const float*>(data_as(op, "initial_state", initial_state, ScalarType::Float, keep));
  p.edits = edit_list(op, edit_index, edit_left, edit_right, p.N, lengths, heads, p.K, p.V, keep);
  if (snapshots.has_value()) {
    STD_TORCH_CHECK(snapshots->dim() == 2 && snapshots->size(1) == 2, op, ": snapshots must be [P, 2]");
    check_dtype(op, "snapshots", *snapshots, ScalarType::Long);
    p.P = snapshots->size(0);
    p.places = static_cast<const int64_t*>(data_as(op, "snapshots", snapshots, ScalarType::Long, keep));
    for (int64_t i = 0; READABLE && i < p.P; i++) {
      const int64_t n = p.places[2 * i], t = p.places[2 * i + 1];
      STD_TORCH_CHECK(n >= 0 && n < p.N && t >= 0 && t < lengths[n], op, ": snapshot ", i, " is out of range: row ", n,
                      ", position ", t);
    }
  }
}

}  // namespace writesae
