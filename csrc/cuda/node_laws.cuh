// What a node's law is, and what its rejected children left of it: records, not rows. A node's
// record holds its target law (largest score, edge, sum) and, as numbers, what each of its rejected
// children did to it; what is left of a tile's masses is computed again from logits and draft
// masses.
//
// Every thread of a group reads the records; the first of each block writes its block's own copy,
// between barriers. Masses are double and uncontracted. Where rounding left none, the record says
// which law the node falls back to.
#pragma once

#include "../core/acceptance.hpp"
#include "../core/verify.hpp"
#include "row_law.cuh"

namespace specdec::cuda {

enum Fallback : int32_t { kNone, kToRest, kToAll };  // the law without the tokens tried; all of it

struct NodeRecord {
  double total;  // sum of the weights of its law; 0 where nothing asked for it
  double reach;  // probability with which the rule would keep it
  double draft_largest,
      draft_scale;              // of its draft law: exp(logit - largest) * scale; scale 0 before
  double share;                 // 1 over the draft mass that children without replacement left
  double prior, factor, taken;  // its own rejection: p <- factor max(0, prior p - taken q)
  double logprob;               // of its path, for rule `typical`; NaN if not typical
  float largest, edge;
  int32_t is_infinite, is_touched;
  int32_t tested;             // child tested last; the node itself before
  int32_t first, last, next;  // rejected children; the next sibling of this one
  int32_t fallback, depth;
};

// The tree of one request; padding is not read. What searches it is called by whole warps.
struct TreeView {
  const int64_t* tokens;
  const int32_t* parents;
  int64_t stride_tokens, stride_parents;
  int32_t size;

  __device__ TreeView(const VerifyParams& params, int64_t b)
      : tokens(params.tokens + b * params.stride_tokens_b),
        parents(params.parents + b * params.stride_parents_b),
        stride_tokens(params.stride_tokens_n),
        stride_parents(params.stride_parents_n),
        size(min(params.num_nodes[b], params.nodes)) {}

  __device__ int64_t token(int32_t node) const { return tokens[node * stride_tokens]; }
  __device__ int32_t parent(int32_t node) const { return parents[node * stride_parents]; }

  // The first child of `node` after node `previous`, or -1; the first with that token, if not null.
  __device__ int32_t next_child(int32_t node, int32_t previous, const int64_t* wanted) const {
    for (int32_t first = previous + 1; first < size; first += kWarpSize) {
      const int32_t i = first + this_lane();
      bool is_child = i < size && parent(i) == node;
      if (is_child && wanted != nullptr) is_child = token(i) == *wanted;
      const unsigned found = __ballot_sync(~0u, is_child);
      if (found != 0) return first + __ffs(static_cast<int>(found)) - 1;
    }
    return -1;
  }

  // Ancestors of a node that a rule has reached: its parents come before it.
  __device__ int32_t depth(int32_t node) const {
    int32_t depth = 0;
    for (; node > 0; node = parent(node)) ++depth;
    return depth;
  }
};

// The laws that sampled nodes of one request were drawn from.
struct Draft {
  DraftParams params;
  int64_t b, first_node;

  __device__ int32_t kind(int32_t node) const {
    return params.kinds == nullptr ? int32_t{kOneHot} : params.kinds[first_node + node];
  }

  // That of a node's sampled children, or null.
  __device__ const float* law(int32_t node) const {
    if (params.laws == nullptr) return nullptr;
    const int32_t row = params.rows[first_node + node];
    if (row < 0 || row >= params.num_laws) return nullptr;
    return params.laws + b * params.stride_laws_b + row * params.stride_laws_q;
  }

  // Of a target token, or -1.
  __device__ int32_t id(int64_t token) const {
    const int64_t id = params.draft_ids == nullptr ? token : params.draft_ids[token];
    return id < params.draft_vocab ? static_cast<int32_t>(id) : -1;
  }

  // NaN, infinite or negative probabilities count as 0; logits are read as in `sample`.
  __device__ double id_mass(const float* law, double largest, double scale, int32_t id) const {
    const double value = static_cast<double>(load_global(law + id * params.stride_laws_u));
    if (!params.is_logits)
      return value > 0.0 && value < static_cast<double>(INFINITY) ? value : 0.0;
    if (largest == static_cast<double>(INFINITY)) return value == largest ? scale : 0.0;
    return value > -static_cast<double>(INFINITY) ? exp_of(value - largest) * scale : 0.0;
  }
};

// What the rejected children of a node left of its law.
template <class T>
struct NodeLaw {
  static constexpr int kVector = LogitRow<T>::kVector;

  RowLaw<T> law;
  const TreeView& tree;
  const Draft& draft;
  const NodeRecord* records;
  const float* draft_law;  // or null
  double draft_largest, draft_scale;
  int32_t child;  // the first one rejected, or -1

  __device__ NodeLaw(const Scores<T>& scores, const TreeView& tree, const Draft& draft,
                     const NodeRecord* records, int32_t node)
      : law{scores, records[node].edge, 1.0 / records[node].total},
        tree(tree),
        draft(draft),
        records(records),
        draft_law(draft.law(node)),
        draft_largest(records[node].draft_largest),
        draft_scale(records[node].draft_scale),
        child(records[node].first) {}

  __device__ bool has_mass(int32_t tile) const { return law.has_mass(tile); }

  __device__ void load(int32_t first, double (&masses)[kVector]) const {
    law.load(first, masses);
    if (child >= 0) leave(first, masses);
  }

  // Target masses of the tokens from `first` on to what is left of them.
  template <int kNum>
  __device__ void leave(int32_t first, double (&masses)[kNum]) const {
    double drafted[kNum], whole[kNum];
    uint32_t tried = 0, distinct = 0;  // bits; the latter drawn without replacement
#pragma unroll
    for (int i = 0; i < kNum; ++i) {
      whole[i] = masses[i];
      drafted[i] = 0.0;
      if (draft_law == nullptr || !(draft_scale > 0.0) || !(masses[i] > 0.0)) continue;
      const int32_t id = draft.id(first + i);
      if (id >= 0) drafted[i] = draft.id_mass(draft_law, draft_largest, draft_scale, id);
    }
    for (int32_t node = child; node >= 0; node = records[node].next) {
      const NodeRecord& record = records[node];
      const int64_t token = tree.token(node);
      const bool is_distinct = record.taken < 0.0;
      const double taken = fabs(record.taken), prior = record.prior, factor = record.factor;
      const int32_t fallback = record.fallback;
#pragma unroll
      for (int i = 0; i < kNum; ++i) {
        const bool is_here = first + i == token;
        const bool was_taken = is_distinct && (distinct >> i & 1) != 0;
        const double drawn = was_taken ? 0.0 : drafted[i] * taken;
        double left = is_here ? 0.0 : fmax(prior * masses[i] - drawn, 0.0);
        tried |= static_cast<uint32_t>(is_here) << i;
        distinct |= static_cast<uint32_t>(is_here && is_distinct) << i;
        if (fallback != kNone) left = fallback == kToRest && (tried >> i & 1) != 0 ? 0.0 : whole[i];
        masses[i] = left * factor;
      }
    }
  }
};

// The sum of a number of each draft id, tile by tile as in `measure`.
template <class Mass>
__device__ double sum_ids(Group& group, int32_t draft_vocab, double* tile_masses, Mass mass_of) {
  const int32_t tiles = (draft_vocab + kTile - 1) / kTile;
  group.sync();  // all have read what is overwritten
  for (int32_t tile = group.first_tile(); tile < tiles; tile += group.tile_step()) {
    const int32_t end = min((tile + 1) * kTile, draft_vocab);
    double mass = 0.0;
    for (int32_t id = tile * kTile + this_lane(); id < end; id += kWarpSize) mass += mass_of(id);
    mass = warp_sum(mass);
    if (this_lane() == 0) store_global(tile_masses + tile, mass);
  }
  return sum_tiles(group, tile_masses, tiles);
}

// Notes how the draft law of a node becomes masses, once.
__device__ inline void open_draft_law(Group& group, const Draft& draft, const float* law,
                                      NodeRecord& record, double* tile_masses) {
  if (record.draft_scale != 0.0) return;
  double largest = 0.0, scale = 1.0;
  if (draft.params.is_logits) {
    RankKey key = kNoKey;
    for (int32_t id = group.rank() * kGroupThreads + group.thread(); id < draft.params.draft_vocab;
         id += group.size() * kGroupThreads) {
      key = max(key, rank_key(ranked_score(load_global(law + id * draft.params.stride_laws_u)), 0));
    }
    key = group.largest(key);
    largest = static_cast<double>(key == kNoKey ? -INFINITY : score_of(key));
    const double total = sum_ids(group, draft.params.draft_vocab, tile_masses,
                                 [&](int32_t id) { return draft.id_mass(law, largest, 1.0, id); });
    scale = 1.0 / fmax(total, 1e-300);
  }
  __syncthreads();
  if (group.is_leader()) {
    record.draft_largest = largest;
    record.draft_scale = scale;
  }
  __syncthreads();
}

// Whether a rejected child drawn without replacement, from `child` on, had that draft id.
__device__ inline bool is_id_taken(const TreeView& tree, const Draft& draft,
                                   const NodeRecord* records, int32_t child, int32_t id) {
  bool is_taken = false;
  for (; child >= 0; child = records[child].next) {
    is_taken |= records[child].taken < 0.0 && draft.id(tree.token(child)) == id;
  }
  return is_taken;
}

// 1 over the mass of a draft law that its children without replacement have not taken.
template <class T>
__device__ double free_share(Group& group, const NodeLaw<T>& law, double* tile_masses) {
  const double mass = sum_ids(group, law.draft.params.draft_vocab, tile_masses, [&](int32_t id) {
    const bool is_taken = is_id_taken(law.tree, law.draft, law.records, law.child, id);
    return is_taken ? 0.0
                    : law.draft.id_mass(law.draft_law, law.draft_largest, law.draft_scale, id);
  });
  return mass > 0.0 ? 1.0 / mass : 0.0;
}

}  // namespace specdec::cuda
