// The target's law on one row of logits, and a draw from it: what specdec_kernels/sampling.py
// defines, for one row.
#pragma once

#include <cstdint>

#include "../core/acceptance.hpp"
#include "../core/sample.hpp"
#include "edge.hpp"
#include "kept_law.hpp"
#include "row_blocks.hpp"
#include "scratch.hpp"
#include "simd.hpp"

namespace specdec::SPECDEC_ISA {

struct RowLaw {
  float temperature = 0.0f;  // greedy unless > 0
  int32_t top_k = 0;
  float top_p = 1.0f;
  float min_p = 0.0f;
  int64_t seed = 0;
  int64_t position = 0;
  int64_t stream = 0;
  uint32_t domain = 0;

  bool is_greedy() const { return !(temperature > 0.0f); }
  bool has_filters() const { return top_k > 0 || top_p < 1.0f || min_p > 0.0f; }
};

struct Drawn {
  int64_t token;
  int32_t status;  // a RowStatus
};

struct TopTwo {
  float first, second;
};

// Logits of one node of request `b` (node 0 for plain rows).
RowLogits row_logits(const SamplingParams& params, int64_t b, int64_t node);

// Law of a token drawn `offset` positions after `positions[b]`.
RowLaw row_law(const SamplingParams& params, int64_t b, int64_t offset);

// Draws rows one at a time; its buffers grow to the largest row and are reused.
class RowSampler {
 public:
  // `is_shared`: all threads scan the row together (when there are fewer rows than threads).
  Drawn draw(const RowLogits& row, const RowLaw& law, bool is_shared);

  // Draws `num` tokens without replacement, in falling order of noisy score, PAD (-1) where none is
  // left. Returns the status.
  int32_t draw_many(const RowLogits& row, const RowLaw& law, int32_t num, int64_t* tokens);

  // The law itself; empty if no logit is finite. A greedy law holds the argmax alone.
  void keep(const RowLogits& row, const RowLaw& law, bool is_shared, KeptLaw& kept);

  // The entropy in nats of the law that `keep` returned last; it was not greedy.
  double entropy() const { return entropy_; }

  // The two largest biased logits.
  TopTwo top_two(const RowLogits& row, bool is_shared);

 private:
  struct Best {
    float score = -kInfinity;
    int32_t token = 0;
  };

  bool scan(const RowLogits& row, const RowLaw& law, bool is_shared);
  float score(float logit) const;
  Float score(Float logits) const;
  float logit_below(float least) const;
  void score_block(int32_t block, float* scores) const;
  int32_t first_token() const;
  Best draw_dense(bool is_shared) const;
  Best draw_blocks(int32_t begin, int32_t end) const;
  Best draw_candidates() const;
  Float noise(Int tokens) const;
  void filter();
  void filter_top_k();
  void filter_top_p(bool is_gathered);
  float min_p_edge() const;
  void gather(float least);
  void gather_block(int32_t block, float below);
  void drop_below(float edge);
  double total_mass() const;
  Count count() const;
  Mass mass();

  template <class Weigh>
  void gather_heaviest(double target, Weigh weigh_candidates);

  // The row at hand, its law and its largest score.
  RowLogits row_{};
  RowLaw law_{};
  float largest_ = 0.0f;
  float largest_logit_ = 0.0f;
  bool is_infinite_ = false;  // the row has +inf logits, and is uniform over them
  double entropy_ = 0.0;

  int32_t num_blocks_ = 0;
  int32_t num_candidates_ = 0;
  float least_ = 0.0f;         // no candidate has a lower score
  Scratch<float> block_max_;   // [blocks], of biased logits; then NaN
  Scratch<int32_t> blocks_;    // that may hold candidates
  Scratch<float> candidates_;  // scores, in token order; then -inf
  Scratch<int32_t> tokens_;    // of the candidates
  Scratch<double> weights_;    // of the candidates
};

}  // namespace specdec::SPECDEC_ISA
