// The first launch of `sample` and `verify`: summaries of many rows at once.
#pragma once

#include "kernels.hpp"
#include "row_law.cuh"

namespace specdec::cuda {

struct SummarizeParams {
  SamplingParams sampling;
  Summaries summaries;       // of [B, N] rows
  const int32_t* parents;    // [B, N]; null where rows are no nodes of trees
  const int32_t* num_nodes;  // [B] or null
  int64_t stride_parents_b, stride_parents_n;
  int32_t nodes, row_tiles;
  bool wants_noise;   // of sampled rows without filters
  bool wants_masses;  // of all sampled rows; else of those with top-p
};

inline int32_t num_tiles(int32_t tokens) {
  return static_cast<int32_t>((int64_t{tokens} + kTile - 1) / kTile);
}

// Scratch of a launch, carved from one allocation.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}

  template <class T>
  T* take(int64_t num) {
    T* taken = reinterpret_cast<T*>(memory_ + used_);
    used_ += (num * int64_t{sizeof(T)} + 15) / 16 * 16;
    return taken;
  }

  size_t bytes() const { return static_cast<size_t>(used_); }

 private:
  unsigned char* memory_;
  int64_t used_ = 0;
};

inline Summaries take_summaries(Scratch& scratch, int64_t tiles) {
  return {scratch.take<float>(tiles), scratch.take<RankKey>(tiles), scratch.take<double>(tiles)};
}

// Blocks of a group: as many as there are processors for, while requests are few.
inline unsigned group_blocks(const char* op, int64_t requests) {
  const int64_t most = largest_cluster(op), processors = num_processors(op);
  unsigned blocks = 1;
  while (2 * blocks <= most && 2 * blocks * requests <= processors) blocks *= 2;
  return blocks;
}

void summarize_rows(const char* op, const SummarizeParams& params, Stream stream);

}  // namespace specdec::cuda
