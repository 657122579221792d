#pragma once

#include "packed_linear.hpp"

namespace specdec {

struct BeforeAttentionParams {
  const Bfloat16* x;            // [B, N, F], contiguous
  const Bfloat16* norm_weight;  // [F], contiguous
  PackedLayer q, k, v;
  const Bfloat16 *q_norm_weight, *k_norm_weight;  // [D], contiguous, or null
  const Bfloat16 *cos, *sin;                      // [B, N, D], unit stride in D
  Bfloat16 *q_out, *k_out;                        // [B, H, N, D] and [B, G, N, D], contiguous
  Bfloat16* v_out;                                // [B, N, G, D], contiguous
  int64_t stride_cos_b, stride_cos_n, stride_sin_b, stride_sin_n;
  int32_t batch, nodes, features, heads, groups, head_dim;
  float epsilon;
};

}  // namespace specdec
