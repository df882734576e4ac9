// ssd on CUDA: a scan (scan.cuh) that writes without reading.
#pragma once

#include "../ssd.h"
#include "scan.cuh"

namespace writesae::cuda::ssd {

struct Rule {
  static constexpr const char* NAME = "ssd";
  static constexpr bool READS = false, CHANNEL = false, ALL = false;

  // Host: the kernels in one type of computation, ssd_<type>.cu.
  template <class T>
  static void run_prepare(const Problem& p, tile::Stream stream);
  template <class T>
  static void run_chunks(const Problem& p, int warps, tile::Stream stream);
  template <class T>
  static void run_backward(const Backward& b, tile::Stream stream);
};

}  // namespace writesae::cuda::ssd
