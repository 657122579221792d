// The threads that work on one request together: a block, or the blocks of a cluster. What they
// agree on is exchanged in shared memory, and between blocks in global memory, where the cluster's
// barrier orders it; so the same code runs where there are no clusters, as a group of one block.
// Every member is called by all threads and returns the same in all.
#pragma once

#include "logit_row.cuh"

namespace specdec::cuda {

constexpr int kGroupThreads = 256, kGroupWarps = kGroupThreads / kWarpSize;
constexpr int kLargestGroup = 8;           // blocks
constexpr int kSums = 8;                   // that are added together, one by each warp
constexpr int kExchangeWords = kSums + 1;  // of a block, 8 bytes each
constexpr int64_t kExchangeBytes = int64_t{2} * kLargestGroup * kExchangeWords * 8;

__device__ inline uint32_t warp_largest(uint32_t value) { return __reduce_max_sync(~0u, value); }

__device__ inline RankKey warp_largest(RankKey key) {
  const uint32_t high = warp_largest(static_cast<uint32_t>(key >> 32));
  const bool is_high = static_cast<uint32_t>(key >> 32) == high;
  return static_cast<RankKey>(high) << 32 | warp_largest(is_high ? static_cast<uint32_t>(key) : 0u);
}

// In an order that does not depend on the lane.
__device__ inline double warp_sum(double value) {
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) value += __shfl_xor_sync(~0u, value, bits);
  return value;
}

class Group {
 public:
  // `exchange`: [2][blocks][kExchangeWords].
  __device__ explicit Group(uint64_t* exchange)
      : exchange_(exchange),
        rank_(static_cast<int32_t>(cluster_rank())),
        size_(static_cast<int32_t>(cluster_size())) {}

  __device__ int32_t rank() const { return rank_; }
  __device__ int32_t size() const { return size_; }
  __device__ int32_t thread() const { return static_cast<int32_t>(threadIdx.x); }
  __device__ bool is_leader() const { return thread() == 0; }  // of its block

  // Tiles of a row are dealt out to the warps of all blocks.
  __device__ int32_t first_tile() const { return rank_ * kGroupWarps + thread() / kWarpSize; }
  __device__ int32_t tile_step() const { return size_ * kGroupWarps; }

  // What was written to global memory before, all may read after.
  __device__ void sync() const {
    if (size_ > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }
  }

  // The largest of the block's keys.
  __device__ RankKey block_largest(RankKey key) {
    SPECDEC_SHARED(RankKey, keys, [2][kGroupWarps]);
    RankKey(&mine)[kGroupWarps] = keys[flip()];
    key = warp_largest(key);
    if (this_lane() == 0) mine[thread() / kWarpSize] = key;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kGroupWarps; ++warp) key = max(key, mine[warp]);
    return key;
  }

  __device__ RankKey largest(RankKey key) {
    key = block_largest(key);
    if (size_ == 1) return key;
    if (is_leader()) exchanged(rank_)[0] = key;
    cluster_sync();
    for (int32_t rank = 0; rank < size_; ++rank) key = max(key, exchanged(rank)[0]);
    turn_ ^= 1;
    return key;
  }

  __device__ double block_sum(double value) {
    SPECDEC_SHARED(double, sums, [2][kGroupWarps]);
    double (&mine)[kGroupWarps] = sums[flip()];
    value = warp_sum(value);
    if (this_lane() == 0) mine[thread() / kWarpSize] = value;
    __syncthreads();
    value = 0.0;
#pragma unroll
    for (int warp = 0; warp < kGroupWarps; ++warp) value += mine[warp];
    return value;
  }

  __device__ double sum(double value) {
    value = block_sum(value);
    if (size_ == 1) return value;
    if (is_leader()) exchanged(rank_)[0] = bit_cast<uint64_t>(value);
    cluster_sync();
    value = 0.0;
    for (int32_t rank = 0; rank < size_; ++rank) value += bit_cast<double>(exchanged(rank)[0]);
    turn_ ^= 1;
    return value;
  }

  // Sums, each over all threads, and the largest key.
  __device__ RankKey sums_and_largest(double (&values)[kSums], RankKey key) {
    SPECDEC_SHARED(double, partial, [kSums][kGroupThreads]);
    SPECDEC_SHARED(double, sums, [kSums]);
    static_assert(kSums == kGroupWarps);
#pragma unroll
    for (int i = 0; i < kSums; ++i) partial[i][thread()] = values[i];
    key = block_largest(key);
    const int32_t warp = thread() / kWarpSize;
    double total = 0.0;
    for (int i = this_lane(); i < kGroupThreads; i += kWarpSize) total += partial[warp][i];
    total = warp_sum(total);
    if (this_lane() == 0) sums[warp] = total;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSums; ++i) values[i] = sums[i];
    if (size_ == 1) return key;
    if (thread() < kSums) exchanged(rank_)[thread()] = bit_cast<uint64_t>(sums[thread()]);
    if (thread() == kSums) exchanged(rank_)[kSums] = key;
    cluster_sync();
#pragma unroll
    for (int i = 0; i < kSums; ++i) values[i] = 0.0;
    for (int32_t rank = 0; rank < size_; ++rank) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) values[i] += bit_cast<double>(exchanged(rank)[i]);
      key = max(key, exchanged(rank)[kSums]);
    }
    turn_ ^= 1;
    return key;
  }

 private:
  // Two buffers in turns: one barrier between a write and its reads is enough.
  __device__ int flip() { return block_turn_ ^= 1; }
  __device__ uint64_t* exchanged(int32_t rank) const {
    return exchange_ + (turn_ * size_ + rank) * kExchangeWords;
  }

  uint64_t* exchange_;
  int32_t rank_, size_;
  int turn_ = 0, block_turn_ = 0;
};

}  // namespace specdec::cuda
