// Parts of a decoder layer that both of its halves have.
#pragma once

#include "../core/rms_norm.hpp"
#include "packed_linear.hpp"

namespace specdec::SPECDEC_ISA {

void rms_norm(const RmsNormParams&);

template <class T>
PackedWeight<T> into(const PackedLayer& layer, T* out) {
  return {static_cast<const T*>(layer.panels), static_cast<const T*>(layer.bias), out,
          layer.outputs};
}

inline void norm(const void* x, const void* weight, float epsilon, int32_t rows, int32_t features,
                 void* out, DType dtype) {
  rms_norm({
      .x = x,
      .weight = weight,
      .out = out,
      .stride_row = features,
      .rows = rows,
      .features = features,
      .epsilon = epsilon,
      .dtype = dtype,
  });
}

}  // namespace specdec::SPECDEC_ISA
