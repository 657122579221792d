#pragma once

#include <cstdint>

#include "sample.hpp"

namespace specdec {

struct VerifyParams {
  SamplingParams sampling;
  const int64_t* tokens;     // [B, N]
  const int32_t* parents;    // [B, N]
  const int32_t* num_nodes;  // [B]
  int32_t* path;             // [B, N]
  int32_t* num_accepted;     // [B]
  int64_t* next_tokens;      // [B]
  int32_t* status;           // [B]
  int64_t stride_tokens_b, stride_tokens_n;
  int64_t stride_parents_b, stride_parents_n;
  int32_t nodes;
};

}  // namespace specdec
