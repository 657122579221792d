// A row of logits as the filters see it, in tiles of kTile tokens; a warp owns a tile. Tiles begin
// on 16-byte boundaries, so the first may begin before the row: of rows without gaps all loads are
// of 16 bytes but those at either end of the row.
#pragma once

#include "../core/philox.hpp"
#include "../core/sample.hpp"
#include "ranked.cuh"

namespace specdec::cuda {

constexpr int32_t kTile = 512;  // tokens
constexpr int kWarpSize = 32;
constexpr float kLowest = -3.402823466e38f;  // the edge that keeps every finite score

__device__ inline int32_t this_lane() { return static_cast<int32_t>(threadIdx.x) % kWarpSize; }

// int32 in the order of the floats, the zeros equal; and back. Not for NaN.
__device__ inline int32_t to_order(float value) {
  const int32_t bits = bit_cast<int32_t>(value + 0.0f);
  return bits ^ ((bits >> 31) & INT32_MAX);
}

__device__ inline float from_order(int32_t order) {
  return bit_cast<float>(order ^ ((order >> 31) & INT32_MAX));
}

// One copy each in a kernel, where tokens by the dozen call them: inlined, they are most of its
// code.
__device__ __noinline__ inline double exp_of(double x) { return exp(x); }
__device__ __noinline__ inline float gumbel_of(uint32_t bits) { return gumbel<ScalarLanes>(bits); }

// What a request asks of its rows.
struct RowFilters {
  float temperature = 0.0f;  // greedy unless > 0
  float top_p = 1.0f, min_p = 0.0f;
  int32_t top_k = 0;

  __device__ RowFilters(const SamplingParams& params, int64_t b) {
    if (params.temperature == nullptr) return;
    temperature = params.temperature[b];
    if (params.top_k != nullptr) top_k = params.top_k[b];
    if (params.top_p != nullptr) top_p = params.top_p[b];
    if (params.min_p != nullptr) min_p = params.min_p[b];
  }

  __device__ bool is_sampled() const { return temperature > 0.0f; }
  __device__ bool has_any() const {
    return is_sampled() && (top_k > 0 || top_p < 1.0f || min_p > 0.0f);
  }
};

template <class T>
struct LogitRow {
  static constexpr int kVector = 16 / sizeof(T);              // tokens of a load
  static constexpr int kLoads = kTile / kWarpSize / kVector;  // of a lane, for a tile
  struct alignas(16) Vector {
    T elements[kVector];
  };

  const T* logits;
  const float* bias;  // or null
  const bool* mask;   // or null
  int64_t stride, stride_bias, stride_mask;
  int32_t vocab;
  int32_t lead;       // elements by which the row begins after a 16-byte boundary
  float temperature;  // 1 for a greedy request
  bool is_sampled;

  __device__ LogitRow(const SamplingParams& params, int64_t b, int64_t node)
      : logits(static_cast<const T*>(params.logits) + b * params.stride_logits_b +
               node * params.stride_logits_n),
        bias(params.bias == nullptr ? nullptr : params.bias + b * params.stride_bias_b),
        mask(params.mask == nullptr ? nullptr : params.mask + b * params.stride_mask_b),
        stride(params.stride_logits_v),
        stride_bias(params.stride_bias_v),
        stride_mask(params.stride_mask_v),
        vocab(params.vocab),
        lead(static_cast<int32_t>(reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T))) {
    const RowFilters filters(params, b);
    is_sampled = filters.is_sampled();
    temperature = is_sampled ? filters.temperature : 1.0f;
  }

  __device__ int32_t tiles() const { return (vocab + lead + kTile - 1) / kTile; }
  __device__ int32_t tile_of(int32_t token) const { return (token + lead) / kTile; }

  // The first token of this lane's load of a tile.
  __device__ int32_t first_token(int32_t tile, int load) const {
    return tile * kTile - lead + (load * kWarpSize + this_lane()) * kVector;
  }

  // What a read logit is worth: with bias and mask, NaN as -inf.
  __device__ float biased(float logit, int32_t token) const {
    if (bias != nullptr) logit += bias[token * stride_bias];
    if (mask != nullptr && !mask[token * stride_mask]) logit = -INFINITY;
    return logit == logit ? logit : -INFINITY;
  }

  __device__ float at(int32_t token) const {
    return biased(to_float(load_global(logits + token * stride)), token);
  }

  // Biased logits of the tokens from `first` on; -inf outside of the row.
  __device__ void load(int32_t first, float (&values)[kVector]) const {
    if (stride == 1 && first >= 0 && first <= vocab - kVector) {
      const auto vector = load_global(reinterpret_cast<const Vector*>(logits + first));
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] = biased(to_float(vector.elements[i]), first + i);
      return;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const bool is_inside = first + i >= 0 && first + i < vocab;
      values[i] = is_inside ? at(first + i) : -INFINITY;
    }
  }

  // Biased logit over temperature; where the row has +inf, 0 there and -inf elsewhere. Division
  // rounds monotonically: larger logits never have smaller scores.
  __device__ float score(float logit, bool is_infinite) const {
    const float quotient = logit / temperature;
    if (is_infinite) return quotient == INFINITY ? 0.0f : -INFINITY;
    return quotient;
  }
};

// The Gumbel noise of one row.
struct Noise {
  int64_t seed, position;
  uint32_t counter;  // where the row's stream begins
  uint32_t domain;

  __device__ Noise(const SamplingParams& params, int64_t b, int64_t offset)
      : seed(params.seeds[b]),
        position(static_cast<int64_t>(static_cast<uint64_t>(params.positions[b]) +
                                      static_cast<uint64_t>(offset))),
        counter(0),
        domain(params.domain) {
    if (params.streams != nullptr) {
      counter = static_cast<uint32_t>(params.streams[b] * ((int64_t{params.vocab} + 3) / 4));
    }
  }

  // Adds the noise of the tokens from `first` on to their scores. Four tokens share a counter; at
  // `first` it may be in the middle of one.
  template <int kNum>
  __device__ void add(int32_t first, float (&scores)[kNum]) const {
    bool is_possible = false;
#pragma unroll
    for (int i = 0; i < kNum; ++i) is_possible |= scores[i] > -INFINITY;
    if (!is_possible) return;
    uint32_t words[kNum / 4 + 1][4];
#pragma unroll
    for (int j = 0; j <= kNum / 4; ++j) {
      philox<ScalarLanes>(counter + static_cast<uint32_t>((first >> 2) + j), seed, position, domain,
                          words[j]);
    }
    const int shift = first & 3;
#pragma unroll
    for (int i = 0; i < kNum; ++i) {
      uint32_t word = words[i / 4][i % 4];
#pragma unroll
      for (int s = 1; s < 4; ++s) word = shift == s ? words[(i + s) / 4][(i + s) % 4] : word;
      scores[i] += gumbel_of(word);
    }
  }
};

}  // namespace specdec::cuda
