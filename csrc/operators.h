// The operators on tensors, as library.cpp registers them. Each is defined in csrc/<op>.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace writesae {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_delta_rule(
    Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, double scale, std::optional<Tensor> initial_state,
    bool use_qk_l2norm, std::optional<Tensor> cu_seqlens, std::optional<Tensor> edit_index,
    std::optional<Tensor> edit_left, std::optional<Tensor> edit_right, std::optional<Tensor> snapshots,
    bool return_writes);

std::tuple<Tensor, Tensor, Tensor> gated_delta_rule_step(
    Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor state, double scale, bool use_qk_l2norm,
    std::optional<Tensor> edit_index, std::optional<Tensor> edit_left, std::optional<Tensor> edit_right,
    bool return_writes);

}  // namespace writesae
