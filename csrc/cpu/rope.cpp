// Rotary position embedding of queries and keys. A task owns heads of one request; every value is
// read once and written once, cos and sin from the cache after the first head.
#include "../core/rope.hpp"

#include "parallel.hpp"
#include "simd.hpp"

namespace specdec::SPECDEC_ISA {
namespace {

// Each product rounded to T as PyTorch's are.
template <class T>
void rotate(const T* x, const T* cos, const T* sin, T* out, int32_t half) {
  const T *y = x + half, *cos_y = cos + half, *sin_y = sin + half;
  T* out_y = out + half;
  int32_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Float a = load(x + i), b = load(y + i);
    store(out + i, rounded<T>(a * load(cos + i)) - rounded<T>(b * load(sin + i)));
    store(out_y + i, rounded<T>(b * load(cos_y + i)) + rounded<T>(a * load(sin_y + i)));
  }
  const auto product = [](T a, T b) { return to_float(from_float<T>(to_float(a) * to_float(b))); };
  for (; i < half; ++i) {
    out[i] = from_float<T>(product(x[i], cos[i]) - product(y[i], sin[i]));
    out_y[i] = from_float<T>(product(y[i], cos_y[i]) + product(x[i], sin_y[i]));
  }
}

template <class T>
void rotate_head(const RopeParams& params, const RopeHeads& heads, int64_t b, int64_t h) {
  const int32_t dim = params.head_dim;
  const T* from = static_cast<const T*>(heads.data) + b * heads.stride_b + h * heads.stride_h;
  T* to = static_cast<T*>(heads.out) + (b * heads.heads + h) * params.nodes * dim;
  for (int64_t n = 0; n < params.nodes; ++n, to += dim) {
    const T* x = from + n * heads.stride_n;
    const T* cos =
        static_cast<const T*>(params.cos) + b * params.stride_cos_b + n * params.stride_cos_n;
    const T* sin =
        static_cast<const T*>(params.sin) + b * params.stride_sin_b + n * params.stride_sin_n;
    rotate(x, cos, sin, to, params.head_dim / 2);
  }
}

}  // namespace

void rope(const RopeParams& params) {
  const int64_t heads = params.q.heads + params.k.heads;
  const int64_t head_size = int64_t{params.nodes} * params.head_dim;
  with_dtype(params.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(params.batch * heads, rows_per_thread(head_size, kValuesPerThread),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t task = begin; task < end; ++task) {
                     const int64_t b = task / heads, h = task % heads;
                     if (h < params.q.heads) {
                       rotate_head<T>(params, params.q, b, h);
                     } else {
                       rotate_head<T>(params, params.k, b, h - params.q.heads);
                     }
                   }
                 });
  });
}

}  // namespace specdec::SPECDEC_ISA
