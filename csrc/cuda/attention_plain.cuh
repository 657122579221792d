// Attention without tensor cores: float32, which they would round, and rows that cannot be read 16
// bytes at a time.
//
// A block owns a request, a key/value head, a tile of query rows and one split of the keys; a warp
// owns four of the rows, and a block has the warps that its rows need, up to 48 rows, or 28 of the
// widest heads, whose q fills shared memory. Lanes are keys for q.k and columns for p.v, so each
// element that comes from shared memory serves four rows. Keys of the next tile arrive while values
// are summed, values while keys are multiplied: two barriers stand between a tile's use and its
// successor.
#pragma once

#include "attention_tiles.cuh"

namespace specdec::cuda {

struct PlainTile {
  static constexpr int kWarpRows = 4;
  static constexpr int kMinWarps = 4, kMaxWarps = 12, kMaxThreads = 32 * kMaxWarps;
  static constexpr int kKeys = 32;
  static constexpr int kColumns = kMaxHeadDim / 32;  // of a lane, 32 apart

  int32_t dims, k_stride, v_stride;  // floats; strides without bank conflicts

  __host__ __device__ PlainTile(int32_t head_dim, int32_t value_dim)
      : dims((head_dim + 3) / 4 * 4),
        k_stride((dims / 4 | 1) * 4),
        v_stride((value_dim + 31) / 32 * 32) {}

  __host__ __device__ int32_t shared_floats(int32_t warps) const {
    return warps * kWarpRows * (dims + kKeys) + kKeys * (k_stride + v_stride);
  }

  // Of this block.
  __device__ static int32_t warps() { return static_cast<int32_t>(blockDim.x) / 32; }
  __device__ static int32_t rows() { return warps() * kWarpRows; }
};

static_assert(4 * (PlainTile::kMinWarps * PlainTile::kWarpRows * (kMaxHeadDim + PlainTile::kKeys) +
                   PlainTile::kKeys * (2 * kMaxHeadDim + 4)) <=
              kMaxShared);

// Starts to copy the keys or values of a tile, zeros outside, `padded` floats a row. Where elements
// must be converted or are no neighbours, the copy is made at once.
template <class T>
__device__ inline void fetch_floats(const AttentionParams& params, const Work& work,
                                    const KeyRange& range, int32_t tile, const CacheView& cache,
                                    float* target, int32_t stride, int32_t padded) {
  const T* head = static_cast<const T*>(cache.data) + work.g * cache.stride_g;
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32,
                lane = static_cast<int32_t>(threadIdx.x) % 32;
  for (int32_t key = warp; key < PlainTile::kKeys; key += PlainTile::warps()) {
    const int32_t slot = range.first + tile * PlainTile::kKeys + key;
    const bool is_inside = slot < range.end;
    const SlotPlace place = is_inside ? place_of(params, work.b, slot) : SlotPlace{0, 0};
    const T* row = head + place.page * cache.stride_c + place.offset * cache.stride_s;
    float* row_target = target + key * stride;
    if (sizeof(T) == 4 && params.has_wide_kv) {
      for (int32_t d = 4 * lane; d < padded; d += 4 * 32) {
        const bool has_data = is_inside && d < cache.head_dim;
        cp_async16(row_target + d, has_data ? row + d : head, has_data ? 16 : 0);
      }
    } else {
      for (int32_t d = lane; d < padded; d += 32) {
        const bool has_data = is_inside && d < cache.head_dim;
        store_shared(row_target + d,
                     has_data ? to_float(load_global(row + d * cache.stride_d)) : 0.0f);
      }
    }
  }
  cp_async_commit();
}

template <class T>
__device__ inline void load_float_queries(const AttentionParams& params, const Work& work,
                                          int32_t count, float* target, int32_t dims) {
  const CacheView& q = params.call.q;
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32,
                lane = static_cast<int32_t>(threadIdx.x) % 32;
  for (int32_t row = warp; row < PlainTile::rows(); row += PlainTile::warps()) {
    const int32_t of_head = work.row_tile * PlainTile::rows() + row, node = of_head / params.group;
    const int32_t head = work.g * params.group + of_head % params.group;
    const T* source =
        static_cast<const T*>(q.data) + work.b * q.stride_c + head * q.stride_g + node * q.stride_s;
    for (int32_t d = lane; d < dims; d += 32) {
      const bool has_data = node < count && d < q.head_dim;
      store_shared(target + row * dims + d,
                   has_data ? to_float(load_global(source + d * q.stride_d)) : 0.0f);
    }
  }
}

__device__ inline float dot4(const float4& a, const float4& b) {
  return a.x * b.x + a.y * b.y + (a.z * b.z + a.w * b.w);
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

// The rows of a warp: `largest` of all keys, `weight` of the lane's, `sums` of its columns.
struct PlainState {
  static constexpr int kRows = PlainTile::kWarpRows;
  float sums[kRows][PlainTile::kColumns] = {};
  float largest[kRows], weight[kRows] = {};

  // The lane's key with every row; leaves probabilities, [kRows][kKeys]. `q`: [kRows][dims].
  __device__ void add_key(const float* q, const float* key, int32_t dims, const LogitScale& scale,
                          const uint32_t (&seen)[kRows], float* probs);
  __device__ void add_values(const float* probs, const float* values, int32_t stride);
};

__device__ inline void PlainState::add_key(const float* q, const float* key, int32_t dims,
                                           const LogitScale& scale, const uint32_t (&seen)[kRows],
                                           float* probs) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  float dots[1][kRows] = {};
#pragma unroll 2
  for (int32_t d = 0; d < dims; d += 4) {
    const float4 k = load_shared(reinterpret_cast<const float4*>(key + d));
#pragma unroll
    for (int32_t r = 0; r < kRows; ++r) {
      dots[0][r] += dot4(load_shared(reinterpret_cast<const float4*>(q + r * dims + d)), k);
    }
  }
  scale.apply<true>(dots);
#pragma unroll
  for (int32_t r = 0; r < kRows; ++r) {
    const float logit = (seen[r] >> lane & 1) != 0 ? dots[0][r] : -INFINITY;
    const float now = fmaxf(largest[r], warp_max(logit)), base = base_of(now);
    const float keep = power_of_2(largest[r] - base), prob = power_of_2(logit - base);
    largest[r] = now;
    weight[r] = weight[r] * keep + prob;
#pragma unroll
    for (int32_t c = 0; c < PlainTile::kColumns; ++c) sums[r][c] *= keep;
    store_shared(probs + r * PlainTile::kKeys + lane, prob);
  }
}

__device__ inline void PlainState::add_values(const float* probs, const float* values,
                                              int32_t stride) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
#pragma unroll 4
  for (int32_t key = 0; key < PlainTile::kKeys; ++key) {
    float p[kRows];
#pragma unroll
    for (int32_t r = 0; r < kRows; ++r) p[r] = load_shared(probs + r * PlainTile::kKeys + key);
#pragma unroll
    for (int32_t c = 0; c < PlainTile::kColumns; ++c) {
      if (32 * c >= stride) break;
      const float value = load_shared(values + key * stride + 32 * c + lane);
#pragma unroll
      for (int32_t r = 0; r < kRows; ++r) sums[r][c] += p[r] * value;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(PlainTile::kMaxThreads)
    attend_plain_kernel(const __grid_constant__ AttentionParams params) {
  const TreeAttentionParams& call = params.call;
  const Work work = work_of_block(params, blockIdx.x);
  const KeyRange range = key_range(params, work.b, PlainTile::kKeys);
  const int32_t first_row = work.row_tile * PlainTile::rows();
  const bool is_idle = first_row >= range.count * params.group;
  if (work.split >= range.num_active || (is_idle && range.num_active > 1)) return;
  const int32_t begin = work.split * range.each;
  const int32_t last = is_idle ? begin : min(begin + range.each, range.tiles);

  SPECDEC_DYNAMIC_SHARED(float, shared);
  const PlainTile tile_of(call.q.head_dim, call.v_cache.head_dim);
  float* const q = shared;
  float* const keys = q + PlainTile::rows() * tile_of.dims;
  float* const values = keys + PlainTile::kKeys * tile_of.k_stride;
  float* const all_probs = values + PlainTile::kKeys * tile_of.v_stride;
  const auto fetch_keys = [&](int32_t tile) {
    fetch_floats<T>(params, work, range, tile, call.k_cache, keys, tile_of.k_stride, tile_of.dims);
  };
  const auto fetch_values = [&](int32_t tile) {
    fetch_floats<T>(params, work, range, tile, call.v_cache, values, tile_of.v_stride,
                    tile_of.v_stride);
  };
  if (begin < last) {
    fetch_keys(begin);
    fetch_values(begin);
  }
  load_float_queries<T>(params, work, range.count, q, tile_of.dims);

  const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32,
                lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int32_t warp_row = warp * PlainTile::kWarpRows;
  float* const probs = all_probs + warp_row * PlainTile::kKeys;
  const LogitScale scale(call);
  PlainState state;
  int32_t nodes[PlainState::kRows], depths[PlainState::kRows];
  for (int32_t r = 0; r < PlainState::kRows; ++r) {
    state.largest[r] = -INFINITY;
    nodes[r] = min((first_row + warp_row + r) / params.group, call.nodes - 1);
    depths[r] = call.depths[work.b * call.nodes + nodes[r]];
  }
  for (int32_t tile = begin; tile < last; ++tile) {
    uint32_t seen[PlainState::kRows] = {~0u, ~0u, ~0u, ~0u};
    if (tile >= range.full || call.window > 0) {
      const int32_t slot = range.first + tile * PlainTile::kKeys;
      for (int32_t r = 0; r < PlainState::kRows; ++r) {
        seen[r] = static_cast<uint32_t>(seen_slots(call, work.b, range, nodes[r], depths[r], slot));
      }
    }
    cp_async_wait<1>();  // the keys are here, the values may not be
    __syncthreads();
    state.add_key(q + warp_row * tile_of.dims, keys + lane * tile_of.k_stride, tile_of.dims, scale,
                  seen, probs);
    __syncthreads();
    if (tile + 1 < last) {
      fetch_keys(tile + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    state.add_values(probs, values, tile_of.v_stride);
    __syncthreads();
    if (tile + 1 < last) fetch_values(tile + 1);
  }

  for (int32_t r = 0; r < PlainState::kRows; ++r) {
    const float weight = warp_sum(state.weight[r]);
    const int32_t of_head = first_row + warp_row + r, node = of_head / params.group;
    if (node >= call.nodes) continue;
    const int32_t dims = call.v_cache.head_dim;
    if (range.num_active > 1) {
      if (node >= range.count) continue;
      const int64_t partial = params.partial(work.b, work.g, work.split) + of_head;
      if (lane == 0) {
        store_global(params.largest + partial, state.largest[r]);
        store_global(params.weights + partial, weight);
      }
#pragma unroll
      for (int32_t c = 0; c < PlainTile::kColumns; ++c) {
        const int32_t column = 32 * c + lane;
        if (column < dims) store_global(params.sums + partial * dims + column, state.sums[r][c]);
      }
      continue;
    }
    const int32_t head = work.g * params.group + of_head % params.group;
    const RowEnd end = end_of_row(call, head, node < range.count, state.largest[r], weight);
    if (lane == 0) store_lse(call, work.b, node, head, end.lse);
    T* out = static_cast<T*>(call.out) + out_offset(call, work.b, node, head);
#pragma unroll
    for (int32_t c = 0; c < PlainTile::kColumns; ++c) {
      const int32_t column = 32 * c + lane;
      if (column < dims) {
        store_global(out + column, from_float<T>(scaled(state.sums[r][c], end.factor)));
      }
    }
  }
}

}  // namespace specdec::cuda
