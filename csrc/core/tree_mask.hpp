#pragma once

#include <cstdint>

namespace specdec {

struct TreeMaskParams {
  const int32_t* parents;    // [B, N]
  const int32_t* num_nodes;  // [B]
  int64_t* ancestors;        // [B, N, W], contiguous
  int32_t* depths;           // [B, N], contiguous
  int64_t stride_parents_b, stride_parents_n, stride_num_nodes;
  int32_t batch, nodes, words;
};

}  // namespace specdec
