#pragma once

#include "packed_linear.hpp"

namespace specdec {

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
