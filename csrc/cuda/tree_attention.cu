// Attention of tree nodes over the committed prefix and their ancestors: split-KV flash decoding.
//
// Which splits a call has is settled on the host from its sizes, so that it can be captured in a
// graph; which of them have work is settled on the device, from lengths and num_nodes. A request
// that fits one split is finished by it, else a second kernel joins the partial results.
//
// Bytes, with T = ceil(N * H/G / rows of a tile), which is 1 up to 256 rows on tensor cores (128
// where D or E is above 128) and up to 48 without (28 of the widest heads), K_b keys that request b
// sees, A_b splits of it that have work, and w bytes an element:
//   reads   sum_b T * G * K_b * (D + E) * w + A_b * H * N * D * w, 16 bytes of ancestor words a row
//           for each tile that is not all prefix
//   writes  B * H * N * E * w, and 4 * B * H * N with lse
//   partial results where A_b > 1: A_b * H * N * (E + 2) * 4 written, and (E + 3) for (E + 2) read
#include <algorithm>
#include <bit>

#include "../cpu/error.hpp"
#include "attention_mma.cuh"
#include "attention_plain.cuh"
#include "kernels.hpp"
#include "unit_rows.cuh"

namespace specdec::cuda {
namespace {

constexpr int kMergeThreads = 128, kMergeResident = 12;  // blocks of a processor, by registers
constexpr int64_t kMaxSplits = 256;
// A longer request is split even where the requests alone would fill the device: lengths are ragged
// and the longest one ends last.
constexpr int64_t kMaxSplitKeys = 8192;
constexpr int64_t kMaxPartialBytes = 64 << 20;
constexpr int kBlocksPerProcessor = 2;  // unmeasured; they set the number of splits

// A warp joins the splits of one row.
template <class T>
__global__ void __launch_bounds__(kMergeThreads, kMergeResident)
    attend_merge_kernel(const __grid_constant__ AttentionParams params) {
  const TreeAttentionParams& call = params.call;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  const uint32_t index = blockIdx.x * (kMergeThreads / 32) + threadIdx.x / 32,
                 rows = static_cast<uint32_t>(params.rows()),
                 heads = static_cast<uint32_t>(call.k_cache.heads);
  const int64_t b = index / rows / heads;
  const int32_t g = static_cast<int32_t>(index / rows % heads),
                of_head = static_cast<int32_t>(index % rows);
  if (b >= call.batch) return;
  const KeyRange range = key_range(params, b, params.tile_keys);
  if (range.num_active == 1) return;
  const int32_t node = of_head / params.group, head = g * params.group + of_head % params.group;
  const bool is_node = node < range.count;
  const int32_t num_splits = is_node ? range.num_active : 0, dims = call.v_cache.head_dim;
  const int32_t columns = (dims + 31 - lane) / 32;  // of the lane, 32 apart
  const int64_t first = params.partial(b, g, 0) + of_head, step = params.rows();

  float largest = -INFINITY, weight = 0.0f, sums[kMaxHeadDim / 32] = {};
  for (int32_t split = lane; split < num_splits; split += 32) {
    largest = fmaxf(largest, load_global(params.largest + first + split * step));
  }
  largest = warp_max(largest);
  const float base = base_of(largest);
  for (int32_t start = 0; start < num_splits; start += 32) {
    float share = 0.0f;  // of the lane's split
    if (start + lane < num_splits) {
      const int64_t partial = first + (start + lane) * step;
      share = power_of_2(load_global(params.largest + partial) - base);
      weight += share * load_global(params.weights + partial);
    }
    const int32_t stop = min(start + 32, num_splits);
#pragma unroll 2
    for (int32_t split = start; split < stop; ++split) {
      const float factor = __shfl_sync(~0u, share, split - start);
      const float* added = params.sums + (first + split * step) * dims;
#pragma unroll
      for (int32_t c = 0; c < kMaxHeadDim / 32; ++c) {
        if (c >= columns) break;
        sums[c] += factor * load_global(added + 32 * c + lane);
      }
    }
  }
  weight = warp_sum(weight);
  const RowEnd end = end_of_row(call, head, is_node, largest, weight);
  if (lane == 0) store_lse(call, b, node, head, end.lse);
  T* out = static_cast<T*>(call.out) + out_offset(call, b, node, head);
#pragma unroll
  for (int32_t c = 0; c < kMaxHeadDim / 32; ++c) {
    if (c >= columns) break;
    store_global(out + 32 * c + lane, from_float<T>(scaled(sums[c], end.factor)));
  }
}

// The kernel of a call, its tiles, and how it is launched.
struct Attend {
  void (*kernel)(AttentionParams);
  int32_t row_tiles, rows, keys;  // of a tile
  int threads;
  size_t shared;
  int blocks_per_processor;  // that the number of splits counts on
};

int32_t divide_up(int32_t a, int32_t b) { return (a + b - 1) / b; }

template <class T, int kDim, int kRows>
Attend attend_mma(int32_t rows) {
  using Tile = MmaTile<kDim, kRows>;
  static_assert(Tile::shared_bytes(kRows) <= kMaxShared);
  Attend attend{attend_mma_kernel<T, kDim, kRows>,
                divide_up(rows, kRows),
                kRows,
                Tile::kKeys,
                Tile::kMaxThreads,
                0,
                kBlocksPerProcessor};
  if (Tile::kIsWide) {
    const int32_t warps = divide_up(rows, Tile::kWarpRows * attend.row_tiles);
    attend.rows = Tile::kWarpRows * warps;
    attend.threads = 32 * warps;
    attend.blocks_per_processor =
        std::min(kBlocksPerProcessor, Tile::kResident * Tile::kMaxThreads / attend.threads);
  }
  attend.shared = static_cast<size_t>(Tile::shared_bytes(attend.rows));
  return attend;
}

template <class T, int kDim>
Attend attend_mma(int32_t rows) {
  if constexpr (kDim > 128) {
    return rows <= 32 ? attend_mma<T, kDim, 32>(rows) : attend_mma<T, kDim, 128>(rows);
  } else {
    return rows <= 16   ? attend_mma<T, kDim, 16>(rows)
           : rows <= 64 ? attend_mma<T, kDim, 64>(rows)
                        : attend_mma<T, kDim, 256>(rows);
  }
}

template <class T>
Attend choose_mma(int32_t dim, int32_t rows) {
  if (dim <= 64) return attend_mma<T, 64>(rows);
  if (dim <= 80) return attend_mma<T, 80>(rows);
  if (dim <= 96) return attend_mma<T, 96>(rows);
  if (dim <= 128) return attend_mma<T, 128>(rows);
  return attend_mma<T, 256>(rows);
}

template <class T>
Attend attend_plain(const PlainTile& tile, int32_t rows) {
  int32_t most = PlainTile::kMaxWarps;
  while (4 * tile.shared_floats(most) > kMaxShared) --most;
  const int32_t row_tiles = divide_up(rows, most * PlainTile::kWarpRows);
  const int32_t warps =
      std::max(PlainTile::kMinWarps, divide_up(rows, PlainTile::kWarpRows * row_tiles));
  return {attend_plain_kernel<T>,
          row_tiles,
          warps * PlainTile::kWarpRows,
          PlainTile::kKeys,
          32 * warps,
          size_t{4} * static_cast<size_t>(tile.shared_floats(warps)),
          2 * warps > PlainTile::kMaxWarps ? 1 : kBlocksPerProcessor};
}

Attend choose(const AttentionParams& params) {
  const TreeAttentionParams& call = params.call;
  const int32_t dim = std::max(call.q.head_dim, call.v_cache.head_dim);
  Attend chosen{};
  with_dtype(call.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {
      if (params.has_wide_kv) {
        chosen = choose_mma<T>(dim, params.rows());
        return;
      }
    }
    chosen = attend_plain<T>(PlainTile(call.q.head_dim, call.v_cache.head_dim), params.rows());
  });
  return chosen;
}

bool is_empty(const TreeAttentionParams& call) {
  return call.batch == 0 || call.nodes == 0 || call.q.heads == 0;
}

// Splits of each request: as many as the device runs at once, and none with more than
// kMaxSplitKeys keys.
int64_t count_splits(const AttentionParams& params, int64_t resident_blocks) {
  const TreeAttentionParams& call = params.call;
  int64_t keys = call.capacity;
  if (call.window > 0) keys = std::min<int64_t>(keys, int64_t{call.window} + call.nodes);
  const int64_t blocks = int64_t{call.batch} * call.k_cache.heads * params.row_tiles;
  const int64_t wanted =
      std::max(resident_blocks / blocks, (keys + kMaxSplitKeys - 1) / kMaxSplitKeys);
  const int64_t tiles = (keys + params.tile_keys - 1) / params.tile_keys;
  const int64_t partial_bytes =
      int64_t{4} * call.batch * call.q.heads * call.nodes * (call.v_cache.head_dim + 2);
  return std::max<int64_t>(1, std::min({wanted, (tiles + params.min_tiles - 1) / params.min_tiles,
                                        kMaxSplits, kMaxPartialBytes / partial_bytes}));
}

AttentionParams plan(const TreeAttentionParams& call) {
  if (call.q.head_dim > kMaxHeadDim || call.v_cache.head_dim > kMaxHeadDim) {
    fail("tree_attention: D and E must be at most %d for backend 'cuda', got %d and %d",
         kMaxHeadDim, call.q.head_dim, call.v_cache.head_dim);
  }
  AttentionParams params{};
  params.call = call;
  if (is_empty(call)) return params;
  params.group = call.q.heads / call.k_cache.heads;
  const auto page_size = static_cast<uint32_t>(call.slots.page_size);
  params.page_shift = std::has_single_bit(page_size) ? std::countr_zero(page_size) : -1;
  params.has_wide_q = widest_unit(call.q, call.dtype) == 16;
  params.has_wide_kv =
      widest_unit(call.k_cache, call.dtype) == 16 && widest_unit(call.v_cache, call.dtype) == 16;
  const Attend attend = choose(params);
  params.row_tiles = attend.row_tiles;
  params.tile_keys = attend.keys;
  // A split reads at least as much of 16-bit keys and values as its partial result is moved.
  params.min_tiles = std::max(2, 2 * attend.rows / attend.keys);
  const int64_t resident = int64_t{attend.blocks_per_processor} * num_processors("tree_attention");
  params.num_splits = static_cast<int32_t>(count_splits(params, resident));
  return params;
}

int64_t num_partials(const AttentionParams& params) {
  return params.num_splits > 1 ? int64_t{params.call.batch} * params.call.q.heads *
                                     params.call.nodes * params.num_splits
                               : 0;
}

}  // namespace

size_t tree_attention_scratch_bytes(const TreeAttentionParams& call) {
  return static_cast<size_t>(4 * num_partials(plan(call)) * (call.v_cache.head_dim + 2));
}

void tree_attention(const TreeAttentionParams& call, void* scratch, Stream stream) {
  AttentionParams params = plan(call);
  if (is_empty(call)) return;
  params.sums = static_cast<float*>(scratch);
  params.largest = params.sums + num_partials(params) * call.v_cache.head_dim;
  params.weights = params.largest + num_partials(params);
  const Attend attend = choose(params);
  const int64_t heads = int64_t{call.batch} * call.k_cache.heads;
  const int64_t blocks = heads * params.row_tiles * params.num_splits;
  if (std::max(blocks, heads * params.rows()) > INT32_MAX) {
    fail("tree_attention: B * N * H must be below 2^31 for backend 'cuda'");
  }
  if (attend.shared > 48 << 10) {
    allow_dynamic_shared("tree_attention", attend.kernel, attend.shared);
  }
  launch("tree_attention", attend.kernel, dim3(static_cast<unsigned>(blocks)), attend.threads,
         attend.shared, stream, params);
  if (params.num_splits == 1) return;
  constexpr int64_t kMergeRows = kMergeThreads / 32;
  const auto merge_blocks =
      static_cast<unsigned>((heads * params.rows() + kMergeRows - 1) / kMergeRows);
  with_dtype(call.dtype, [&](auto element) {
    launch("tree_attention", attend_merge_kernel<decltype(element)>, dim3(merge_blocks),
           kMergeThreads, 0, stream, params);
  });
}

}  // namespace specdec::cuda
