#pragma once

#include "cache.hpp"

namespace specdec {

struct WriteKvParams {
  CacheView k_cache, v_cache;  // [B, G, S, D], [B, G, S, E], or pages
  CacheView k, v;              // [B, G, N, D], [B, G, N, E]: nodes in place of slots
  SlotMap slots;
  const int32_t* lengths;    // [B]
  const int32_t* num_nodes;  // [B]
  int64_t stride_lengths, stride_num_nodes;
  int64_t capacity;  // slots of a request
  int32_t batch, nodes;
  DType dtype;
};

}  // namespace specdec
