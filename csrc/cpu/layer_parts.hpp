// Parts of a decoder layer that both of its halves have.
#pragma once

#include "../core/rms_norm.hpp"
#include "packed_linear.hpp"

namespace specdec::SPECDEC_ISA {

void rms_norm(const RmsNormParams&);

inline PackedWeight into(const PackedLayer& layer, Bfloat16* out) {
  return {layer.panels, layer.bias, out, layer.outputs};
}

inline void norm(const Bfloat16* x, const Bfloat16* weight, float epsilon, int32_t rows,
                 int32_t features, Bfloat16* out) {
  rms_norm({
      .x = x,
      .weight = weight,
      .out = out,
      .stride_row = features,
      .rows = rows,
      .features = features,
      .epsilon = epsilon,
      .dtype = DType::kBfloat16,
  });
}

}  // namespace specdec::SPECDEC_ISA
