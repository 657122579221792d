// The target's law on one row of logits, and a draw from it: what specdec_kernels/sampling.py
// defines, for one row.
#pragma once

#include <cstdint>

#include "scratch.hpp"
#include "simd.hpp"
#include "verify.hpp"

namespace specdec::SPECDEC_ISA {

struct RowLogits {
  const void* logits;  // [V], elements `stride` apart
  const float* bias;   // [V] or null
  int64_t stride;
  int64_t bias_stride;
  int32_t vocab;
  DType dtype;
};

struct RowLaw {
  float temperature = 0.0f;  // greedy unless > 0
  int32_t top_k = 0;
  float top_p = 1.0f;
  float min_p = 0.0f;
  int64_t seed = 0;
  int64_t position = 0;
  uint32_t domain = 0;

  bool is_greedy() const { return !(temperature > 0.0f); }
};

struct Drawn {
  int64_t token;
  int32_t status;  // 0 ok, 1 no finite logit
};

// Logits of one node of request `b` (node 0 for plain rows).
RowLogits row_logits(const SamplingParams& params, int64_t b, int64_t node);

// Law of a token drawn `offset` positions after `positions[b]`.
RowLaw row_law(const SamplingParams& params, int64_t b, int64_t offset);

// Draws rows one at a time; its buffers grow to the largest row and are reused.
class RowSampler {
 public:
  // `is_parallel`: share the row's blocks among all threads (when there are fewer rows than
  // threads).
  Drawn draw(const RowLogits& row, const RowLaw& law, bool is_parallel);

 private:
  struct Best {
    float score = -kInfinity;
    int32_t token = 0;
  };

  float scan(const RowLogits& row, const RowLaw& law, bool is_parallel);
  int32_t first_token(const RowLogits& row, float score) const;
  void keep_infinite();
  float filter_edge(const RowLaw& law, float largest_score);
  double total_mass(float largest_score) const;
  void collect(float least);
  Best draw_kept(const RowLaw& law, float edge, bool is_parallel) const;
  Best draw_blocks(const RowLaw& law, float edge, int32_t begin, int32_t end) const;

  template <class Weight>
  void collect_heaviest(float largest_score, double target, Weight weight);

  int32_t num_blocks_ = 0;
  int32_t num_candidates_ = 0;
  Scratch<float> scores_;      // [blocks, kBlock], -inf past the vocabulary
  Scratch<float> block_max_;   // [blocks]
  Scratch<float> candidates_;  // [blocks, kBlock]
};

}  // namespace specdec::SPECDEC_ISA
