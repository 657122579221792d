#pragma once

#include <cstdint>

#include "numeric.hpp"

namespace specdec {

// Logits and how to draw from them; null pointers are absent arguments.
struct SamplingParams {
  const void* logits;        // [B, N, V]
  const float* bias;         // [B, V]
  const bool* mask;          // [B, V]
  const int64_t* seeds;      // [B]
  const int64_t* positions;  // [B]
  const float* temperature;  // [B]
  const int32_t* top_k;      // [B]
  const float* top_p;        // [B]
  const float* min_p;        // [B]
  const int64_t* streams;    // [B]
  int64_t stride_logits_b, stride_logits_n, stride_logits_v;
  int64_t stride_bias_b, stride_bias_v;
  int64_t stride_mask_b, stride_mask_v;
  int32_t batch, vocab;
  uint32_t domain;
  DType dtype;
};

struct SampleParams {
  SamplingParams sampling;  // rows as requests of one node
  const double* coins;      // [R]
  int64_t* tokens;          // [R, K]
  int32_t* status;          // [R]
  float* probs;             // [R, V] or null
  int32_t num_draws;
};

}  // namespace specdec
