// The acceptance step that all rules of `verify` are made of, for host and device;
// specdec_kernels/acceptance.py defines it.
//
// A child with target mass `kept` = a p(x) and draft mass `drawn` = q(x) > 0 is kept with
// probability min(1, kept / drawn); if it is not, its parent's reach a becomes next_reach.
#pragma once

#include "numeric.hpp"

namespace specdec {

enum DraftKind : int8_t { kOneHot = 0, kSampled = 1, kSampledWithoutReplacement = 2 };

enum RowStatus : int32_t { kOk = 0, kNoFiniteLogit = 1, kNoSuchDraw = 2 };

SPECDEC_HD double keep_probability(double kept, double drawn) {
  return kept < drawn ? kept / drawn : 1.0;
}

// `mass` is what the rejected child left: the sum of max(0, a p - q).
SPECDEC_HD double next_reach(double mass, double reach) {
  const double denominator = mass + 1.0 - reach;
  return denominator > 0.0 ? mass / denominator : 1.0;
}

}  // namespace specdec
