#pragma once

#include "numeric.hpp"

namespace specdec {

inline constexpr int32_t kPanelOutputs = 16;

// Features of an output side by side: two of bfloat16, which some CPUs multiply as a pair.
template <class T>
inline constexpr int32_t kPanelFeatures = 1;
template <>
inline constexpr int32_t kPanelFeatures<Bfloat16> = 2;

struct PackedLinearParams {
  const void* x;       // [R, F], unit stride in F
  const void* panels;  // [ceil(U / 16), ceil(F / k), 16, k], contiguous; k = kPanelFeatures
  const void* bias;    // [U], contiguous, or null
  void* out;           // [R, U], contiguous
  int64_t stride_row;  // of x
  int32_t rows, features, outputs;
  DType dtype;
};

// A linear layer among others of an operator.
struct PackedLayer {
  const void* panels;
  const void* bias;  // or null
  int32_t outputs;
};

}  // namespace specdec
