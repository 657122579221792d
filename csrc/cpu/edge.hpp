// The score at which a filter cuts a row, by weighted selection instead of a sort.
#pragma once

#include <cstdint>

#include "simd.hpp"
#include "vector_math.hpp"

namespace specdec::SPECDEC_ISA {

// Weight of a token for top-k.
struct Count {
  double operator()(const float*, int32_t num) const { return num; }
};

// Weight of a token for top-p: the sum of exp(value - largest).
struct Mass {
  double largest;

  double operator()(const float* values, int32_t num) const {
    constexpr int32_t kHalf = kLanes / 2;
    Double total{};
    HalfFloat lanes;
    int32_t i = 0;
    for (; i + kHalf <= num; i += kHalf) {
      std::memcpy(&lanes, values + i, sizeof lanes);
      total += exp(__builtin_convertvector(lanes, Double) - largest);
    }
    if (i < num) {
      lanes = HalfFloat{} - kInfinity;
      for (int32_t lane = 0; i + lane < num; ++lane) lanes[lane] = values[i + lane];
      total += exp(__builtin_convertvector(lanes, Double) - largest);
    }
    return sum(total);
  }
};

// The smallest of `values` such that those strictly larger weigh less than `target` > 0 in total;
// reorders `values`.
template <class Weight>
float edge_of(float* values, int32_t num, double target, Weight weight) {
  double above = 0.0;  // weight of everything larger than `values`; below target
  float edge = kInfinity;
  while (num > 0) {
    const float pivot = values[num / 2];
    int32_t equal = 0, smaller = num;  // values end up as [larger | equal | smaller]
    for (int32_t i = 0; i < smaller;) {
      const float value = values[i];
      if (value > pivot) {
        values[i++] = values[equal];
        values[equal++] = value;
      } else if (value < pivot) {
        values[i] = values[--smaller];
        values[smaller] = value;
      } else {
        ++i;
      }
    }
    const double larger = above + weight(values, equal);
    if (larger >= target) {
      num = equal;
      continue;
    }
    edge = pivot;
    above = larger + weight(values + equal, smaller - equal);
    if (above >= target) break;
    values += smaller;
    num -= smaller;
  }
  return edge;
}

}  // namespace specdec::SPECDEC_ISA
