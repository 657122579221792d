// The torch tensors of `sample` and `verify`, for every backend.
#pragma once

#include "accept_arguments.hpp"
#include "tensor.hpp"

namespace specdec {

// The per-request arguments of a draw, contiguous; keeps the copies alive.
struct SamplingTensors {
  OptionalTensor seeds, positions, temperature, top_k, top_p, min_p, streams, coins;

  SamplingTensors(const char* op, const OptionalTensor& seeds, const OptionalTensor& positions,
                  const OptionalTensor& temperature, const OptionalTensor& top_k,
                  const OptionalTensor& top_p, const OptionalTensor& min_p,
                  const OptionalTensor& streams, const OptionalTensor& coins)
      : seeds(packed(seeds)),
        positions(packed(positions)),
        temperature(packed(temperature)),
        top_k(packed(top_k)),
        top_p(packed(top_p)),
        min_p(packed(min_p)),
        streams(packed(streams)),
        coins(packed(coins)) {
    if (temperature && !coins && (!seeds || !positions)) {
      fail("%s: seeds and positions must be given with temperature, got None", op);
    }
  }

  SamplingParams params(const Tensor& logits, const OptionalTensor& bias,
                        const OptionalTensor& mask, Domain domain) const {
    return sampling_params(logits, static_cast<int>(logits.dim()) - 1, dtype_of(logits), seeds,
                           positions, temperature, top_k, top_p, min_p, bias, mask, streams,
                           domain);
  }
};

}  // namespace specdec
