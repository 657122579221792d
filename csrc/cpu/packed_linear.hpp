// Products of a few rows with packed weights.
#pragma once

#include "../core/packed_linear.hpp"

namespace specdec::SPECDEC_ISA {

struct PackedRows {
  const Bfloat16* x;  // [R, F], unit stride in F
  int64_t stride_row;
  int32_t rows, features;
};

struct PackedWeight {
  const Bfloat16* panels;  // see PackedLinearParams
  const Bfloat16* bias;    // or null
  Bfloat16* out;           // [R, outputs], contiguous
  int32_t outputs;
};

// The same rows times each weight, the columns of all of them divided among the threads at once.
void multiply_packed(const PackedRows& input, const PackedWeight* weights, int num_weights);

}  // namespace specdec::SPECDEC_ISA
