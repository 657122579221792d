#pragma once

#include "numeric.hpp"

namespace specdec {

struct RmsNormParams {
  const void* x;       // [R, F], unit stride in F
  const void* weight;  // [F], contiguous
  void* out;           // [R, F], contiguous
  int64_t stride_row;  // of x
  int32_t rows, features;
  float epsilon;
  DType dtype;
};

}  // namespace specdec
