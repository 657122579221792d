// Addresses of slots, and copies between them.
#pragma once

#include <cstdint>
#include <cstring>

#include "../core/cache.hpp"

namespace specdec::SPECDEC_ISA {

// The first element of one head in one slot, as bytes.
inline char* slot_bytes(const CacheView& cache, const SlotMap& slots, int64_t b, int64_t g,
                        int64_t slot, int64_t bytes) {
  const int64_t element = slots.page(b, slot) * cache.stride_c + g * cache.stride_g +
                          slots.offset(slot) * cache.stride_s;
  return static_cast<char*>(cache.data) + element * bytes;
}

// `num` elements of `bytes` bytes (2 or 4), strides in elements.
inline void copy_elements(char* target, int64_t target_stride, const char* source,
                          int64_t source_stride, int64_t num, int64_t bytes) {
  if (target_stride == 1 && source_stride == 1) {
    std::memcpy(target, source, static_cast<size_t>(num * bytes));
    return;
  }
  for (int64_t i = 0; i < num; ++i) {
    std::memcpy(target + i * target_stride * bytes, source + i * source_stride * bytes,
                static_cast<size_t>(bytes));
  }
}

}  // namespace specdec::SPECDEC_ISA
