// The second half of a pre-norm decoder layer, of which eager models make eleven operators and
// more. The kernels of `packed_linear` and `rms_norm` in turn, and what is done value by value: all
// between them stays in the cache, rounded to the dtype where eager values are. Bytes moved: the
// panels, once.
#include "../core/after_attention.hpp"

#include "layer_parts.hpp"
#include "parallel.hpp"
#include "scratch.hpp"
#include "simd.hpp"
#include "vector_math.hpp"

namespace specdec::SPECDEC_ISA {
namespace {

// Applies `function` to lanes [i, i + kLanes) of both, for all `num` values.
template <class T, class Function>
void combine(const T* a, const T* b, T* out, int64_t num, const Function& function) {
  parallel_for(num, kValuesPerThread, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) store(out + i, function(load(a + i), load(b + i)));
    if (i == end) return;
    const size_t bytes = static_cast<size_t>(end - i) * sizeof(T);
    T lanes[2][kLanes] = {};
    std::memcpy(lanes[0], a + i, bytes);
    std::memcpy(lanes[1], b + i, bytes);
    store(lanes[0], function(load(lanes[0]), load(lanes[1])));
    std::memcpy(out + i, lanes[0], bytes);
  });
}

template <class T>
void add(const T* a, const T* b, T* out, int64_t num) {
  combine(a, b, out, num, [](Float x, Float y) { return x + y; });
}

// x / (1 + exp(-x)), of which the exponential is only taken of what is not positive.
Float silu(Float x) {
  constexpr float kLog2E = 1.44269504f;
  const Float e = exp2_negative((x < 0.0f ? x : -x) * kLog2E);
  return x * (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

template <class T>
void gate(const T* gates, const T* x, T* out, int64_t num) {
  combine(gates, x, out, num,
          [](Float gate, Float value) { return rounded<T>(silu(gate)) * value; });
}

template <class T>
void half_layer(const AfterAttentionParams& params) {
  thread_local Scratch<T> attended_rows, wide_rows, gate_rows, up_rows;
  const int32_t rows = params.batch * params.nodes, width = params.heads * params.value_dim;
  const int64_t size = int64_t{rows} * params.features,
                hidden = int64_t{rows} * params.gate.outputs;
  T* attended = attended_rows.reserve(int64_t{rows} * width);
  for (int32_t row = 0; row < rows; ++row) {
    const T* from = static_cast<const T*>(params.attended) +
                    row / params.nodes * params.stride_attended_b +
                    row % params.nodes * params.stride_attended_n;
    for (int32_t h = 0; h < params.heads; ++h) {
      std::memcpy(attended + int64_t{row} * width + int64_t{h} * params.value_dim,
                  from + h * params.stride_attended_h,
                  static_cast<size_t>(params.value_dim) * sizeof(T));
    }
  }
  T* wide = wide_rows.reserve(2 * size);  // projected, later normed; then the new residual
  T* residual = wide + size;
  const PackedWeight<T> o = into(params.o, wide);
  multiply_packed<T>({attended, width, rows, width}, &o, 1);
  add(static_cast<const T*>(params.residual), wide, residual, size);
  norm(residual, params.norm_weight, params.epsilon, rows, params.features, wide, params.dtype);
  T* gates = gate_rows.reserve(hidden);
  T* up = up_rows.reserve(hidden);
  const PackedWeight<T> weights[] = {into(params.gate, gates), into(params.up, up)};
  multiply_packed<T>({wide, params.features, rows, params.features}, weights, 2);
  gate(gates, up, gates, hidden);
  const PackedWeight<T> down = into(params.down, wide);
  multiply_packed<T>({gates, params.gate.outputs, rows, params.gate.outputs}, &down, 1);
  add(residual, wide, static_cast<T*>(params.out), size);
}

}  // namespace

void after_attention(const AfterAttentionParams& params) {
  with_dtype(params.dtype, [&](auto tag) { half_layer<decltype(tag)>(params); });
}

}  // namespace specdec::SPECDEC_ISA
