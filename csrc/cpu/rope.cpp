// Rotary position embedding of queries and keys. A task owns heads of one request; every value is
// read once and written once, cos and sin from the cache after the first head.
#include "../core/rope.hpp"

#include "parallel.hpp"
#include "simd.hpp"

namespace specdec::SPECDEC_ISA {
namespace {

// out = x cos + turned sin, each product rounded to T as PyTorch's are.
template <class T>
void turn(const T* x, const T* turned, bool is_negated, const T* cos, const T* sin, T* out,
          int32_t num) {
  const float sign = is_negated ? -1.0f : 1.0f;
  int32_t i = 0;
  for (; i + kLanes <= num; i += kLanes) {
    const Float along = rounded<T>(load(x + i) * load(cos + i));
    const Float across = rounded<T>(load(turned + i) * splat(sign) * load(sin + i));
    store(out + i, along + across);
  }
  for (; i < num; ++i) {
    const T along = from_float<T>(to_float(x[i]) * to_float(cos[i]));
    const T across = from_float<T>(to_float(turned[i]) * sign * to_float(sin[i]));
    out[i] = from_float<T>(to_float(along) + to_float(across));
  }
}

template <class T>
void rotate_head(const RopeParams& params, const RopeHeads& heads, int64_t b, int64_t h) {
  const int32_t dim = params.head_dim, half = dim / 2;
  const T* from = static_cast<const T*>(heads.data) + b * heads.stride_b + h * heads.stride_h;
  T* to = static_cast<T*>(heads.out) + (b * heads.heads + h) * params.nodes * dim;
  for (int64_t n = 0; n < params.nodes; ++n, to += dim) {
    const T* x = from + n * heads.stride_n;
    const T* cos =
        static_cast<const T*>(params.cos) + b * params.stride_cos_b + n * params.stride_cos_n;
    const T* sin =
        static_cast<const T*>(params.sin) + b * params.stride_sin_b + n * params.stride_sin_n;
    turn(x, x + half, true, cos, sin, to, half);
    turn(x + half, x, false, cos + half, sin + half, to + half, half);
  }
}

}  // namespace

void rope(const RopeParams& params) {
  const int64_t heads = params.q.heads + params.k.heads;
  const int64_t head_size = int64_t{params.nodes} * params.head_dim;
  with_dtype(params.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(params.batch * heads, rows_per_thread(head_size), [&](int64_t begin, int64_t end) {
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
