// Tiles of attention on tensor cores: their sizes, their layout in shared memory, and how they come
// there.
#pragma once

#include "attention_tiles.cuh"

namespace specdec::cuda {

// kDim: columns of q, keys and values, zeros beyond D and E. kRows: the most query rows of a block.
// Few rows, up to 32, do not occupy the warps, so these share out the keys of a tile. More rows,
// and a warp owns one or two fragments of 16, and a block has the warps that its rows need.
template <int kDim, int kRows>
struct MmaTile {
  static constexpr bool kIsWide = kRows > 32;
  static constexpr int kWarpsOfKeys = kIsWide ? 1 : 64 / kRows;
  static constexpr int kFragments = kRows > 128 ? 2 : 1;  // that one load of a key serves
  static constexpr int kWarpRows = 16 * kFragments;
  static constexpr int kMaxThreads = 32 * (kRows / kWarpRows) * kWarpsOfKeys;
  static constexpr int kKeys = kRows == 16 ? 64 : kIsWide && kDim > 128 ? 16 : 32;
  static constexpr int kWarpKeys = kKeys / kWarpsOfKeys;
  static constexpr int kSpan = kFragments * kDim > 192 ? 16 : kWarpKeys;  // at once, by registers
  static constexpr int kStages = kKeys * kDim > 64 * 96 || kRows* kDim > 256 * 96 ? 2 : 3;
  static constexpr int kChunks = kDim / 8;  // of 16 bytes, in a row
  // Blocks of a processor, by registers.
  static constexpr int kResident = kRows == 16 ? (kDim <= 64 ? 4 : 3) : 256 / kMaxThreads;
  static constexpr bool kKeepsQ = kRows == 16 && kDim <= 96;  // in registers; else they are too few

  static constexpr int kTileBytes = kKeys * kDim * 2, kPipelineBytes = kStages * 2 * kTileBytes;
  static constexpr int kStateStride = kDim + 8;  // floats; without bank conflicts
  static constexpr int kStateBytes = kIsWide ? 0 : kWarpsOfKeys * kRows * (kStateStride + 2) * 4;

  // The pipeline, then q.
  static constexpr int shared_bytes(int rows) {
    const int bytes = kPipelineBytes + rows * kDim * 2;
    return bytes > kStateBytes ? bytes : kStateBytes;
  }

  // Of this block.
  __device__ static int32_t threads() {
    return kIsWide ? static_cast<int32_t>(blockDim.x) : kMaxThreads;
  }
  __device__ static int32_t rows() { return kIsWide ? threads() / 32 * kWarpRows : kRows; }

  static_assert(kDim % 16 == 0 && kWarpKeys % kSpan == 0 && kWarpKeys <= 32);

  // 16-byte chunk of a row, in elements from the tile's start. Chunks are permuted so that those of
  // one column, in 8 rows from a multiple of 8 on, lie in 8 different columns of banks.
  __device__ static int32_t at(int32_t row, int32_t chunk) {
    constexpr int kSpread = (kChunks & -kChunks) < 8 ? kChunks & -kChunks : 8;
    return (row * kChunks + (chunk ^ row / (8 / kSpread) % kSpread)) * 8;
  }
};

// Where a key and its value lie.
struct RowPlaces {
  int64_t k, v;
};

// Eight elements of a row of q from `column` on, zeros outside.
template <class T>
__device__ inline uint4 load_query(const AttentionParams& params, int64_t b, int32_t head,
                                   int32_t node, int32_t column) {
  const CacheView& q = params.call.q;
  const T* row =
      static_cast<const T*>(q.data) + b * q.stride_c + head * q.stride_g + node * q.stride_s;
  if (params.has_wide_q && column + 8 <= q.head_dim) {
    return load_global(reinterpret_cast<const uint4*>(row + column));
  }
  uint32_t pairs[4];
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    uint32_t halves[2] = {0, 0};
#pragma unroll
    for (int32_t j = 0; j < 2; ++j) {
      const int32_t d = column + 2 * i + j;
      if (d < q.head_dim) halves[j] = load_global(row + d * q.stride_d).bits;
    }
    pairs[i] = halves[0] | halves[1] << 16;
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

template <class T, int kDim, int kRows>
__device__ inline void load_queries(const AttentionParams& params, const Work& work, int32_t count,
                                    T* target) {
  using Tile = MmaTile<kDim, kRows>;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < Tile::rows() * Tile::kChunks;
       i += Tile::threads()) {
    const int32_t row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    const int32_t of_head = work.row_tile * Tile::rows() + row, node = of_head / params.group;
    uint4 values{0, 0, 0, 0};
    if (node < count) {
      values = load_query<T>(params, work.b, work.g * params.group + of_head % params.group, node,
                             chunk * 8);
    }
    store_shared(reinterpret_cast<uint4*>(target + Tile::at(row, chunk)), values);
  }
}

// Starts to copy the keys and values of the slots from `first_slot` on; `places(slot)` are elements
// from `k` and from `v`.
template <class Tile, class T, class Places>
__device__ inline void copy_tile(const AttentionParams& params, int32_t first_slot, int32_t end,
                                 const T* k, const T* v, T* k_tile, T* v_tile, Places places) {
  constexpr int32_t kCopies = Tile::kKeys * Tile::kChunks;
  const int32_t k_dims = params.call.k_cache.head_dim, v_dims = params.call.v_cache.head_dim;
#pragma unroll 2
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kCopies; i += Tile::threads()) {
    const int32_t key = i / Tile::kChunks, column = i % Tile::kChunks * 8;
    const int32_t slot = first_slot + key, target = Tile::at(key, column / 8);
    const bool is_inside = slot < end;
    const bool has_k = is_inside && column < k_dims, has_v = is_inside && column < v_dims;
    const RowPlaces rows = is_inside ? places(slot) : RowPlaces{0, 0};
    cp_async16(k_tile + target, has_k ? k + rows.k + column : k, has_k ? 16 : 0);
    cp_async16(v_tile + target, has_v ? v + rows.v + column : v, has_v ? 16 : 0);
  }
}

template <class Tile, class T>
__device__ inline void fetch_tile(const AttentionParams& params, const Work& work,
                                  const KeyRange& range, int32_t tile, T* k_tile, T* v_tile) {
  const CacheView &k = params.call.k_cache, &v = params.call.v_cache;
  const T* k_head = static_cast<const T*>(k.data) + work.g * k.stride_g;
  const T* v_head = static_cast<const T*>(v.data) + work.g * v.stride_g;
  const int32_t slot = range.first + tile * Tile::kKeys;
  if (params.call.slots.page_table == nullptr) {
    copy_tile<Tile>(params, slot, range.end, k_head + work.b * k.stride_c,
                    v_head + work.b * v.stride_c, k_tile, v_tile,
                    [&](int32_t s) { return RowPlaces{s * k.stride_s, s * v.stride_s}; });
  } else {
    copy_tile<Tile>(params, slot, range.end, k_head, v_head, k_tile, v_tile, [&](int32_t s) {
      const SlotPlace place = page_of(params, work.b, s);
      return RowPlaces{place.page * k.stride_c + place.offset * k.stride_s,
                       place.page * v.stride_c + place.offset * v.stride_s};
    });
  }
}

}  // namespace specdec::cuda
