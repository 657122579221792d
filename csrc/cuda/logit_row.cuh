// A row of logits as the filters see it, in tiles of kTile tokens; a warp owns a tile, and a lane
// the same tokens of it whatever the row's alignment, so that sums do not depend on it. Where a row
// does not begin on a 16-byte boundary, a lane loads the two aligned vectors that hold its tokens,
// the second of which the next lane loads too; at the ends of a row, and of rows with gaps, it
// loads element by element.
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

// 16 bytes from byte `begin` of two vectors on; `begin` is even, and below 16.
__device__ inline uint4 from_byte(uint4 low, uint4 high, size_t begin) {
  const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  const unsigned skipped = static_cast<unsigned>(begin) / 4;
  const bool is_odd = begin % 4 != 0;
  uint32_t taken[5], out[4];
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    taken[i] = words[i];
#pragma unroll
    for (unsigned j = 1; j < 4 && i + j < 8; ++j) taken[i] = skipped == j ? words[i + j] : taken[i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = is_odd ? taken[i] >> 16 | taken[i + 1] << 16 : taken[i];
  }
  return {out[0], out[1], out[2], out[3]};
}

// T is float, or uint16_t for both formats of 16 bits: they share kernels, which are large.
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
  bool is_sampled, is_half;

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
    is_half = params.dtype == DType::kFloat16;
    temperature = is_sampled ? filters.temperature : 1.0f;
  }

  __device__ int32_t tiles() const { return (vocab + kTile - 1) / kTile; }

  // The first token of this lane's load of a tile.
  __device__ int32_t first_token(int32_t tile, int load) const {
    return tile * kTile + (load * kWarpSize + this_lane()) * kVector;
  }

  // What a read logit is worth: with bias and mask, NaN as -inf.
  __device__ float biased(float logit, int32_t token) const {
    if (bias != nullptr) logit += load_global(bias + token * stride_bias);
    if (mask != nullptr && !load_global(mask + token * stride_mask)) logit = -INFINITY;
    return logit == logit ? logit : -INFINITY;
  }

  __device__ float widened(T element) const {
    if constexpr (sizeof(T) == 4) {
      return element;
    } else {
      return is_half ? to_float(Half{element}) : to_float(Bfloat16{element});
    }
  }

  __device__ float at(int32_t token) const {
    return biased(widened(load_global(logits + token * stride)), token);
  }

  // Biased logits of the tokens from `first` on; -inf outside of the row.
  __device__ void load(int32_t first, float (&values)[kVector]) const {
    const bool is_vector = stride == 1 && (lead == 0 || first >= lead) &&
                           first - lead <= vocab - (lead == 0 ? kVector : 2 * kVector);
    if (is_vector) {
      const auto* vectors = reinterpret_cast<const uint4*>(logits + first - lead);
      uint4 words = load_global(vectors);
      if (lead != 0) words = from_byte(words, load_global(vectors + 1), lead * sizeof(T));
      const Vector vector = bit_cast<Vector>(words);
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] = widened(vector.elements[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        values[i] = NAN;
        if (first + i < vocab) values[i] = widened(load_global(logits + (first + i) * stride));
      }
    }
    if (bias != nullptr || mask != nullptr) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (first + i < vocab) values[i] = biased(values[i], first + i);
      }
    }
#pragma unroll
    for (float& value : values) value = value == value ? value : -INFINITY;
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

  // Adds the noise of the tokens from `first` on, a multiple of four, to their scores.
  template <int kNum>
  __device__ void add(int32_t first, float (&scores)[kNum]) const {
#pragma unroll
    for (int j = 0; j < kNum / 4; ++j) {
      bool is_possible = false;
#pragma unroll
      for (int i = 0; i < 4; ++i) is_possible |= scores[4 * j + i] > -INFINITY;
      if (!is_possible) continue;
      uint32_t words[4];
      philox<ScalarLanes>(counter + static_cast<uint32_t>(first / 4 + j), seed, position, domain,
                          words);
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[4 * j + i] += gumbel_of(words[i]);
    }
  }
};

// Calls `function` with a value of the type that LogitRow takes.
template <class Function>
void with_element(DType dtype, Function function) {
  dtype == DType::kFloat32 ? function(float{}) : function(uint16_t{});
}

}  // namespace specdec::cuda
