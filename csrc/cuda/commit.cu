// Moves accepted nodes to the front of the tree's slots, all layers in one launch. One thread owns
// a column: one unit of one head of one cache, in every slot of one request. It stages up to
// kStagedNodes entries of the path in registers before it writes the first of them. Entries only
// move down, and entry j lands before the source of any later one, so with the columns disjoint the
// move is safe in place without a barrier. Bytes moved: each kept node that is not in place, read
// and written once.
//
// A second, small launch gathers the hidden states and advances `lengths`: every block of the move
// reads them, and only the end of a launch tells that all have.
//
// Slots outside of the cache are dropped, path entries clamped.
#include "../core/commit.hpp"

#include "kernels.hpp"
#include "unit_rows.cuh"

namespace specdec::cuda {
namespace {

constexpr int kBlockThreads = 128;
constexpr int kStagedNodes = 8;
constexpr int kMaxCaches = 256;  // of one launch: the keys and values of 128 layers

struct Path {
  const int32_t* nodes;     // [B, N]
  const int32_t* num_kept;  // [B]
  int64_t stride_b, stride_n, stride_num_kept;
  int32_t num_nodes;

  __device__ int32_t kept(int64_t b) const { return min(num_kept[b * stride_num_kept], num_nodes); }
  __device__ int32_t node(int64_t b, int32_t j) const {
    return min(max(nodes[b * stride_b + j * stride_n], 0), num_nodes - 1);
  }
};

struct MoveParams {
  UnitView caches[kMaxCaches];
  SlotMap slots;
  Path path;
  const int32_t* lengths;  // [B]
  int64_t stride_lengths, capacity;
};

template <class Unit>
__global__ void __launch_bounds__(kBlockThreads, 4)
    commit_move_kernel(const __grid_constant__ MoveParams params) {
  const int64_t b = blockIdx.x;
  const UnitView& cache = params.caches[blockIdx.y];
  const Path& path = params.path;
  const int32_t kept = path.kept(b);
  if (kept <= 0 || path.node(b, kept - 1) == kept - 1) return;  // all are in place
  const int32_t column = static_cast<int32_t>(blockIdx.z * kBlockThreads + threadIdx.x);
  if (column >= cache.heads * cache.units) return;
  const int32_t head = column / cache.units, unit = column % cache.units;
  const int64_t length = params.lengths[b * params.stride_lengths];
  for (int32_t first = 0; first < kept; first += kStagedNodes) {
    Unit staged[kStagedNodes];
    Unit* targets[kStagedNodes];
#pragma unroll
    for (int32_t i = 0; i < kStagedNodes; ++i) {
      targets[i] = nullptr;
      const int32_t j = first + i;
      if (j >= kept) continue;
      const int32_t node = path.node(b, j);
      if (node == j) continue;
      const Place from = place_of(params.slots, params.capacity, b, length + node);
      const Place to = place_of(params.slots, params.capacity, b, length + j);
      if (!from.is_valid || !to.is_valid) continue;
      staged[i] = load_global(cache.at<Unit>(from.page, head, from.offset, unit));
      targets[i] = cache.at<Unit>(to.page, head, to.offset, unit);
    }
#pragma unroll
    for (int32_t i = 0; i < kStagedNodes; ++i) {
      if (targets[i] != nullptr) store_global(targets[i], staged[i]);
    }
  }
}

struct FinishParams {
  UnitView hidden, hidden_out;  // nodes in place of slots; no units without hidden states
  Path path;
  int32_t* lengths;  // [B], advanced
  int64_t stride_lengths;
};

template <class Unit>
__global__ void __launch_bounds__(kBlockThreads)
    commit_finish_kernel(const __grid_constant__ FinishParams params) {
  const int64_t b = blockIdx.x;
  const Path& path = params.path;
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  if (blockIdx.y == 0 && thread == 0) {
    params.lengths[b * params.stride_lengths] += path.num_kept[b * path.stride_num_kept];
  }
  if (params.hidden.units == 0) return;
  const int32_t kept = path.kept(b);
  for (int32_t j = static_cast<int32_t>(blockIdx.y); j < path.num_nodes;
       j += static_cast<int32_t>(gridDim.y)) {
    const int32_t node = path.node(b, j);
    for (int32_t unit = thread; unit < params.hidden.units; unit += kBlockThreads) {
      Unit value{};
      if (j < kept) value = load_global(params.hidden.at<Unit>(b, 0, node, unit));
      store_global(params.hidden_out.at<Unit>(b, 0, j, unit), value);
    }
  }
}

Path path_of(const CommitParams& params) {
  return {params.path,          params.num_kept,        params.stride_path_b,
          params.stride_path_n, params.stride_num_kept, params.nodes};
}

void move(const CommitParams& params, const CacheView* caches, int64_t num, Stream stream) {
  int64_t unit = 16, columns = 0;
  for (int64_t i = 0; i < num; ++i) unit = std::min(unit, widest_unit(caches[i], params.dtype));
  MoveParams moved{.caches = {},
                   .slots = params.slots,
                   .path = path_of(params),
                   .lengths = params.lengths,
                   .stride_lengths = params.stride_lengths,
                   .capacity = params.capacity};
  for (int64_t i = 0; i < num; ++i) {
    moved.caches[i] = unit_view(caches[i], params.dtype, unit);
    columns = std::max(columns, int64_t{caches[i].heads} * moved.caches[i].units);
  }
  if (columns == 0) return;
  const dim3 grid(static_cast<unsigned>(params.batch), static_cast<unsigned>(num),
                  static_cast<unsigned>((columns + kBlockThreads - 1) / kBlockThreads));
  with_unit(unit, [&](auto value) {
    launch("commit", commit_move_kernel<decltype(value)>, grid, kBlockThreads, 0, stream, moved);
  });
}

void finish(const CommitParams& params, Stream stream) {
  const CacheView from{const_cast<void*>(params.hidden),
                       params.stride_hidden_b,
                       0,
                       params.stride_hidden_n,
                       params.stride_hidden_f,
                       1,
                       params.features};
  const CacheView to{
      params.hidden_out, int64_t{params.nodes} * params.features, 0, params.features, 1, 1,
      params.features};
  const DType dtype = params.hidden_dtype;
  const int64_t unit = std::min(widest_unit(from, dtype), widest_unit(to, dtype));
  const FinishParams finished{.hidden = unit_view(from, dtype, unit),
                              .hidden_out = unit_view(to, dtype, unit),
                              .path = path_of(params),
                              .lengths = params.lengths,
                              .stride_lengths = params.stride_lengths};
  const int32_t rows = finished.hidden.units == 0 ? 1 : std::clamp(params.nodes, 1, 65535);
  with_unit(unit, [&](auto value) {
    launch("commit", commit_finish_kernel<decltype(value)>,
           dim3(static_cast<unsigned>(params.batch), static_cast<unsigned>(rows)), kBlockThreads, 0,
           stream, finished);
  });
}

}  // namespace

void commit(const CommitParams& params, Stream stream) {
  if (params.batch == 0) return;
  for (int64_t first = 0; params.nodes > 0 && first < params.num_caches; first += kMaxCaches) {
    move(params, params.caches + first, std::min<int64_t>(kMaxCaches, params.num_caches - first),
         stream);
  }
  finish(params, stream);
}

}  // namespace specdec::cuda
