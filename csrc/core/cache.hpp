// A key or value cache as the kernels see it: contiguous [B, G, S, D] or pages [C, G, S, D], any
// strides.
#pragma once

#include <cstdint>

#include "numeric.hpp"

namespace specdec {

struct CacheView {
  void* data;
  int64_t stride_c, stride_g, stride_s, stride_d;
  int32_t heads, head_dim;
};

// Where the slots of each request lie. A null page table means that request b owns row b of the
// cache.
struct SlotMap {
  const int32_t* page_table;  // [B, M]
  int64_t stride_b, stride_m;
  int32_t pages, page_size;

  SPECDEC_HD int64_t page(int64_t b, int64_t slot) const {
    return page_table == nullptr ? b : page_table[b * stride_b + slot / page_size * stride_m];
  }
  SPECDEC_HD int64_t offset(int64_t slot) const {
    return page_table == nullptr ? slot : slot % page_size;
  }
};

}  // namespace specdec
