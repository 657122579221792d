#pragma once

#include "numeric.hpp"

namespace specdec {

struct TopkLogprobsParams {
  const void* logits;  // [R, V]
  float* logprobs;     // [R, k], contiguous
  int64_t* tokens;     // [R, k], contiguous
  int64_t stride_row, stride_vocab;
  int32_t rows, vocab, k;
  DType dtype;
};

}  // namespace specdec
