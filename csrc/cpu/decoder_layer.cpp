// The two halves of a pre-norm decoder layer around its attention: what eager models do in about
// twenty operators. They are the kernels of those operators in turn, whose values between them stay
// in the cache, rounded to bfloat16 where eager ones are. Bytes moved: the panels, once.
#include "../core/decoder_layer.hpp"

#include "../core/rms_norm.hpp"
#include "../core/rope.hpp"
#include "packed_linear.hpp"
#include "parallel.hpp"
#include "scratch.hpp"
#include "simd.hpp"
#include "vector_math.hpp"

namespace specdec::SPECDEC_ISA {

void rms_norm(const RmsNormParams&);
void rope(const RopeParams&);

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

PackedWeight into(const PackedLayer& layer, Bfloat16* out) {
  return {layer.panels, layer.bias, out, layer.outputs};
}

void norm(const Bfloat16* x, const Bfloat16* weight, float epsilon, int32_t rows, int32_t features,
          Bfloat16* out) {
  rms_norm({
      .x = x,
      .weight = weight,
      .out = out,
      .stride_row = features,
      .rows = rows,
      .features = features,
      .epsilon = epsilon,
      .dtype = DType::kBfloat16,
  });
}

}  // namespace

void before_attention(const BeforeAttentionParams& params) {
  thread_local Scratch<Bfloat16> normed_rows, flat_q, flat_k;
  const int32_t rows = params.batch * params.nodes;
  Bfloat16* normed = normed_rows.reserve(int64_t{rows} * params.features);
  Bfloat16* q = flat_q.reserve(int64_t{rows} * params.q.outputs);
  Bfloat16* k = flat_k.reserve(int64_t{rows} * params.k.outputs);
  norm(params.x, params.norm_weight, params.epsilon, rows, params.features, normed);
  const PackedWeight weights[] = {into(params.q, q), into(params.k, k),
                                  into(params.v, params.v_out)};
  multiply_packed({normed, params.features, rows, params.features}, weights, 3);
  const auto heads = [&](const Bfloat16* x, int32_t num, Bfloat16* out) {
    const int64_t stride_n = int64_t{num} * params.head_dim;
    return RopeHeads{x, out, params.nodes * stride_n, params.head_dim, stride_n, num};
  };
  rope({
      .q = heads(q, params.heads, params.q_out),
      .k = heads(k, params.groups, params.k_out),
      .cos = params.cos,
      .sin = params.sin,
      .stride_cos_b = params.stride_cos_b,
      .stride_cos_n = params.stride_cos_n,
      .stride_sin_b = params.stride_sin_b,
      .stride_sin_n = params.stride_sin_n,
      .batch = params.batch,
      .nodes = params.nodes,
      .head_dim = params.head_dim,
      .dtype = DType::kBfloat16,
  });
}

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
