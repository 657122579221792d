#pragma once

#include <cstdint>

#include "sample.hpp"

namespace specdec {

enum class Rule : int32_t { kWalk, kToken, kBlock, kTraversal, kGdTraversal, kTypical };

// The laws that sampled nodes were drawn from; all null where there are none.
struct DraftParams {
  const int8_t* kinds = nullptr;  // [B, N]
  const int32_t* rows = nullptr;  // [B, N], row of `laws` for the sampled children of a node
  const float* laws = nullptr;    // [B, Q, U], probabilities or logits
  const int32_t* draft_ids =
      nullptr;                       // [V], target id -> draft id or -1; null if they are the same
  const int64_t* offsets = nullptr;  // [U], for a kernel that makes draft_ids itself
  int64_t stride_laws_b = 0, stride_laws_q = 0, stride_laws_u = 0;
  int32_t num_laws = 0, draft_vocab = 0;  // Q, U
  bool is_logits = false;
};

struct VerifyParams {
  SamplingParams sampling;
  DraftParams draft;
  const int64_t* tokens;     // [B, N]
  const int32_t* parents;    // [B, N]
  const int32_t* num_nodes;  // [B]
  const double* coins;       // [B, N] or null
  int32_t* path;             // [B, N]
  int32_t* num_accepted;     // [B]
  int64_t* next_tokens;      // [B]
  int32_t* status;           // [B]
  float* logprobs;           // [B, N] or null
  float* margins;            // [B, N] or null
  double* thresholds;        // [B, N] or null
  double* next_law;          // [B, V] or null
  int64_t stride_tokens_b, stride_tokens_n;
  int64_t stride_parents_b, stride_parents_n;
  double typical_epsilon, typical_delta;
  Rule rule;
  int32_t nodes;
};

}  // namespace specdec
