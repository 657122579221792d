// Attention on tensor cores, for 16-bit elements whose rows may be read 16 bytes at a time.
//
// A block owns a request, a key/value head, a tile of query rows and one split of the keys, which
// it walks in tiles through a cp.async pipeline; one barrier per tile. Warps share the rows or the
// keys of a tile: few rows are enough for one warp, so the others take other keys, and their online
// softmaxes are joined at the end. Delicate: slots that no node sees may hold NaN, and 0 * NaN is
// not 0. They are those before the range of keys and behind it, which are zeros here, never read.
#pragma once

#include "attention_tiles.cuh"

namespace specdec::cuda {

// kDim: columns of q, keys and values, zeros beyond D and E. kRows: query rows.
template <int kDim, int kRows>
struct MmaTile {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kWarpsOfRows = kRows / 16, kWarpsOfKeys = kWarps / kWarpsOfRows;
  static constexpr int kKeys = kWarpsOfKeys == 4 ? 64 : 32, kWarpKeys = kKeys / kWarpsOfKeys;
  static constexpr int kStages = kKeys * kDim > 96 * 64 ? 2 : 3;
  static constexpr int kChunks = kDim / 8;                               // of 16 bytes, in a row
  static constexpr int kResident = kRows > 16 ? 2 : kDim <= 64 ? 4 : 3;  // blocks, by registers
  static constexpr bool kKeepsQ = kRows == 16 && kDim <= 96;  // in registers; else they are too few

  static constexpr int kQBytes = kRows * kDim * 2, kTileBytes = kKeys * kDim * 2;
  static constexpr int kStateStride = kDim + 8;  // floats; without bank conflicts
  static constexpr int kStateBytes = kWarpsOfKeys * kRows * (kStateStride + 2) * 4;
  static constexpr int kPipelineBytes = kQBytes + kStages * 2 * kTileBytes;
  static constexpr int kSharedBytes = kPipelineBytes > kStateBytes ? kPipelineBytes : kStateBytes;

  static_assert(kDim % 16 == 0 && kWarpKeys % 16 == 0);
  static_assert(kSharedBytes <= 99 << 10, "what the smallest device gives to a block");

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
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kRows * Tile::kChunks;
       i += Tile::kThreads) {
    const int32_t row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    const int32_t of_head = work.row_tile * kRows + row, node = of_head / params.group;
    uint4 values{0, 0, 0, 0};
    if (node < count) {
      values = load_query<T>(params, work.b, work.g * params.group + of_head % params.group, node,
                             chunk * 8);
    }
    *reinterpret_cast<uint4*>(target + Tile::at(row, chunk)) = values;
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
  for (int32_t first = 0; first < kCopies; first += Tile::kThreads) {
    const int32_t i = first + static_cast<int32_t>(threadIdx.x);
    if (kCopies % Tile::kThreads != 0 && i >= kCopies) break;
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

// The online softmax of a warp's 16 rows over its keys. Lane holds rows lane / 4 and 8 further, and
// of every 8 columns 2 (lane % 4) and the next: elements 0, 1 of the first row, 2, 3 of the other.
template <class T, int kDim, int kRows>
struct MmaState {
  using Tile = MmaTile<kDim, kRows>;
  static constexpr int kBlocks = Tile::kWarpKeys / 8;  // of keys

  float sums[kDim / 8][4] = {};
  float largest[2] = {-INFINITY, -INFINITY};
  float weight[2] = {0.0f, 0.0f};  // of the lane's columns

  // `seen`: bits of the warp's keys, for both rows.
  __device__ void add(const T* q, const uint32_t (&kept_q)[Tile::kKeepsQ ? kDim / 16 : 1][4],
                      const T* keys, const T* values, const LogitScale& scale, bool is_masked,
                      const uint64_t (&seen)[2]);
};

template <class T, int kDim, int kRows>
__device__ inline void load_q_fragment(const T* q, int32_t step, uint32_t (&fragment)[4]) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  ldmatrix(fragment, q + MmaTile<kDim, kRows>::at(lane % 16, 2 * step + lane / 16));
}

template <class T, int kDim, int kRows>
__device__ inline void MmaState<T, kDim, kRows>::add(
    const T* q, const uint32_t (&kept_q)[Tile::kKeepsQ ? kDim / 16 : 1][4], const T* keys,
    const T* values, const LogitScale& scale, bool is_masked, const uint64_t (&seen)[2]) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  float logits[kBlocks][4] = {};
#pragma unroll
  for (int32_t step = 0; step < kDim / 16; ++step) {
    uint32_t a[4];
    if constexpr (Tile::kKeepsQ) {
      for (int32_t i = 0; i < 4; ++i) a[i] = kept_q[step][i];
    } else {
      load_q_fragment<T, kDim, kRows>(q, step, a);
    }
#pragma unroll
    for (int32_t block = 0; block < kBlocks; block += 2) {
      uint32_t b[4];
      ldmatrix(b, keys + Tile::at(8 * block + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
      mma_m16n8k16<T>(logits[block], a, {b[0], b[1]});
      mma_m16n8k16<T>(logits[block + 1], a, {b[2], b[3]});
    }
  }

  float now[2] = {largest[0], largest[1]};
  scale.apply<false>(logits);
#pragma unroll
  for (int32_t block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      const int32_t key = 8 * block + 2 * (lane % 4) + i % 2;
      if (is_masked && (seen[i / 2] >> key & 1) == 0) logits[block][i] = -INFINITY;
      now[i / 2] = fmaxf(now[i / 2], logits[block][i]);
    }
  }
  float base[2];
#pragma unroll
  for (int32_t r = 0; r < 2; ++r) {
    now[r] = fmaxf(now[r], __shfl_xor_sync(~0u, now[r], 1));
    now[r] = fmaxf(now[r], __shfl_xor_sync(~0u, now[r], 2));
    base[r] = base_of(now[r]);
    const float keep = power_of_2(largest[r] - base[r]);
    weight[r] *= keep;
    largest[r] = now[r];
#pragma unroll
    for (int32_t n = 0; n < kDim / 8; ++n) {
      sums[n][2 * r] *= keep;
      sums[n][2 * r + 1] *= keep;
    }
  }
#pragma unroll
  for (int32_t block = 0; block < kBlocks; block += 2) {
    uint32_t probs[4];  // the rows' fragment of A: what D of the first product holds, packed
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      float* pair = &logits[block + i / 2][2 * (i % 2)];
      for (int32_t j = 0; j < 2; ++j) {
        pair[j] = power_of_2(pair[j] - base[i % 2]);
        weight[i % 2] += pair[j];
      }
      probs[i] = pack2<T>(pair[0], pair[1]);
    }
#pragma unroll
    for (int32_t n = 0; n < kDim / 8; n += 2) {
      uint32_t b[4];
      ldmatrix_transposed(b, values + Tile::at(8 * block + lane % 16, n + lane / 16));
      mma_m16n8k16<T>(sums[n], probs, {b[0], b[1]});
      mma_m16n8k16<T>(sums[n + 1], probs, {b[2], b[3]});
    }
  }
}

// Joins the warps' states, [kWarpsOfKeys][kRows], and writes rows or a partial result.
template <class T, int kDim, int kRows>
__device__ inline void write_rows(const AttentionParams& params, const Work& work,
                                  const KeyRange& range, const float* sums) {
  using Tile = MmaTile<kDim, kRows>;
  const float* largest = sums + Tile::kWarpsOfKeys * kRows * Tile::kStateStride;
  const float* weights = largest + Tile::kWarpsOfKeys * kRows;
  const int32_t dims = params.call.v_cache.head_dim, chunks = max(dims / 8, 1);
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kRows * chunks; i += Tile::kThreads) {
    const int32_t row = i / chunks, column = i % chunks * 8;
    const int32_t of_head = work.row_tile * kRows + row, node = of_head / params.group;
    if (node >= params.call.nodes) continue;
    float top = -INFINITY, weight = 0.0f, total[8] = {};
    for (int32_t w = 0; w < Tile::kWarpsOfKeys; ++w) top = fmaxf(top, largest[w * kRows + row]);
    const float base = base_of(top);
    for (int32_t w = 0; w < Tile::kWarpsOfKeys; ++w) {
      const float share = power_of_2(largest[w * kRows + row] - base);
      const float* added = sums + (w * kRows + row) * Tile::kStateStride + column;
      weight += share * weights[w * kRows + row];
      for (int32_t j = 0; j < 8; ++j) total[j] += share * added[j];
    }
    if (range.num_active > 1) {
      if (node >= range.count) continue;
      const int64_t partial = params.partial(work.b, work.g, work.split) + of_head;
      if (column == 0) {
        store_global(params.largest + partial, top);
        store_global(params.weights + partial, weight);
      }
      if (dims == 0) continue;
      auto* out = reinterpret_cast<float4*>(params.sums + partial * dims + column);
      store_global(out, float4{total[0], total[1], total[2], total[3]});
      store_global(out + 1, float4{total[4], total[5], total[6], total[7]});
      continue;
    }
    const int32_t head = work.g * params.group + of_head % params.group;
    const RowEnd end = end_of_row(params.call, head, node < range.count, top, weight);
    if (column == 0) store_lse(params.call, work.b, node, head, end.lse);
    if (dims == 0) continue;
    for (int32_t j = 0; j < 8; ++j) total[j] = scaled(total[j], end.factor);
    T* out = static_cast<T*>(params.call.out) + out_offset(params.call, work.b, node, head);
    store_global(reinterpret_cast<uint4*>(out + column),
                 uint4{pack2<T>(total[0], total[1]), pack2<T>(total[2], total[3]),
                       pack2<T>(total[4], total[5]), pack2<T>(total[6], total[7])});
  }
}

template <class T, int kDim, int kRows>
__global__ void __launch_bounds__(MmaTile<kDim, kRows>::kThreads, MmaTile<kDim, kRows>::kResident)
    attend_mma_kernel(const __grid_constant__ AttentionParams params) {
  using Tile = MmaTile<kDim, kRows>;
  const TreeAttentionParams& call = params.call;
  const Work work = work_of_block(params);
  const KeyRange range = key_range(params, work.b, Tile::kKeys);
  const int32_t first_row = work.row_tile * kRows, num_rows = range.count * params.group;
  const bool is_idle = first_row >= num_rows;
  if (work.split >= range.num_active || (is_idle && range.num_active > 1)) return;
  const int32_t begin = work.split * range.each;
  const int32_t last = is_idle ? begin : min(begin + range.each, range.tiles);

  SPECDEC_DYNAMIC_SHARED(unsigned char, shared);
  T* const q_tile = reinterpret_cast<T*>(shared);
  T* const tiles = reinterpret_cast<T*>(shared + Tile::kQBytes);  // [stages][keys, values]
  const auto fetch = [&](int32_t tile) {
    if (tile < last) {
      T* k_tile = tiles + (tile - begin) % Tile::kStages * Tile::kTileBytes;  // 2 of half as many
      fetch_tile<Tile>(params, work, range, tile, k_tile, k_tile + Tile::kTileBytes / 2);
    }
    cp_async_commit();
  };
  for (int32_t stage = 0; stage + 1 < Tile::kStages; ++stage) fetch(begin + stage);
  load_queries<T, kDim, kRows>(params, work, range.count, q_tile);
  __syncthreads();

  const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32,
                lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int32_t warp_row = warp / Tile::kWarpsOfKeys * 16;
  const int32_t warp_key = warp % Tile::kWarpsOfKeys * Tile::kWarpKeys;
  const bool is_warp_idle = first_row + warp_row >= num_rows;
  const T* q = q_tile + warp_row * kDim;
  uint32_t kept_q[Tile::kKeepsQ ? kDim / 16 : 1][4];
  if constexpr (Tile::kKeepsQ) {
#pragma unroll
    for (int32_t step = 0; step < kDim / 16; ++step) {
      load_q_fragment<T, kDim, kRows>(q, step, kept_q[step]);
    }
  }
  int32_t nodes[2], depths[2];
  for (int32_t r = 0; r < 2; ++r) {
    nodes[r] = min((first_row + warp_row + lane / 4 + 8 * r) / params.group, call.nodes - 1);
    depths[r] = call.depths[work.b * call.nodes + nodes[r]];
  }

  const LogitScale scale(call);
  MmaState<T, kDim, kRows> state;
  for (int32_t tile = begin; tile < last; ++tile) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();
    fetch(tile + Tile::kStages - 1);  // into the tile that all have left
    if (is_warp_idle) continue;
    const bool is_masked = tile >= range.full || call.window > 0;
    uint64_t seen[2] = {0, 0};
    if (is_masked) {
      const int32_t slot = range.first + tile * Tile::kKeys + warp_key;
      for (int32_t r = 0; r < 2; ++r) {
        seen[r] = seen_slots(call, work.b, range, nodes[r], depths[r], slot);
      }
    }
    const T* keys = tiles + (tile - begin) % Tile::kStages * Tile::kTileBytes + warp_key * kDim;
    state.add(q, kept_q, keys, keys + Tile::kTileBytes / 2, scale, is_masked, seen);
  }
  cp_async_wait<0>();
  __syncthreads();

  // The states take the place of the tiles.
  float* const sums = reinterpret_cast<float*>(shared);
  float* const largest = sums + Tile::kWarpsOfKeys * kRows * Tile::kStateStride;
  float* const weights = largest + Tile::kWarpsOfKeys * kRows;
  for (int32_t r = 0; r < 2; ++r) {
    const int32_t row = warp % Tile::kWarpsOfKeys * kRows + warp_row + lane / 4 + 8 * r;
    float weight = state.weight[r];
    weight += __shfl_xor_sync(~0u, weight, 1);
    weight += __shfl_xor_sync(~0u, weight, 2);
    if (lane % 4 == 0) {
      largest[row] = state.largest[r];
      weights[row] = weight;
    }
#pragma unroll
    for (int32_t n = 0; n < kDim / 8; ++n) {
      float* pair = sums + row * Tile::kStateStride + 8 * n + 2 * (lane % 4);
      *reinterpret_cast<float2*>(pair) = {state.sums[n][2 * r], state.sums[n][2 * r + 1]};
    }
  }
  __syncthreads();
  write_rows<T, kDim, kRows>(params, work, range, sums);
}

}  // namespace specdec::cuda
