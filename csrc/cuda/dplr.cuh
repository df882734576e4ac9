// dplr on CUDA: a scan (scan.cuh) with a gate of each channel, and a low-rank erase or none.
#pragma once

#include "../dplr.h"
#include "scan.cuh"

namespace writesae::cuda::dplr {

// Without a and b (GLA): it only adds.
struct AdditiveRule {
  static constexpr const char* NAME = "dplr";
  static constexpr bool READS = false, CHANNEL = true, LOW_RANK = false, ALL = false;

  // Host: the kernels in one type of computation, dplr_additive_<type>.cu.
  template <class T>
  static void run_prepare(const ChannelProblem& p, tile::Stream stream);
  template <class T>
  static void run_chunks(const ChannelProblem& p, int warps, tile::Stream stream);
  template <class T>
  static void run_backward(const ChannelBackward& b, tile::Stream stream);
};

// With them (RWKV-7, Comba).
struct LowRankRule {
  static constexpr const char* NAME = "dplr";
  static constexpr bool READS = true, CHANNEL = true, LOW_RANK = true, ALL = false;

  // Host: the kernels in one type of computation, dplr_low_rank_<type>.cu and dplr_low_rank_backward_<type>.cu.
  template <class T>
  static void run_prepare(const LowRankProblem& p, tile::Stream stream);
  template <class T>
  static void run_chunks(const LowRankProblem& p, int warps, tile::Stream stream);
  template <class T>
  static void run_backward(const LowRankBackward& b, tile::Stream stream);
};

}  // namespace writesae::cuda::dplr
