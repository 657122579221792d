// The score at which a filter cuts a row: bisection over the order of floats, without a sort.
#pragma once

#include <cstdint>

#include "simd.hpp"
#include "vector_math.hpp"

namespace specdec::SPECDEC_ISA {

// Floats in their order, as integers; and back. Not for NaN.
inline int64_t rank(float x) {
  const int32_t bits = bit_cast<int32_t>(x);
  return bits ^ ((bits >> 31) & INT32_MAX);
}

inline float unrank(int64_t rank) {
  const int32_t bits = static_cast<int32_t>(rank);
  return bit_cast<float>(bits ^ ((bits >> 31) & INT32_MAX));
}

// Weight of tokens for top-k. `values` are padded with -inf to whole registers.
struct Count {
  const float* values;
  int32_t num;

  double above(float edge) const {
    Int count{};
    for (int32_t i = 0; i < num; i += kLanes) count -= load(values + i) > edge;
    return sum(count);
  }

  double total() const { return num; }
};

// Weight of tokens for top-p: exp(value - largest), which `weights` receives.
struct Mass {
  const float* values;
  int32_t num;
  const double* weights;
  double sum_of_weights;

  double above(float edge) const {
    Double total{};
    for (int32_t i = 0; i < num; i += kLanes / 2) {
      const auto is_above = __builtin_convertvector(load_half(values + i) > edge, Long);
      total += is_above ? load(weights + i) : Double{};
    }
    return sum(total);
  }

  double total() const { return sum_of_weights; }
};

inline Mass weigh(const float* values, int32_t num, double largest, double* weights) {
  Double total{};
  for (int32_t i = 0; i < num; i += kLanes / 2) {
    const Double weight = exp(__builtin_convertvector(load_half(values + i), Double) - largest);
    std::memcpy(weights + i, &weight, sizeof weight);
    total += weight;
  }
  return {values, num, weights, sum(total)};
}

// The smallest value such that those strictly larger weigh less than `target` > 0 in total; `least`
// and `most` bound the values. Stops within `slack` ranks below it.
template <class Weight>
float edge_of(const Weight& weight, float least, float most, double target, int64_t slack = 0) {
  int64_t low = rank(least), high = rank(most);
  while (high - low > slack) {
    const int64_t middle = low + (high - low) / 2;
    if (weight.above(unrank(middle)) < target) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return unrank(low);
}

}  // namespace specdec::SPECDEC_ISA
