#pragma once

#include "numeric.hpp"

namespace specdec {

inline constexpr int32_t kPanelOutputs = 16;

struct PackedLinearParams {
  const Bfloat16* x;       // [R, F], unit stride in F
  const Bfloat16* panels;  // [ceil(U / 16), ceil(F / 2), 16, 2], contiguous
  const Bfloat16* bias;    // [U], contiguous, or null
  Bfloat16* out;           // [R, U], contiguous
  int64_t stride_row;      // of x
  int32_t rows, features, outputs;
};

// A linear layer among others of an operator.
struct PackedLayer {
  const Bfloat16* panels;
  const Bfloat16* bias;  // or null
  int32_t outputs;
};

}  // namespace specdec
