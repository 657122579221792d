#pragma once

#include "cache.hpp"

namespace specdec {

struct CommitParams {
  const CacheView* caches;  // [num_caches], keys and values of every layer
  SlotMap slots;
  int32_t* lengths;         // [B], advanced
  const int32_t* path;      // [B, N]
  const int32_t* num_kept;  // [B]
  const void* hidden;       // [B, N, F] or null
  void* hidden_out;         // [B, N, F], contiguous
  int64_t stride_lengths, stride_path_b, stride_path_n, stride_num_kept;
  int64_t stride_hidden_b, stride_hidden_n, stride_hidden_f;
  int64_t capacity;  // slots of a request
  int64_t num_caches;
  int32_t batch, nodes, features;
  DType dtype, hidden_dtype;
};

}  // namespace specdec
