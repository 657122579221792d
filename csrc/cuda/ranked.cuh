// Scores with their tokens as one integer each, in the order of a ranking: larger scores first,
// then lower tokens. No two keys are equal, so what is selected and how it is sorted depends on
// nothing else.
#pragma once

#include "../core/numeric.hpp"
#include "portability.cuh"

namespace specdec::cuda {

using RankKey = uint64_t;
constexpr RankKey kNoKey = 0;  // below every key

// NaN counts as -inf; the zeros are equal.
__device__ inline float ranked_score(float score) {
  return score == score ? score + 0.0f : -INFINITY;
}

__device__ inline RankKey rank_key(float score, int32_t token) {
  const uint32_t bits = bit_cast<uint32_t>(score);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<RankKey>(ordered) << 32 | ~static_cast<uint32_t>(token);
}

__device__ inline float score_of(RankKey key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return bit_cast<float>(ordered & 0x80000000u ? ordered & 0x7FFFFFFFu : ~ordered);
}

__device__ inline int32_t token_of(RankKey key) {
  return static_cast<int32_t>(~static_cast<uint32_t>(key));
}

// Sorts `num` keys, a power of two, largest first; by all threads of the block, which may read them
// when it returns. Bitonic: in round (width, distance), keys that far apart are put in order,
// falling in every other run of `width`.
template <bool kIsGlobal = false>
__device__ void sort_keys(RankKey* keys, int32_t num) {
  for (int32_t width = 2; width <= num; width *= 2) {
    for (int32_t distance = width / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (int32_t i = static_cast<int32_t>(threadIdx.x); i < num / 2;
           i += static_cast<int32_t>(blockDim.x)) {
        const int32_t low = i / distance * 2 * distance + i % distance;
        const RankKey a = kIsGlobal ? load_global(keys + low) : keys[low];
        const RankKey b = kIsGlobal ? load_global(keys + low + distance) : keys[low + distance];
        const bool is_falling = (low & width) == 0;
        if ((a < b) == is_falling) {
          if constexpr (kIsGlobal) {
            store_global(keys + low, b);
            store_global(keys + low + distance, a);
          } else {
            keys[low] = b;
            keys[low + distance] = a;
          }
        }
      }
    }
  }
  __syncthreads();
}

}  // namespace specdec::cuda
