// A row of logits in blocks of kBlock tokens: reading one, and the largest logit of each.
#pragma once

#include <cstdint>

#include "simd.hpp"

namespace specdec::SPECDEC_ISA {

inline constexpr int32_t kBlock = 128;

struct RowLogits {
  const void* logits;  // [V], elements `stride` apart
  const float* bias;   // [V] or null
  const bool* mask;    // [V] or null
  int64_t stride;
  int64_t bias_stride;
  int64_t mask_stride;
  int32_t vocab;
  DType dtype;
};

inline int32_t block_size(const RowLogits& row, int32_t block) {
  const int64_t left = row.vocab - static_cast<int64_t>(block) * kBlock;
  return left < kBlock ? static_cast<int32_t>(left) : kBlock;
}

template <class T>
void widen(const T* source, int64_t stride, int32_t num, float* target) {
  int32_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= num; i += kLanes) store(target + i, load(source + i));
  }
  for (; i < num; ++i) target[i] = to_float(source[i * stride]);
}

// Biased logits of one block, padded with -inf; NaN where the logits are.
inline void read_block(const RowLogits& row, int32_t block, float* logits) {
  const int64_t first = static_cast<int64_t>(block) * kBlock;
  const int32_t num = block_size(row, block);
  with_dtype(row.dtype, [&](auto tag) {
    using T = decltype(tag);
    widen(static_cast<const T*>(row.logits) + first * row.stride, row.stride, num, logits);
  });
  for (int32_t i = num; i < kBlock; ++i) logits[i] = -kInfinity;
  if (row.bias != nullptr) {
    for (int32_t i = 0; i < num; ++i) logits[i] += row.bias[(first + i) * row.bias_stride];
  }
  if (row.mask != nullptr) {
    for (int32_t i = 0; i < num; ++i) {
      if (!row.mask[(first + i) * row.mask_stride]) logits[i] = -kInfinity;
    }
  }
}

// The maxima of kNum consecutive blocks, each in kLanes / kNum lanes.
template <int kNum, class T>
Float maxima_of(const T* logits) {
  if constexpr (kNum == 1) {
    prefetch(logits + kAhead<T>, kBlock);
    return lanes_of(logits, kBlock);
  } else {
    // named: as an argument it would come second, and memory read backwards is read half as fast
    const Float left = maxima_of<kNum / 2>(logits);
    return larger_of_pairs(left, maxima_of<kNum / 2>(logits + kNum / 2 * kBlock));
  }
}

inline bool is_plain(const RowLogits& row) {
  return row.stride == 1 && row.bias == nullptr && row.mask == nullptr;
}

// The largest logit of each block from `begin` to `end`.
inline void block_maxima(const RowLogits& row, int32_t begin, int32_t end, float* maxima) {
  const int32_t num_full = row.vocab / kBlock < end ? row.vocab / kBlock : end;
  int32_t block = begin;
  if (is_plain(row)) {
    with_dtype(row.dtype, [&](auto tag) {
      using T = decltype(tag);
      const T* logits = static_cast<const T*>(row.logits);
      for (; block + kLanes <= num_full; block += kLanes) {
        const T* first = logits + static_cast<int64_t>(block) * kBlock;
        store(maxima + block, maxima_of<kLanes>(first));
      }
      for (; block < num_full; ++block) {
        maxima[block] = largest_of(logits + static_cast<int64_t>(block) * kBlock, kBlock);
      }
    });
  }
  for (; block < end; ++block) {
    alignas(64) float logits[kBlock];
    read_block(row, block, logits);
    maxima[block] = largest_of(logits, kBlock);
  }
}

}  // namespace specdec::SPECDEC_ISA
