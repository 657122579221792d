// Products of a few rows with packed weights.
#pragma once

#include "../core/packed_linear.hpp"

namespace specdec::SPECDEC_ISA {

template <class T>
struct PackedRows {
  const T* x;  // [R, F], unit stride in F
  int64_t stride_row;
  int32_t rows, features;
};

template <class T>
struct PackedWeight {
  const T* panels;  // see PackedLinearParams
  const T* bias;    // or null
  T* out;           // [R, outputs], contiguous
  int32_t outputs;
};

// The same rows times each weight, the columns of all of them divided among the threads at once.
template <class T>
void multiply_packed(const PackedRows<T>& input, const PackedWeight<T>* weights, int num_weights);

}  // namespace specdec::SPECDEC_ISA
