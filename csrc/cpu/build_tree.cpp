// Grows the best tree of N nodes, best first. A heap holds each node that has an open child, by the
// best of these; so it is as wide as the tree, not as the tree times the candidates. A step takes
// its top, hangs that child in the tree unless a sibling has its token, and looks over two rows of
// candidates: for the parent's next child, and for the first child of the new node.
//
// Costs, which are path scores negated, are double sums of float losses, as the reference's; ties
// go to the smaller (depth, candidate, parent).
#include "../core/build_tree.hpp"

#include <limits>

#include "parallel.hpp"
#include "scratch.hpp"

namespace specdec::SPECDEC_ISA {
namespace {

constexpr double kInfinite = std::numeric_limits<double>::infinity();
constexpr int32_t kNone = -1;
constexpr int64_t kPad = -1;

struct Child {
  double cost;  // infinite: there is none
  int32_t candidate;
};

struct Node {
  int64_t token;
  double cost;     // of its path
  Child open;      // its best open child
  int32_t parent;  // node
  int32_t own;     // candidate that became the node; kNone where every node has the same children
  int32_t depth;   // of its children
  int32_t newest_child, older_sibling;  // nodes
};

// Of two nodes, the one whose open child comes first.
inline __attribute__((always_inline)) bool is_before(const Node* nodes, int32_t a, int32_t b) {
  const Node &first = nodes[a], &second = nodes[b];
  if (first.open.cost != second.open.cost) return first.open.cost < second.open.cost;
  if (first.depth != second.depth) return first.depth < second.depth;
  if (first.open.candidate != second.open.candidate)
    return first.open.candidate < second.open.candidate;
  return a < b;
}

// One request.
class Growth {
 public:
  Growth(const BuildTreeParams& params, int64_t b, Node* nodes, int32_t* heap, float* losses)
      : params_(params),
        candidates_(params.candidates + b * params.stride_candidates_b),
        parents_(params.candidate_parents == nullptr
                     ? nullptr
                     : params.candidate_parents + b * params.stride_parents_b),
        nodes_(nodes),
        heap_(heap),
        losses_(losses) {
    const float* logprobs = params.logprobs + b * params.stride_logprobs_b;
    for (int32_t t = 0; t < params.depths; ++t) {
      for (int32_t k = 0; k < params.width; ++k) {
        const float logprob = logprobs[t * params.stride_logprobs_t + k * params.stride_logprobs_k];
        const bool is_absent = token(t, k) == kPad || logprob != logprob;
        losses[int64_t{t} * params.width + k] = is_absent        ? static_cast<float>(kInfinite)
                                                : logprob > 0.0f ? 0.0f
                                                                 : -logprob;
      }
    }
  }

  // Number of nodes.
  int32_t grow(int64_t root, int32_t budget) {
    if (budget < 1) return 0;
    int32_t size = 0;
    add(size++, root, kNone, {0.0, kNone}, 0);
    while (heap_size_ > 0 && size < budget) {
      const int32_t top = heap_[0];
      Node& node = nodes_[top];
      const Child taken = node.open;
      const int64_t taken_token = token(node.depth, taken.candidate);
      node.open = best_child(node, taken);
      if (node.open.cost == kInfinite) heap_[0] = heap_[--heap_size_];
      sink();
      if (!has_child(node, taken_token)) add(size++, taken_token, top, taken, node.depth + 1);
    }
    return size;
  }

 private:
  int64_t token(int32_t t, int32_t k) const {
    return candidates_[t * params_.stride_candidates_t + k * params_.stride_candidates_k];
  }

  bool has_child(const Node& node, int64_t token) const {
    for (int32_t child = node.newest_child; child != kNone; child = nodes_[child].older_sibling) {
      if (nodes_[child].token == token) return true;
    }
    return false;
  }

  // The cheapest, the lower candidate of equals, among the children after `after`.
  Child best_child(const Node& node, const Child& after) const {
    Child best{kInfinite, kNone};
    if (node.depth == params_.depths) return best;
    const float* losses = losses_ + int64_t{node.depth} * params_.width;
    for (int32_t k = 0; k < params_.width; ++k) {
      const double cost = node.cost + static_cast<double>(losses[k]);
      const bool is_open = cost > after.cost || (cost == after.cost && k > after.candidate);
      if (!is_open || cost >= best.cost) continue;
      if (node.own != kNone &&
          parents_[node.depth * params_.stride_parents_t + k * params_.stride_parents_k] !=
              node.own) {
        continue;
      }
      best = {cost, k};
    }
    return best;
  }

  void add(int32_t i, int64_t token, int32_t parent, const Child& taken, int32_t depth) {
    Node& node = nodes_[i];
    node = {.token = token,
            .cost = taken.cost,
            .open = {kInfinite, kNone},
            .parent = parent,
            .own = parents_ == nullptr ? kNone : taken.candidate,
            .depth = depth,
            .newest_child = kNone,
            .older_sibling = kNone};
    if (parent != kNone) {
      node.older_sibling = nodes_[parent].newest_child;
      nodes_[parent].newest_child = i;
    }
    node.open = best_child(node, {-1.0, kNone});
    if (node.open.cost < kInfinite) rise(i);
  }

  void rise(int32_t node) {
    int32_t i = heap_size_++;
    for (; i > 0 && is_before(nodes_, node, heap_[(i - 1) / 2]); i = (i - 1) / 2) {
      heap_[i] = heap_[(i - 1) / 2];
    }
    heap_[i] = node;
  }

  // Puts the first in its place.
  void sink() {
    if (heap_size_ == 0) return;
    const int32_t node = heap_[0];
    int32_t i = 0;
    for (int32_t child = 1; child < heap_size_; child = 2 * i + 1) {
      if (child + 1 < heap_size_ && is_before(nodes_, heap_[child + 1], heap_[child])) ++child;
      if (!is_before(nodes_, heap_[child], node)) break;
      heap_[i] = heap_[child];
      i = child;
    }
    heap_[i] = node;
  }

  const BuildTreeParams& params_;
  const int64_t* candidates_;
  const int32_t* parents_;
  Node* nodes_;
  int32_t* heap_;
  int32_t heap_size_ = 0;
  float* losses_;
};

struct Buffers {
  Scratch<Node> nodes;
  Scratch<int32_t> heap;
  Scratch<float> losses;
};

void build_row(const BuildTreeParams& params, int64_t b, Buffers& buffers) {
  const int32_t wanted = params.budgets[b * params.stride_budgets];
  const int32_t budget = wanted < 0 ? 0 : wanted < params.max_nodes ? wanted : params.max_nodes;
  const Node* nodes = buffers.nodes.reserve(params.max_nodes);
  Growth growth(params, b, buffers.nodes.get(), buffers.heap.reserve(params.max_nodes),
                buffers.losses.reserve(int64_t{params.depths} * params.width));
  const int32_t size = growth.grow(params.roots[b * params.stride_roots], budget);
  const int64_t first = b * params.max_nodes;
  for (int32_t i = 0; i < params.max_nodes; ++i) {
    const bool is_node = i < size;
    params.tokens[first + i] = is_node ? nodes[i].token : 0;
    params.parents[first + i] = is_node ? nodes[i].parent : kNone;
    params.scores[first + i] = static_cast<float>(is_node ? 0.0 - nodes[i].cost : -kInfinite);
  }
  params.num_nodes[b] = size;
}

}  // namespace

void build_tree(const BuildTreeParams& params) {
  const int64_t looked_at = int64_t{params.max_nodes} * (params.width + 8);
  parallel_for(params.batch, rows_per_thread(looked_at), [&](int64_t begin, int64_t end) {
    thread_local Buffers buffers;
    for (int64_t b = begin; b < end; ++b) build_row(params, b, buffers);
  });
}

}  // namespace specdec::SPECDEC_ISA
