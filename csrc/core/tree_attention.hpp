#pragma once

#include <cstdint>

#include "cache.hpp"

namespace specdec {

struct TreeAttentionParams {
  CacheView q;        // [B, H, N, D]
  CacheView k_cache;  // [C, G, S, D]
  CacheView v_cache;  // [C, G, S, E]
  SlotMap slots;
  const int64_t* ancestors;  // [B, N, W], contiguous
  const int32_t* depths;     // [B, N], contiguous
  const int32_t* lengths;    // [B], contiguous
  const int32_t* num_nodes;  // [B], contiguous
  const float* sinks;        // [H], contiguous, or null
  void* out;                 // [B, N, H, E], contiguous
  float* lse;                // [B, H, N], contiguous, or null
  int64_t capacity;          // slots of a request
  int32_t batch, nodes, window;
  float scale, softcap;
  DType dtype;
};

}  // namespace specdec
