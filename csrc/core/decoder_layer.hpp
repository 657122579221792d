#pragma once

#include "numeric.hpp"

namespace specdec {

// A linear layer: see PackedLinearParams.
struct PackedLayer {
  const Bfloat16* panels;
  const Bfloat16* bias;  // or null
  int32_t outputs;
};

struct BeforeAttentionParams {
  const Bfloat16* x;            // [B, N, F], contiguous
  const Bfloat16* norm_weight;  // [F], contiguous
  PackedLayer q, k, v;
  const Bfloat16 *cos, *sin;  // [B, N, D], unit stride in D
  Bfloat16 *q_out, *k_out;    // [B, H, N, D] and [B, G, N, D], contiguous
  Bfloat16* v_out;            // [B, N, G, D], contiguous
  int64_t stride_cos_b, stride_cos_n, stride_sin_b, stride_sin_n;
  int32_t batch, nodes, features, heads, groups, head_dim;
  float epsilon;
};

struct AfterAttentionParams {
  const Bfloat16* attended;     // [B, H, N, E], unit stride in E
  const Bfloat16* residual;     // [B, N, F], contiguous
  const Bfloat16* norm_weight;  // [F], contiguous
  PackedLayer o, gate, up, down;
  Bfloat16* out;  // [B, N, F], contiguous
  int64_t stride_attended_b, stride_attended_h, stride_attended_n;
  int32_t batch, nodes, features, heads, value_dim;
  float epsilon;
};

}  // namespace specdec
