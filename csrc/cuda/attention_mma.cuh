// Attention on tensor cores, for 16-bit elements whose rows may be read 16 bytes at a time.
//
// A block owns a request, a key/value head, a tile of query rows and one split of the keys, which
// it walks in tiles through a cp.async pipeline; one barrier per tile. Up to 256 rows are one tile
// (128 where D or E is above 128: the sums fill the registers), so that keys and values are read
// once. Where rows are few, warps take other keys of a tile, and their online softmaxes are joined
// at the end. Delicate: slots that no node sees may hold NaN, and 0 * NaN is not 0. They are those
// before the range of keys and behind it, which are zeros here, never read.
#pragma once

#include "attention_mma_state.cuh"

namespace specdec::cuda {

// Writes the rows of a warp that has seen all keys of the split, or their partial result, through
// its part of q, which it no longer needs. What is known of the block is settled anew: kept through
// the loop, it would take registers.
template <class T, int kDim, int kRows, class Tile = MmaTile<kDim, kRows>>
__device__ inline void write_own_rows(const AttentionParams& params, T* q_tile,
                                      const MmaState<kDim> (&states)[Tile::kFragments]) {
  const TreeAttentionParams& call = params.call;
  const int32_t thread = anew(static_cast<int32_t>(threadIdx.x)), lane = thread % 32;
  const int32_t pair = 2 * (lane % 4), dims = call.v_cache.head_dim;
  const int32_t warp_row = thread / 32 * Tile::kWarpRows;
  const Work work = work_of_block(params, anew(static_cast<int32_t>(blockIdx.x)));
  const KeyRange range = key_range(params, work.b, Tile::kKeys);
  const int32_t first_row = work.row_tile * Tile::rows() + warp_row;
  T* const staging = q_tile + warp_row * kDim;
  __syncwarp();  // all lanes have read q
#pragma unroll
  for (int32_t i = 0; i < 2 * Tile::kFragments; ++i) {
    const int32_t row = lane / 4 + 8 * i, of_head = first_row + row, node = of_head / params.group;
    const auto& sums = states[i / 2].sums;
    const int32_t r = i % 2;
    const float largest = states[i / 2].largest[r], weight = states[i / 2].weight[r];
    if (range.num_active > 1) {
      if (node >= range.count) continue;
      const int64_t partial = params.partial(work.b, work.g, work.split) + of_head;
      if (pair == 0) {
        store_global(params.largest + partial, largest);
        store_global(params.weights + partial, weight);
      }
      float* out = params.sums + partial * dims + pair;
#pragma unroll
      for (int32_t n = 0; n < kDim / 8; ++n) {
        if (8 * n >= dims) break;
        store_global(reinterpret_cast<float2*>(out + 8 * n),
                     float2{sums[n][2 * r], sums[n][2 * r + 1]});
      }
      continue;
    }
    const int32_t head = work.g * params.group + of_head % params.group;
    const RowEnd end = end_of_row(call, head, node < range.count, largest, weight);
    if (pair == 0 && node < call.nodes) store_lse(call, work.b, node, head, end.lse);
#pragma unroll
    for (int32_t n = 0; n < kDim / 8; ++n) {
      store_shared(
          reinterpret_cast<uint32_t*>(staging + Tile::at(row, n) + pair),
          pack2<T>(scaled(sums[n][2 * r], end.factor), scaled(sums[n][2 * r + 1], end.factor)));
    }
  }
  if (range.num_active > 1) return;
  __syncwarp();
#pragma unroll 1
  for (int32_t i = lane; i < Tile::kWarpRows * Tile::kChunks; i += 32) {
    const int32_t row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    const int32_t of_head = first_row + row, node = of_head / params.group;
    if (node >= call.nodes || 8 * chunk >= dims) continue;
    const int32_t head = work.g * params.group + of_head % params.group;
    T* out = static_cast<T*>(call.out) + out_offset(call, work.b, node, head) + 8 * chunk;
    store_global(reinterpret_cast<uint4*>(out),
                 load_shared(reinterpret_cast<const uint4*>(staging + Tile::at(row, chunk))));
  }
}

// Joins the warps' states, [kWarpsOfKeys][kRows], and writes rows or a partial result.
template <class T, int kDim, int kRows>
__device__ inline void write_joined_rows(const AttentionParams& params, const Work& work,
                                         const KeyRange& range, const float* sums) {
  using Tile = MmaTile<kDim, kRows>;
  const float* largest = sums + Tile::kWarpsOfKeys * kRows * Tile::kStateStride;
  const float* weights = largest + Tile::kWarpsOfKeys * kRows;
  const int32_t dims = params.call.v_cache.head_dim, chunks = max(dims / 8, 1);
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kRows * chunks; i += Tile::threads()) {
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
__global__ void __launch_bounds__(MmaTile<kDim, kRows>::kMaxThreads,
                                  MmaTile<kDim, kRows>::kResident)
    attend_mma_kernel(const __grid_constant__ AttentionParams params) {
  using Tile = MmaTile<kDim, kRows>;
  const TreeAttentionParams& call = params.call;
  const Work work = work_of_block(params, blockIdx.x);
  const KeyRange range = key_range(params, work.b, Tile::kKeys);
  const int32_t first_row = work.row_tile * Tile::rows(), num_rows = range.count * params.group;
  const bool is_idle = first_row >= num_rows;
  if (work.split >= range.num_active || (is_idle && range.num_active > 1)) return;
  const int32_t begin = work.split * range.each;
  const int32_t last = is_idle ? begin : min(begin + range.each, range.tiles);

  SPECDEC_DYNAMIC_SHARED(unsigned char, shared);
  T* const tiles = reinterpret_cast<T*>(shared);  // [stages][keys, values]
  T* const q_tile = reinterpret_cast<T*>(shared + Tile::kPipelineBytes);
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
  const int32_t warp_row = warp / Tile::kWarpsOfKeys * Tile::kWarpRows;
  const int32_t warp_key = warp % Tile::kWarpsOfKeys * Tile::kWarpKeys;
  const bool is_warp_idle = first_row + warp_row >= num_rows;
  T* const q = q_tile + warp_row * kDim;
  uint32_t kept_q[Tile::kKeepsQ ? kDim / 16 : 1][4];
  if constexpr (Tile::kKeepsQ) {
#pragma unroll
    for (int32_t step = 0; step < kDim / 16; ++step) {
      load_q_fragment<T, kDim, kRows>(q, lane, step, kept_q[step]);
    }
  }
  const LogitScale scale(call);
  MmaState<kDim> states[Tile::kFragments];
  for (int32_t tile = begin; tile < last; ++tile) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();
    fetch(tile + Tile::kStages - 1);  // into the tile that all have left
    if (is_warp_idle) continue;
    const bool is_masked = tile >= range.full || call.window > 0;
    uint32_t seen[Tile::kFragments][2] = {};
    if (is_masked) {
      const int32_t slot = range.first + tile * Tile::kKeys + warp_key;
      const int32_t row = first_row + warp_row + anew(lane) / 4;
#pragma unroll
      for (int32_t i = 0; i < 2 * Tile::kFragments; ++i) {
        const int32_t node = min((row + 8 * i) / params.group, call.nodes - 1);
        const int32_t depth = call.depths[work.b * call.nodes + node];
        seen[i / 2][i % 2] = static_cast<uint32_t>(
            seen_slots(call, work.b, range, node, depth, slot) >> 2 * (lane % 4));
      }
    }
    const T* keys = tiles + (tile - begin) % Tile::kStages * Tile::kTileBytes + warp_key * kDim;
#pragma unroll 1
    for (int32_t key = 0; key < Tile::kWarpKeys; key += Tile::kSpan, keys += Tile::kSpan * kDim) {
      uint32_t seen_here[Tile::kFragments][2];
      for (int32_t i = 0; i < 2 * Tile::kFragments; ++i) {
        seen_here[i / 2][i % 2] = seen[i / 2][i % 2] >> key;
      }
      add_keys<T, kDim, kRows>(q, kept_q, keys, keys + Tile::kTileBytes / 2, scale, is_masked,
                               seen_here, states);
    }
  }

#pragma unroll
  for (int32_t i = 0; i < 2 * Tile::kFragments; ++i) {
    float& weight = states[i / 2].weight[i % 2];
    weight += __shfl_xor_sync(~0u, weight, 1);
    weight += __shfl_xor_sync(~0u, weight, 2);
  }
  if constexpr (Tile::kIsWide) {
    write_own_rows<T, kDim, kRows>(params, q_tile, states);
    return;
  }

  __syncthreads();  // the states take the place of the tiles
  const MmaState<kDim>& state = states[0];
  float* const sums = reinterpret_cast<float*>(shared);
  float* const largest = sums + Tile::kWarpsOfKeys * kRows * Tile::kStateStride;
  float* const weights = largest + Tile::kWarpsOfKeys * kRows;
  for (int32_t r = 0; r < 2; ++r) {
    const int32_t row = warp % Tile::kWarpsOfKeys * kRows + warp_row + lane / 4 + 8 * r;
    if (lane % 4 == 0) {
      largest[row] = state.largest[r];
      weights[row] = state.weight[r];
    }
#pragma unroll
    for (int32_t n = 0; n < kDim / 8; ++n) {
      float* pair = sums + row * Tile::kStateStride + 8 * n + 2 * (lane % 4);
      store_shared(reinterpret_cast<float2*>(pair),
                   float2{state.sums[n][2 * r], state.sums[n][2 * r + 1]});
    }
  }
  __syncthreads();
  write_joined_rows<T, kDim, kRows>(params, work, range, sums);
}

}  // namespace specdec::cuda
