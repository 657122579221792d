#pragma once

#include "packed_linear.hpp"

namespace specdec {

struct AfterAttentionParams {
  const void* attended;     // [B, H, N, E], unit stride in E
  const void* residual;     // [B, N, F], contiguous
  const void* norm_weight;  // [F], contiguous
  PackedLayer o, gate, up, down;
  void* out;  // [B, N, F], contiguous
  int64_t stride_attended_b, stride_attended_h, stride_attended_n;
  int32_t batch, nodes, features, heads, value_dim;
  float epsilon;
  DType dtype;
};

}  // namespace specdec
