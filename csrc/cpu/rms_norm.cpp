// Root mean square norm. A task owns rows; each is read twice, the second time from the cache.
// Bytes moved: x once, out once, the weight.
#include "../core/rms_norm.hpp"

#include <cmath>

#include "parallel.hpp"
#include "simd.hpp"

namespace specdec::SPECDEC_ISA {
namespace {

template <class T>
float sum_of_squares(const T* x, int32_t num) {
  Float lanes[4] = {};
  int32_t i = 0;
  for (; i + 4 * kLanes <= num; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Float values = load(x + i + j * kLanes);
      lanes[j] = multiply_add(values, values, lanes[j]);
    }
  }
  for (; i + kLanes <= num; i += kLanes) {
    const Float values = load(x + i);
    lanes[0] = multiply_add(values, values, lanes[0]);
  }
  float total = sum((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
  for (; i < num; ++i) total += to_float(x[i]) * to_float(x[i]);
  return total;
}

template <class T>
void norm_row(const T* x, const T* weight, T* out, int32_t num, float epsilon) {
  const float scale = 1.0f / std::sqrt(sum_of_squares(x, num) / static_cast<float>(num) + epsilon);
  int32_t i = 0;
  for (; i + kLanes <= num; i += kLanes) {
    store(out + i, rounded<T>(load(x + i) * splat(scale)) * load(weight + i));
  }
  for (; i < num; ++i) {
    const T normed = from_float<T>(to_float(x[i]) * scale);
    out[i] = from_float<T>(to_float(normed) * to_float(weight[i]));
  }
}

}  // namespace

void rms_norm(const RmsNormParams& params) {
  with_dtype(params.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* x = static_cast<const T*>(params.x);
    const T* weight = static_cast<const T*>(params.weight);
    T* out = static_cast<T*>(params.out);
    parallel_for(params.rows, rows_per_thread(params.features, kValuesPerThread),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t row = begin; row < end; ++row) {
                     norm_row(x + row * params.stride_row, weight, out + row * params.features,
                              params.features, params.epsilon);
                   }
                 });
  });
}

}  // namespace specdec::SPECDEC_ISA
