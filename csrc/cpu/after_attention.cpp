// The second half of a pre-norm decoder layer, of which eager models make eleven operators and
// more. The kernels of `packed_linear` and `rms_norm` in turn, and what is done value by value: all
// between them stays in the cache, rounded to bfloat16 where eager values are. Bytes moved: the
// panels, once.
#include "../core/after_attention.hpp"

#include "layer_parts.hpp"
#include "parallel.hpp"
#include "scratch.hpp"
#include "simd.hpp"
#include "vector_math.hpp"

namespace specdec::SPECDEC_ISA {
namespace {

constexpr int64_t kValuesPerThread = 16384;

// Applies `function` to lanes [i, i + kLanes) of both, for all `num` values.
template <class Function>
void combine(const Bfloat16* a, const Bfloat16* b, Bfloat16* out, int64_t num,
             const Function& function) {
  parallel_for(num, kValuesPerThread, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) store(out + i, function(load(a + i), load(b + i)));
    if (i == end) return;
    const size_t bytes = static_cast<size_t>(end - i) * sizeof(Bfloat16);
    Bfloat16 lanes[2][kLanes] = {};
    std::memcpy(lanes[0], a + i, bytes);
    std::memcpy(lanes[1], b + i, bytes);
    store(lanes[0], function(load(lanes[0]), load(lanes[1])));
    std::memcpy(out + i, lanes[0], bytes);
  });
}

void add(const Bfloat16* a, const Bfloat16* b, Bfloat16* out, int64_t num) {
  combine(a, b, out, num, [](Float x, Float y) { return x + y; });
}

// x / (1 + exp(-x)), of which the exponential is only taken of what is not positive.
Float silu(Float x) {
  constexpr float kLog2E = 1.44269504f;
  const Float e = exp2_negative((x < 0.0f ? x : -x) * kLog2E);
  return x * (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

void gate(const Bfloat16* gates, const Bfloat16* x, Bfloat16* out, int64_t num) {
  combine(gates, x, out, num,
          [](Float gate, Float value) { return rounded<Bfloat16>(silu(gate)) * value; });
}

}  // namespace

void after_attention(const AfterAttentionParams& params) {
  thread_local Scratch<Bfloat16> attended_rows, wide_rows, gate_rows, up_rows;
  const int32_t rows = params.batch * params.nodes, width = params.heads * params.value_dim;
  const int64_t size = int64_t{rows} * params.features,
                hidden = int64_t{rows} * params.gate.outputs;
  Bfloat16* attended = attended_rows.reserve(int64_t{rows} * width);
  for (int32_t row = 0; row < rows; ++row) {
    const Bfloat16* from = params.attended + row / params.nodes * params.stride_attended_b +
                           row % params.nodes * params.stride_attended_n;
    for (int32_t h = 0; h < params.heads; ++h) {
      std::memcpy(attended + int64_t{row} * width + int64_t{h} * params.value_dim,
                  from + h * params.stride_attended_h,
                  static_cast<size_t>(params.value_dim) * sizeof(Bfloat16));
    }
  }
  Bfloat16* wide = wide_rows.reserve(2 * size);  // projected, later normed; then the new residual
  Bfloat16* residual = wide + size;
  const PackedWeight o = into(params.o, wide);
  multiply_packed({attended, width, rows, width}, &o, 1);
  add(params.residual, wide, residual, size);
  norm(residual, params.norm_weight, params.epsilon, rows, params.features, wide);
  Bfloat16* gates = gate_rows.reserve(hidden);
  Bfloat16* up = up_rows.reserve(hidden);
  const PackedWeight weights[] = {into(params.gate, gates), into(params.up, up)};
  multiply_packed({wide, params.features, rows, params.features}, weights, 2);
  gate(gates, up, gates, hidden);
  const PackedWeight down = into(params.down, wide);
  multiply_packed({gates, params.gate.outputs, rows, params.gate.outputs}, &down, 1);
  add(residual, wide, params.out, size);
}

}  // namespace specdec::SPECDEC_ISA
