// A warp owns a tile of a row: 20 bytes of summaries for each 512 logits, which are read once. With
// as many blocks as there are pairs of tiles, a single row of 128,000 logits has 125 of them.
//
// The delicate step is the noise, which has the reference's bits: philox.hpp, without contraction.
#include "summaries.cuh"

namespace specdec::cuda {
namespace {

constexpr int kBlockThreads = 64;

// Number of ancestors. Wrong parents end the count: no walk comes by there.
__device__ int32_t depth_of(const SummarizeParams& params, int64_t b, int32_t node) {
  const int32_t* parents = params.parents + b * params.stride_parents_b;
  int32_t depth = 0;
  while (node > 0) {
    const int32_t above = parents[node * params.stride_parents_n];
    node = above >= 0 && above < node ? above : 0;
    ++depth;
  }
  return depth;
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    summarize_kernel(const __grid_constant__ SummarizeParams params) {
  const int64_t index = blockIdx.x, b = index / params.nodes;
  const int32_t node = static_cast<int32_t>(index % params.nodes);
  if (params.num_nodes != nullptr && node >= params.num_nodes[b]) return;
  const LogitRow<T> row(params.sampling, b, node);
  const int32_t tile =
      static_cast<int32_t>(blockIdx.y * (kBlockThreads / kWarpSize) + threadIdx.x / kWarpSize);
  if (tile >= row.tiles()) return;
  const RowFilters filters(params.sampling, b);
  const bool wants_mass = filters.is_sampled() && (params.wants_masses || filters.top_p < 1.0f);
  const Summaries summaries = params.summaries.row(index, params.row_tiles);
  if (params.wants_noise && filters.is_sampled() && !filters.has_any()) {
    const int64_t offset = params.parents == nullptr ? 0 : depth_of(params, b, node) + 1;
    const Noise noise(params.sampling, b, offset);
    summarize_tile<T>(row, &noise, wants_mass, tile, summaries);
  } else {
    summarize_tile<T>(row, nullptr, wants_mass, tile, summaries);
  }
}

}  // namespace

void summarize_rows(const char* op, const SummarizeParams& params, Stream stream) {
  constexpr unsigned kTilesPerBlock = kBlockThreads / kWarpSize;
  const unsigned rows = static_cast<unsigned>(params.sampling.batch * params.nodes);
  const unsigned blocks =
      (static_cast<unsigned>(params.row_tiles) + kTilesPerBlock - 1) / kTilesPerBlock;
  with_element(params.sampling.dtype, [&](auto element) {
    launch(op, summarize_kernel<decltype(element)>, dim3(rows, blocks), kBlockThreads, 0, stream,
           params);
  });
}

}  // namespace specdec::cuda
