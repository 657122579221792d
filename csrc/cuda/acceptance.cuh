// The acceptance rules of `verify`, for one request by its group: specdec_kernels/acceptance.py.
// All threads take every decision alike, from numbers that the group has agreed on.
//
// Bytes moved: for each node opened its row, see row_law.cuh; for each rejection the tiles that the
// filters kept, with their draft masses, and a few numbers.
#pragma once

#include "node_laws.cuh"
#include "row_draws.cuh"

namespace specdec::cuda {

struct DecideParams {
  VerifyParams call;
  Summaries summaries;            // of [B, N] rows
  uint64_t* exchange;             // [B, kExchangeBytes / 8]
  double* tile_masses;            // [B, mass_tiles]
  NodeRecord* records;            // [B, blocks of a group, N]
  int32_t* draft_ids;             // [V], made from offsets, or null
  int32_t row_tiles, mass_tiles;  // of a row of logits; of that or a draft law
  int32_t blocks;                 // of a group
  bool is_summarized;
  bool wants_totals;  // of the laws of sampled requests
};

struct Outcome {
  int32_t status, node;  // the last one kept
};

struct Weight {
  double kept, drawn;
};

template <class T>
struct Request {
  const DecideParams& params;
  Group& group;
  int64_t b;
  RowFilters filters;
  TreeView tree;
  Draft draft;
  NodeRecord* records;

  __device__ Request(const DecideParams& params, Group& group, int64_t b)
      : params(params),
        group(group),
        b(b),
        filters(params.call.sampling, b),
        tree(params.call, b),
        draft{params.call.draft, b, b * params.call.nodes},
        records(params.records + (b * params.blocks + group.rank()) * params.call.nodes) {}

  __device__ Summaries summaries(int32_t node) const {
    return params.summaries.row(b * params.call.nodes + node, params.row_tiles);
  }

  __device__ double* tile_masses() const { return params.tile_masses + b * params.mass_tiles; }

  // The scores of a node that was opened.
  __device__ Scores<T> scores(int32_t node) const {
    return {LogitRow<T>(params.call.sampling, b, node), summaries(node), records[node].largest,
            records[node].is_infinite != 0};
  }

  __device__ NodeLaw<T> law(int32_t node) const {
    return NodeLaw<T>(scores(node), tree, draft, records, node);
  }

  // The first thread of each block writes, after all have read and before any reads again.
  template <class Write>
  __device__ void note(Write write) const {
    __syncthreads();
    if (group.is_leader()) write();
    __syncthreads();
  }

  // Filters the row of a node and begins its record. False if no token is left. A greedy request
  // has no filters: with kIsGreedy, the code for them is left out.
  template <bool kIsGreedy>
  __device__ bool open(int32_t node, double reach) const {
    const LogitRow<T> row(params.call.sampling, b, node);
    const bool wants_total = !kIsGreedy && params.wants_totals && filters.is_sampled();
    if (!params.is_summarized) {
      const bool wants_mass =
          !kIsGreedy && filters.is_sampled() && (wants_total || filters.top_p < 1.0f);
      summarize_row(group, row, wants_mass, summaries(node));
    }
    const Scores<T> scores = open_row(group, row, summaries(node));
    float edge = kLowest;
    double total = 0.0;
    if constexpr (!kIsGreedy) {
      if (!scores.is_empty()) {
        edge = find_edge(group, scores, filters, wants_total, tile_masses(), total);
      }
    }
    note([&] {
      NodeRecord& record = records[node];
      record.total = total;
      record.reach = reach;
      record.draft_largest = record.draft_scale = 0.0;
      record.share = 1.0;
      record.largest = scores.largest;
      record.edge = edge;
      record.is_infinite = scores.is_infinite;
      record.is_touched = 0;
      record.tested = node;
      record.first = record.last = -1;
    });
    return !scores.is_empty() && edge <= scores.largest;
  }

  // Where a token's logit lies in the law of an opened node, as a mass.
  __device__ double mass(int32_t node, int64_t token) const {
    if (token < 0 || token >= params.call.sampling.vocab) return 0.0;
    const Scores<T> scores = this->scores(node);
    const float value = scores.score(scores.row.at(static_cast<int32_t>(token)));
    return value >= records[node].edge ? scores.weight(value) * (1.0 / records[node].total) : 0.0;
  }

  // (a p(x), q(x)) of a child; q(x) is 0 where the child cannot have been drawn.
  __device__ Weight weigh(int32_t node, int32_t child) const {
    const int64_t token = tree.token(child);
    const bool is_token = token >= 0 && token < params.call.sampling.vocab;
    const int32_t kind = draft.kind(child);
    double drawn = 1.0;
    if (kind != kOneHot) {
      const float* law = draft.law(node);
      drawn = 0.0;
      if (law != nullptr) {
        open_draft_law(group, draft, law, records[node], tile_masses());
        const NodeRecord& record = records[node];
        const int32_t id = is_token ? draft.id(token) : -1;
        if (id >= 0) drawn = draft.id_mass(law, record.draft_largest, record.draft_scale, id);
        if (kind == kSampledWithoutReplacement) {
          drawn *= record.share;
          if (is_id_taken(tree, draft, records, record.first, id)) drawn = 0.0;
        } else if (kind != kSampled) {
          drawn = 0.0;
        }
      }
    }
    double left[1] = {mass(node, token)};
    const NodeLaw<T> law = this->law(node);
    if (law.child >= 0 && is_token) law.leave(static_cast<int32_t>(token), left);
    return {records[node].reach * left[0], drawn};
  }

  // Takes out of a node's law what this child would have covered.
  __device__ void reject(int32_t node, int32_t child) const {
    const int64_t token = tree.token(child);
    const bool is_token = token >= 0 && token < params.call.sampling.vocab;
    const int32_t kind = draft.kind(child);
    const double reach = records[node].reach;
    double taken = kind == kSampled ? 1.0 : 0.0;
    if (kind == kSampledWithoutReplacement) taken = -records[node].share;
    note([&] {
      NodeRecord& record = records[node];
      record.is_touched = 1;
      record.tested = child;
      if (!is_token) return;  // a guess outside the vocabulary covers nothing
      NodeRecord& own = records[child];
      own.prior = reach;
      own.factor = 1.0;
      own.taken = taken;
      own.fallback = kNone;
      own.next = -1;
      (record.last < 0 ? record.first : records[record.last].next) = child;
      record.last = child;
    });
    if (!is_token) return;
    const NodeLaw<T> law = this->law(node);
    double mass = 0.0, left = 0.0;
    int32_t fallback = kNone;
#pragma unroll 1
    for (;; ++fallback) {  // rounding left nothing: the target law without the tokens tried, or all
      mass = measure(group, law.law.scores.row, law, tile_masses());
      if (fallback == kNone) left = mass;
      if (mass > 0.0 || fallback == kToAll) break;
      note([&] { records[child].fallback = fallback + 1; });
    }
    const double share = taken < 0.0 ? free_share(group, law, tile_masses()) : records[node].share;
    note([&] {
      records[node].reach = next_reach(left, reach);
      records[node].share = share;
      records[child].factor = fallback == kToAll ? 1.0 : 1.0 / mass;
    });
  }

  __device__ double coin(int32_t node) const {
    if (params.call.coins != nullptr) return params.call.coins[b * params.call.nodes + node];
    const SamplingParams& sampling = params.call.sampling;
    return uniform(sampling.seeds[b], sampling.positions[b], static_cast<uint32_t>(node),
                   Domain::kAccept);
  }

  // The token after `node`, from what its rejected children left of its law.
  __device__ int32_t draw_next(int32_t node) const {
    const SamplingParams& sampling = params.call.sampling;
    double drawn;
    if (params.call.coins != nullptr) {
      drawn = coin(0);
    } else {
      const uint64_t position = static_cast<uint64_t>(sampling.positions[b]) +
                                static_cast<uint64_t>(tree.depth(node)) + 1;
      drawn = uniform(sampling.seeds[b], static_cast<int64_t>(position), 0,
                      records[node].is_touched != 0 ? Domain::kResidual : Domain::kTarget);
    }
    const NodeLaw<T> law = this->law(node);
    return draw_by_coin(group, law.law.scores.row, law, drawn, tile_masses());
  }
};

// `token`, top-down: children are tested where they are met. Else bottom-up: the leaf that comes
// first in depth-first order is tested; rejected, it leaves the tree.
template <class T>
__device__ Outcome try_drafts(const Request<T>& request) {
  const bool is_top_down = request.params.call.rule == Rule::kToken;
  double* thresholds = request.params.call.thresholds;
  if (thresholds != nullptr) thresholds += request.b * request.params.call.nodes;
  int32_t node = 0, status = kOk;
  double reach = 1.0;
  for (bool is_opening = true, is_rejecting = false; is_opening || is_rejecting;) {
    if (is_opening && !request.template open<false>(node, reach)) {
      status = kNoFiniteLogit;
      break;
    }
    const int32_t child = request.tree.next_child(node, request.records[node].tested, nullptr);
    const int32_t tested = child >= 0 ? child : node;
    double threshold = request.records[node].reach;
    is_opening = is_rejecting = false;
    if (child >= 0) {
      const Weight weight = request.weigh(node, child);
      if (!(weight.drawn > 0.0)) {
        status = kNoSuchDraw;
        break;
      }
      threshold = keep_probability(weight.kept, weight.drawn);
      is_opening = !is_top_down && weight.kept > 0.0;  // its own children come first
    }
    if (!is_opening && tested > 0 && (child >= 0 || !is_top_down)) {
      if (thresholds != nullptr && request.group.rank() == 0 && request.group.is_leader()) {
        thresholds[tested] = threshold;
      }
      const bool is_kept = request.coin(tested) < threshold;
      is_opening = is_top_down && is_kept;
      is_rejecting = !is_kept || (!is_top_down && child >= 0);
    }
    if (is_opening) {
      node = child;
      reach = is_top_down ? 1.0 : threshold;
    } else if (is_rejecting) {
      if (child < 0) node = request.tree.parent(tested);
      request.reject(node, tested);
    }
  }
  return {status, status == kOk || is_top_down ? node : 0};
}

// min(epsilon, delta exp(-entropy)) of an opened law.
template <class T>
__device__ double typical_floor(const Request<T>& request, int32_t node) {
  const Scores<T> scores = request.scores(node);
  const float edge = request.records[node].edge;
  const double total = request.records[node].total;
  double* moments = request.tile_masses();  // sums of w log w
  request.group.sync();                     // all have read what is overwritten
  for (int32_t tile = request.group.first_tile(); tile < scores.row.tiles();
       tile += request.group.tile_step()) {
    double moment = 0.0;
    const bool has_mass = scores.tile_largest(tile) >= edge;
#pragma unroll 1
    for (int j = 0; has_mass && j < Scores<T>::kLoads; ++j) {
      float values[Scores<T>::kVector];
      scores.load(scores.row.first_token(tile, j), edge, values);
#pragma unroll
      for (const float value : values) {
        const double weight = scores.weight(value);
        const double distance = static_cast<double>(value) - static_cast<double>(scores.largest);
        if (weight > 0.0) moment += weight * distance;
      }
    }
    moment = warp_sum(moment);
    if (this_lane() == 0) moments[tile] = moment;
  }
  const double moment = sum_tiles(request.group, moments, scores.row.tiles());
  const double entropy = log(total) - moment / total;
  return fmin(request.params.call.typical_epsilon,
              request.params.call.typical_delta * exp_of(-entropy));
}

// The deepest node all of whose path is typical; among equals the likeliest.
template <class T>
__device__ Outcome find_typical(const Request<T>& request) {
  const Group& group = request.group;
  const int32_t size = request.tree.size;
  for (int32_t i = group.thread(); i < size; i += kGroupThreads) {
    request.records[i].logprob = i == 0 ? 0.0 : static_cast<double>(NAN);
    request.records[i].depth = 0;
  }
  __syncthreads();
  int32_t best = 0, best_depth = 0;
  double best_logprob = 0.0;
#pragma unroll 1
  for (int32_t step = 0; step <= size; ++step) {  // the last step opens the best
    const int32_t node = step < size ? step : best;
    const double logprob = request.records[node].logprob;
    int32_t child = -1;
    if (step < size) {
      if (logprob == logprob) child = request.tree.next_child(node, node, nullptr);
      if (child < 0) continue;
    }
    if (!request.template open<false>(node, 1.0)) return {kNoFiniteLogit, node};
    if (step == size) break;
    const double floor = typical_floor(request, node);
    const int32_t depth = request.records[node].depth + 1;
    for (; child >= 0; child = request.tree.next_child(node, child, nullptr)) {
      const double chance = request.mass(node, request.tree.token(child));
      if (!(chance > floor)) continue;
      const double chain = logprob + log(chance);
      request.note([&] {
        request.records[child].logprob = chain;
        request.records[child].depth = depth;
      });
      if (depth > best_depth || (depth == best_depth && chain > best_logprob)) {
        best = child;
        best_depth = depth;
        best_logprob = chain;
      }
    }
  }
  return {kOk, best};
}

}  // namespace specdec::cuda
