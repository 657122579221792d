#pragma once

#include <cstdint>

namespace specdec {

struct BuildTreeParams {
  const int64_t* roots;              // [B]
  const int64_t* candidates;         // [B, T, K]
  const float* logprobs;             // [B, T, K]
  const int32_t* budgets;            // [B]
  const int32_t* candidate_parents;  // [B, T, K]; null: candidates are marginals
  int64_t* tokens;                   // [B, N], contiguous, as all results
  int32_t* parents;                  // [B, N]
  int32_t* num_nodes;                // [B]
  float* scores;                     // [B, N]
  int64_t stride_roots, stride_budgets;
  int64_t stride_candidates_b, stride_candidates_t, stride_candidates_k;
  int64_t stride_logprobs_b, stride_logprobs_t, stride_logprobs_k;
  int64_t stride_parents_b, stride_parents_t, stride_parents_k;
  int32_t batch, depths, width, max_nodes;
};

}  // namespace specdec
