// selective_scan on CUDA: the forward, which the step is too (one token, from and to one state). See selective_scan.cuh.
#include "selective_scan_walk.cuh"

namespace writesae::cuda::selective_scan {
namespace {

__global__ void __launch_bounds__(THREADS) list_places(const __grid_constant__ Given g) {
  const SelectiveScanParams& p = g.in;
  const int64_t i = static_cast<int64_t>(tile::block_x()) * THREADS + tile::thread();
  if (i >= p.P) return;
  const int64_t n = p.places[2 * i], t = p.places[2 * i + 1];
  const auto same = [&](int64_t j) { return p.places[2 * j] == n && p.places[2 * j + 1] == t; };
  int64_t before = 0, after = i + 1;
  while (before < i && !same(before)) before++;
  while (after < p.P && !same(after)) after++;
  g.next_place[i] = after < p.P ? static_cast<int>(after) + 1 : 0;
  if (before == i) g.first_place[p.cu_seqlens == nullptr ? n * p.T + t : p.cu_seqlens[n] + t] = static_cast<int>(i) + 1;
}

Given lay_out(const SelectiveScanParams& p, Workspace& space) {
  Given g = {p, nullptr, nullptr, nullptr};
  if (p.P > 0) g.first_place = space.take<int>(p.B * p.T), g.next_place = space.take<int>(p.P);
  return g;
}

}  // namespace

void run_places(const Given& g, tile::Stream stream) {
  if (g.in.P == 0) return;
  tile::zero(g.first_place, g.in.B * g.in.T * sizeof(int), stream);
  tile::launch("selective_scan list_places", list_places, {static_cast<unsigned>(parts(g.in.P, THREADS)), 1, 1}, THREADS, 0,
               stream, g);
}

int64_t forward_workspace(const SelectiveScanParams& p) {
  Workspace space = {nullptr};
  lay_out(p, space);
  return space.used;
}

void forward(const SelectiveScanParams& p, void* workspace, void* stream) {
  Workspace space = {static_cast<char*>(workspace)};
  const Given g = lay_out(p, space);
  clear_nonfinite(p.first_nonfinite, p.B, static_cast<tile::Stream>(stream));
  run_places(g, static_cast<tile::Stream>(stream));
  with_shape("selective_scan", p.K, [&](auto shape) {
    using S = decltype(shape);
    launch_walk<S, true>(g, static_cast<tile::Stream>(stream));
  });
}

}  // namespace writesae::cuda::selective_scan
