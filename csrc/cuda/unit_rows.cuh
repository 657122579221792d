// Rows of a cache as units of 16, 8, 4 or 2 bytes: the widest that addresses, strides and row
// lengths allow, so that no row has a tail. Which units they are is settled on the host.
#pragma once

#include <algorithm>

#include "../core/cache.hpp"
#include "portability.cuh"

namespace specdec::cuda {

// Strides in bytes.
struct UnitView {
  char* data;
  int64_t stride_c, stride_g, stride_s, stride_unit;
  int32_t heads, units;

  template <class Unit>
  __device__ Unit* at(int64_t page, int64_t head, int64_t offset, int64_t unit) const {
    return reinterpret_cast<Unit*>(data + page * stride_c + head * stride_g + offset * stride_s +
                                   unit * stride_unit);
  }
};

// Where a slot lies; `is_valid` is false where the cache has no such slot.
struct Place {
  int64_t page, offset;
  bool is_valid;
};

__device__ inline Place place_of(const SlotMap& slots, int64_t capacity, int64_t b, int64_t slot) {
  if (slot < 0 || slot >= capacity) return {0, 0, false};
  const int64_t page = slots.page(b, slot);
  return {page, slots.offset(slot), page >= 0 && page < slots.pages};
}

// A power of two up to 16.
inline int64_t widest_unit(const CacheView& cache, DType dtype) {
  const int64_t bytes = element_bytes(dtype);
  if (cache.stride_d != 1) return bytes;
  const int64_t all = reinterpret_cast<intptr_t>(cache.data) |
                      (cache.stride_c | cache.stride_g | cache.stride_s | cache.head_dim) * bytes;
  return std::clamp<int64_t>(all & -all, bytes, 16);  // the lowest bit: what divides them all
}

inline UnitView unit_view(const CacheView& cache, DType dtype, int64_t unit) {
  const int64_t bytes = element_bytes(dtype);
  return {static_cast<char*>(cache.data),
          cache.stride_c * bytes,
          cache.stride_g * bytes,
          cache.stride_s * bytes,
          cache.stride_d == 1 ? unit : cache.stride_d * bytes,
          cache.heads,
          static_cast<int32_t>(cache.head_dim * bytes / unit)};
}

// Calls `function` with a value of the unit's type.
template <class Function>
void with_unit(int64_t bytes, Function function) {
  switch (bytes) {
    case 16:
      return function(uint4{});
    case 8:
      return function(uint2{});
    case 4:
      return function(uint32_t{});
    default:
      return function(uint16_t{});
  }
}

}  // namespace specdec::cuda
