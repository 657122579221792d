// The law that a node's sampled children were drawn from, looked up by target token.
#pragma once

#include <cmath>

#include "../core/verify.hpp"
#include "simd.hpp"
#include "vector_math.hpp"

namespace specdec::SPECDEC_ISA {

class DraftLaw {
 public:
  void open(const DraftParams& params, int64_t b, int32_t nodes, int32_t node) {
    const int64_t row = params.rows[b * nodes + node];
    law_ = params.laws + b * params.stride_laws_b + row * params.stride_laws_q;
    params_ = &params;
    largest_ = 0.0f;
    scale_ = left_ = 1.0;
    total_ = -1.0;
    if (params.is_logits) normalise();
  }

  // Probability of `token`; `is_left`: given that none of those taken out is drawn.
  double at(int64_t token, bool is_left) const {
    if (!is_left) return mass(token);
    return left_ > 0.0 ? mass(token) / left_ : 0.0;
  }

  // Later siblings without replacement are drawn without `token`.
  void take_out(int64_t token) {
    if (total_ < 0.0) {
      total_ = 0.0;
      for (int32_t u = 0; u < params_->draft_vocab; ++u) total_ += mass_of(u);
      left_ = total_;
    }
    left_ -= mass(token);
  }

 private:
  double mass(int64_t token) const {
    const int64_t u = params_->draft_ids != nullptr ? params_->draft_ids[token] : token;
    return u < 0 || u >= params_->draft_vocab ? 0.0 : mass_of(u);
  }

  // NaN, infinite or negative probabilities count as 0; logits are read as in `sample`.
  double mass_of(int64_t u) const {
    const float value = law_[u * params_->stride_laws_u];
    if (!params_->is_logits) return value > 0.0f && value < kInfinity ? value : 0.0;
    if (largest_ == kInfinity) return value == kInfinity ? scale_ : 0.0;
    const double distance = static_cast<double>(value) - largest_;
    return distance > -700.0 ? std::exp(distance) * scale_ : 0.0;
  }

  void normalise() {
    largest_ = -kInfinity;
    for (int32_t u = 0; u < params_->draft_vocab; ++u) {
      const float value = law_[u * params_->stride_laws_u];
      if (value > largest_) largest_ = value;
    }
    double sum = 0.0;
    for (int32_t u = 0; u < params_->draft_vocab; ++u) sum += mass_of(u);
    scale_ = sum > 0.0 ? 1.0 / sum : 0.0;
  }

  const float* law_ = nullptr;
  const DraftParams* params_ = nullptr;
  float largest_ = 0.0f;
  double scale_ = 1.0;   // of exp(logit - largest)
  double total_ = -1.0;  // mass of the whole row; -1 until needed
  double left_ = 1.0;    // mass not taken out
};

}  // namespace specdec::SPECDEC_ISA
