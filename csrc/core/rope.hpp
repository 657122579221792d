#pragma once

#include "numeric.hpp"

namespace specdec {

// Queries or keys: [B, H, N, D] with unit stride in D; out is contiguous.
struct RopeHeads {
  const void* data;
  void* out;
  int64_t stride_b, stride_h, stride_n;
  int32_t heads;
};

struct RopeParams {
  RopeHeads q, k;
  const void *cos, *sin;  // [B, N, D], unit stride in D
  int64_t stride_cos_b, stride_cos_n, stride_sin_b, stride_sin_n;
  int32_t batch, nodes, head_dim;
  DType dtype;
};

}  // namespace specdec
