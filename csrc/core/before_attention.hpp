#pragma once

#include "packed_linear.hpp"

namespace specdec {

struct BeforeAttentionParams {
  const void* x;            // [B, N, F], contiguous
  const void* norm_weight;  // [F], contiguous; null where x is to be taken as it is
  PackedLayer q, k, v;
  const void *q_norm_weight, *k_norm_weight;  // [D], contiguous, or null
  const void *cos, *sin;                      // [B, N, D], unit stride in D
  void *q_out, *k_out;                        // [B, H, N, D] and [B, G, N, D], contiguous
  void* v_out;                                // [B, N, G, D], contiguous
  int64_t stride_cos_b, stride_cos_n, stride_sin_b, stride_sin_n;
  int32_t batch, nodes, features, heads, groups, head_dim;
  float epsilon;
  DType dtype;
};

}  // namespace specdec
