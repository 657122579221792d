// One thread owns a request. Bytes moved: the logits of visited rows once, and of a draft law what
// the target's filters kept. Delicate: masses are summed in double over kept tokens only, so a
// threshold differs from the reference's by rounding alone.
#include "acceptance.hpp"

#include <cmath>

#include "../core/philox.hpp"

namespace specdec::SPECDEC_ISA {

TreeView::TreeView(const VerifyParams& params, int64_t b)
    : tokens_(params.tokens + b * params.stride_tokens_b),
      parents_(params.parents + b * params.stride_parents_b),
      stride_tokens_(params.stride_tokens_n),
      stride_parents_(params.stride_parents_n),
      size_(params.num_nodes[b] < params.nodes ? params.num_nodes[b] : params.nodes) {}

int32_t TreeView::next_child(int32_t node, int32_t previous) const {
  for (int32_t i = previous + 1; i < size_; ++i) {
    if (parents_[i * stride_parents_] == node) return i;
  }
  return -1;
}

int32_t TreeView::find_child(int32_t node, int64_t wanted) const {
  for (int32_t i = next_child(node, node); i >= 0; i = next_child(node, i)) {
    if (token(i) == wanted) return i;
  }
  return -1;
}

Decision Acceptor::decide(const VerifyParams& params, int64_t b, RowSampler& sampler,
                          bool is_shared) {
  const TreeView tree(params, b);
  params_ = &params;
  tree_ = &tree;
  sampler_ = &sampler;
  b_ = b;
  is_shared_ = is_shared;
  decision_ = {};
  if (capacity_ < params.nodes) {
    stack_ = std::make_unique<Node[]>(static_cast<size_t>(params.nodes));
    capacity_ = params.nodes;
  }
  path()[0] = 0;
  if (params.rule == Rule::kToken) {
    top_down();
  } else if (params.rule == Rule::kTypical) {
    typical();
  } else {
    bottom_up();
  }
  return decision_;
}

bool Acceptor::top_down() {
  Node& at = stack_[0];
  if (!open(at, 0, 1.0)) return false;
  for (int32_t child; (child = tree_->next_child(at.node, at.child)) >= 0;) {
    Weight weight;
    if (!weigh(at, child, weight)) return false;
    const double threshold = keep_probability(weight.kept, weight.drawn);
    set_threshold(child, threshold);
    if (coin(child) < threshold) {
      path()[++decision_.depth] = child;
      if (!open(at, child, 1.0)) return false;
    } else {
      reject(at, child);
    }
  }
  draw_next(at);
  return true;
}

// The leaf that comes first in depth-first order is tested; rejected, it leaves the tree.
bool Acceptor::bottom_up() {
  int32_t depth = 0;
  if (!open(stack_[0], 0, 1.0)) return false;
  while (true) {
    Node& at = stack_[depth];
    const int32_t child = tree_->next_child(at.node, at.child);
    if (child >= 0) {
      Weight weight;
      if (!weigh(at, child, weight)) return false;
      if (weight.kept > 0.0) {
        const double reach = keep_probability(weight.kept, weight.drawn);
        if (!open(stack_[++depth], child, reach)) return false;
      } else {  // nothing below can be kept
        set_threshold(child, 0.0);
        reject(at, child);
      }
      continue;
    }
    if (depth > 0) {
      set_threshold(at.node, at.reach);
      if (!(coin(at.node) < at.reach)) {
        reject(stack_[--depth], at.node);
        continue;
      }
    }
    for (int32_t i = 1; i <= depth; ++i) path()[i] = stack_[i].node;
    decision_.depth = depth;
    draw_next(at);
    return true;
  }
}

// The deepest node all of whose path is typical; among equals the likeliest path.
bool Acceptor::typical() {
  double* logprobs = logprobs_.reserve(params_->nodes);
  int32_t* above = above_.reserve(params_->nodes);
  for (int32_t i = 0; i < tree_->size(); ++i) logprobs[i] = i == 0 ? 0.0 : NAN;
  Node& at = stack_[0];
  int32_t best = 0, best_depth = 0;
  for (int32_t node = 0; node < tree_->size(); ++node) {
    int32_t child = tree_->next_child(node, node);
    if (std::isnan(logprobs[node]) || child < 0) continue;
    const int32_t depth = set_path(node, above) + 1;
    if (!open(at, node, 1.0)) return false;
    const double floor = std::fmin(params_->typical_epsilon,
                                   params_->typical_delta * std::exp(-sampler_->entropy()));
    for (; child >= 0; child = tree_->next_child(node, child)) {
      const double chance = at.p.at(tree_->token(child));
      if (!(chance > floor)) continue;
      above[child] = node;
      logprobs[child] = logprobs[node] + std::log(chance);
      if (depth > best_depth || (depth == best_depth && logprobs[child] > logprobs[best])) {
        best = child;
        best_depth = depth;
      }
    }
  }
  set_path(best, above);
  if (!open(at, best, 1.0)) return false;
  draw_next(at);
  return true;
}

// Makes the path the one to `node`. Returns its depth.
int32_t Acceptor::set_path(int32_t node, const int32_t* above) {
  int32_t depth = 0;
  for (int32_t i = node; i > 0; i = above[i]) ++depth;
  for (int32_t i = depth + 1; i < params_->nodes; ++i) path()[i] = -1;
  for (int32_t i = node, place = depth; i > 0; i = above[i]) path()[place--] = i;
  decision_.depth = depth;
  return depth;
}

bool Acceptor::open(Node& at, int32_t node, double reach) {
  at.node = at.child = node;
  at.reach = reach;
  at.has_draft_law = at.is_touched = false;
  sampler_->keep(row_logits(params_->sampling, b_, node), row_law(params_->sampling, b_, 0),
                 is_shared_, at.p);
  if (at.p.num() > 0) return true;
  decision_.status = kNoFiniteLogit;
  return false;
}

// The target mass and the draft mass of a child; false if it has no draft mass.
bool Acceptor::weigh(Node& at, int32_t child, Weight& weight) {
  const int64_t token = tree_->token(child);
  weight = {at.reach * at.p.at(token), 1.0};
  if (kind(child) == kOneHot) return true;
  if (!at.has_draft_law) at.q.open(params_->draft, b_, params_->nodes, at.node);
  at.has_draft_law = true;
  const bool is_token = token >= 0 && token < params_->sampling.vocab;
  const bool is_possible = is_token && !is_drawn_already(at.node, child);
  weight.drawn = is_possible ? at.q.at(token, is_distinct(child)) : 0.0;
  if (weight.drawn > 0.0) return true;
  decision_.status = kNoSuchDraw;
  return false;
}

// Takes out of the target law what this child would have covered.
void Acceptor::reject(Node& at, int32_t child) {
  const int64_t token = tree_->token(child);
  at.child = child;
  at.is_touched = true;
  if (token < 0 || token >= params_->sampling.vocab) return;
  const bool is_one_hot = kind(child) == kOneHot;
  double* p = at.p.probs();
  const int32_t* tokens = at.p.tokens();
  double mass = 0.0;
  for (int32_t i = 0; i < at.p.num(); ++i) {
    const double drawn = is_one_hot ? 0.0 : at.q.at(tokens[i], is_distinct(child));
    const double left = at.reach * p[i] - drawn;
    p[i] = left > 0.0 && tokens[i] != token ? left : 0.0;
    mass += p[i];
  }
  at.reach = next_reach(mass, at.reach);
  if (mass > 0.0) {
    at.p.scale(1.0 / mass);
  } else {
    forget_tried(at);
  }
  if (is_distinct(child)) at.q.take_out(token);
}

// Where rounding left nothing: the target law without the tokens tried, else all of it.
void Acceptor::forget_tried(Node& at) {
  const RowLogits row = row_logits(params_->sampling, b_, at.node);
  const RowLaw law = row_law(params_->sampling, b_, 0);
  sampler_->keep(row, law, is_shared_, at.p);
  for (int32_t i = tree_->next_child(at.node, at.node); i >= 0 && i <= at.child;
       i = tree_->next_child(at.node, i)) {
    at.p.forget(tree_->token(i));
  }
  const double left = at.p.mass();
  if (left > 0.0) {
    at.p.scale(1.0 / left);
  } else {
    sampler_->keep(row, law, is_shared_, at.p);
  }
}

void Acceptor::draw_next(Node& at) {
  double drawn;
  if (params_->coins != nullptr) {
    drawn = coin(0);
  } else {
    const RowLaw law = row_law(params_->sampling, b_, decision_.depth + 1);
    drawn = uniform(law.seed, law.position, 0, at.is_touched ? Domain::kResidual : Domain::kTarget);
  }
  decision_.next_token = at.p.draw(drawn);
  if (params_->next_law != nullptr) {
    at.p.spread(params_->next_law + b_ * params_->sampling.vocab);
  }
}

// Whether a child drawn without replacement has an earlier sibling of its kind with the same token.
bool Acceptor::is_drawn_already(int32_t node, int32_t child) const {
  if (!is_distinct(child)) return false;
  for (int32_t i = tree_->next_child(node, node); i < child; i = tree_->next_child(node, i)) {
    if (is_distinct(i) && tree_->token(i) == tree_->token(child)) {
      return true;
    }
  }
  return false;
}

void Acceptor::set_threshold(int32_t node, double threshold) {
  if (params_->thresholds != nullptr) params_->thresholds[b_ * params_->nodes + node] = threshold;
}

double Acceptor::coin(int32_t node) const {
  if (params_->coins != nullptr) return params_->coins[b_ * params_->nodes + node];
  const RowLaw law = row_law(params_->sampling, b_, 0);
  return uniform(law.seed, law.position, static_cast<uint32_t>(node), Domain::kAccept);
}

int8_t Acceptor::kind(int32_t node) const {
  const int8_t* kinds = params_->draft.kinds;
  return kinds == nullptr ? int8_t{kOneHot} : kinds[b_ * params_->nodes + node];
}

}  // namespace specdec::SPECDEC_ISA
