// Decides requests by the rules of `verify` that test drafts with coins:
// specdec_kernels/acceptance.py, for one request.
#pragma once

#include <cstdint>
#include <memory>

#include "../core/verify.hpp"
#include "draft_law.hpp"
#include "sampling.hpp"

namespace specdec::SPECDEC_ISA {

// The tree of one request; padding is not read.
class TreeView {
 public:
  TreeView(const VerifyParams& params, int64_t b);

  int32_t size() const { return size_; }
  int64_t token(int32_t node) const { return tokens_[node * stride_tokens_]; }

  // The first child of `node` after node `previous`, or -1.
  int32_t next_child(int32_t node, int32_t previous) const;

  // The first child of `node` that holds `token`, or -1.
  int32_t find_child(int32_t node, int64_t token) const;

 private:
  const int64_t* tokens_;
  const int32_t* parents_;
  int64_t stride_tokens_, stride_parents_;
  int32_t size_;
};

struct Decision {
  int32_t depth = 0;  // accepted draft tokens
  int64_t next_token = 0;
  int32_t status = kOk;
};

class Acceptor {
 public:
  // Writes the path of request `b`, and thresholds and next law if asked. Rows of the target are
  // filtered when a node is opened, each by all threads if `is_shared`.
  Decision decide(const VerifyParams& params, int64_t b, RowSampler& sampler, bool is_shared);

 private:
  // A node whose children are tested one after another.
  struct Node {
    KeptLaw p;  // what is left of the target law
    DraftLaw q;
    double reach;  // probability with which the rule would keep the node
    int32_t node;
    int32_t child;  // the last one tested; the node itself before the first
    bool has_draft_law;
    bool is_touched;  // a child was rejected
  };

  struct Weight {
    double kept, drawn;
  };

  bool top_down();
  bool bottom_up();
  bool typical();
  bool open(Node& at, int32_t node, double reach);
  int32_t set_path(int32_t node, const int32_t* above);
  bool weigh(Node& at, int32_t child, Weight& weight);
  void reject(Node& at, int32_t child);
  void draw_next(Node& at);
  bool is_drawn_already(int32_t node, int32_t child) const;
  void forget_tried(Node& at);
  void set_threshold(int32_t node, double threshold);
  double coin(int32_t node) const;
  int8_t kind(int32_t node) const;
  bool is_distinct(int32_t node) const { return kind(node) == kSampledWithoutReplacement; }
  int32_t* path() const { return params_->path + b_ * params_->nodes; }

  const VerifyParams* params_ = nullptr;
  const TreeView* tree_ = nullptr;
  RowSampler* sampler_ = nullptr;
  int64_t b_ = 0;
  bool is_shared_ = false;
  Decision decision_;
  std::unique_ptr<Node[]> stack_;
  int32_t capacity_ = 0;
  Scratch<double> logprobs_;  // of the path to each node; NaN if not typical
  Scratch<int32_t> above_;    // the parent of each typical node
};

}  // namespace specdec::SPECDEC_ISA
