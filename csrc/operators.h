// The operators on tensors that are no scan (scan_operators.h), as library.cpp registers them. Each is defined in csrc/<op>.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace writesae {

using torch::stable::Tensor;

Tensor causal_conv(Tensor x, Tensor weight, std::optional<Tensor> bias, bool silu, std::optional<Tensor> cu_seqlens);

std::tuple<Tensor, Tensor, Tensor> encode_topk(Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor v_enc,
                                               Tensor w_enc, std::optional<Tensor> b_enc, int64_t k,
                                               std::optional<Tensor> carry, std::optional<Tensor> cu_seqlens,
                                               std::optional<Tensor> edit_index, std::optional<Tensor> edit_left,
                                               std::optional<Tensor> edit_right, std::string precision);

std::tuple<Tensor, Tensor, Tensor, Tensor> encode_threshold(
    Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor v_enc, Tensor w_enc, std::optional<Tensor> b_enc,
    Tensor threshold, std::optional<Tensor> carry, std::optional<Tensor> cu_seqlens, std::optional<Tensor> edit_index,
    std::optional<Tensor> edit_left, std::optional<Tensor> edit_right, std::string precision);

std::tuple<Tensor, Tensor> encode_at(Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor v_enc, Tensor w_enc,
                                     Tensor indices, std::optional<Tensor> carry, std::optional<Tensor> cu_seqlens,
                                     std::optional<Tensor> edit_index, std::optional<Tensor> edit_left,
                                     std::optional<Tensor> edit_right);

std::tuple<Tensor, Tensor, Tensor> encode_backward(Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor v_enc,
                                                   Tensor w_enc, Tensor indices, Tensor grad,
                                                   std::optional<Tensor> cu_seqlens, std::optional<Tensor> edit_index,
                                                   std::optional<Tensor> edit_left, std::optional<Tensor> edit_right);

std::tuple<Tensor, Tensor> encode_writes_backward(Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor v_enc,
                                                  Tensor w_enc, Tensor indices, Tensor grad,
                                                  std::optional<Tensor> cu_seqlens);

Tensor encode_product(Tensor v, Tensor left, std::string kernel, int64_t cluster);  // of CUDA and its twin alone

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> factored_loss(
    Tensor decay, Tensor left, Tensor right, Tensor heads, Tensor values, Tensor indices, Tensor v_dec, Tensor w_dec,
    std::optional<Tensor> offset, std::optional<Tensor> on_offset, std::optional<Tensor> weight,
    std::optional<Tensor> initial_state, std::optional<Tensor> cu_seqlens, std::optional<Tensor> v_enc,
    std::optional<Tensor> w_enc, bool gradients);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan(
    Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, std::optional<Tensor> D, std::optional<Tensor> initial_state,
    std::optional<Tensor> cu_seqlens, std::optional<Tensor> edit_index, std::optional<Tensor> edit_left,
    std::optional<Tensor> edit_right, std::optional<Tensor> snapshots, bool return_writes);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, std::optional<Tensor> D, std::optional<Tensor> initial_state,
    std::optional<Tensor> cu_seqlens, std::optional<Tensor> edit_index, std::optional<Tensor> edit_left,
    std::optional<Tensor> edit_right, std::optional<Tensor> snapshots, std::optional<Tensor> d_o,
    std::optional<Tensor> d_final_state, std::optional<Tensor> d_right, std::optional<Tensor> d_snapshots);

std::tuple<Tensor, Tensor, Tensor> selective_scan_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor state,
                                                       std::optional<Tensor> D, std::optional<Tensor> edit_index,
                                                       std::optional<Tensor> edit_left, std::optional<Tensor> edit_right,
                                                       bool return_writes);

Tensor rms_norm(Tensor x, Tensor weight, std::optional<Tensor> gate, double eps, bool zero_centred, bool round_once);

}  // namespace writesae
