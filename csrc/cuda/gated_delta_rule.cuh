// gated_delta_rule on CUDA: a scan (scan.cuh) that reads before it writes.
#pragma once

#include "../gated_delta_rule.h"
#include "scan.cuh"

namespace writesae::cuda::gated_delta_rule {

struct Rule {
  static constexpr const char* NAME = "gated_delta_rule";
  static constexpr bool READS = true, CHANNEL = false, LOW_RANK = false, ALL = true;

  // Host: the kernels in one type of computation, gated_delta_rule_<type>.cu and gated_delta_rule_backward_<type>.cu.
  template <class T>
  static void run_prepare(const Problem& p, tile::Stream stream);
  template <class T>
  static void run_chunks(const Problem& p, int warps, tile::Stream stream);
  template <class T>
  static void run_backward(const Backward& b, tile::Stream stream);
};

// With a gate of each channel (Kimi Delta Attention).
struct ChannelRule {
  static constexpr const char* NAME = "gated_delta_rule";
  static constexpr bool READS = true, CHANNEL = true, LOW_RANK = false, ALL = false;

  // Host: the kernels in one type of computation, gated_delta_rule_channels_<type>.cu and
  // gated_delta_rule_backward_channels_<type>.cu.
  template <class T>
  static void run_prepare(const ChannelProblem& p, tile::Stream stream);
  template <class T>
  static void run_chunks(const ChannelProblem& p, int warps, tile::Stream stream);
  template <class T>
  static void run_backward(const ChannelBackward& b, tile::Stream stream);
};

}  // namespace writesae::cuda::gated_delta_rule
