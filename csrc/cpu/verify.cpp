// Decides each request and scores what it emits. One thread owns a request, or all share each row
// when requests are few. Bytes moved: the logits of visited rows, once.
#include "../core/verify.hpp"

#include <cmath>

#include "acceptance.hpp"
#include "parallel.hpp"
#include "sampling.hpp"

namespace specdec::SPECDEC_ISA {
namespace {

constexpr int32_t kPad = -1;

// What one thread needs to decide requests; its buffers grow and are reused.
struct Workspace {
  RowSampler sampler;
  Acceptor acceptor;
  KeptLaw kept;
};

// Draws the target's token at a node and follows it while it is a drafted child.
Decision walk(const VerifyParams& params, int64_t b, Workspace& work, bool is_shared) {
  const TreeView tree(params, b);
  int32_t* path = params.path + b * params.nodes;
  Decision decision;
  for (int32_t node = 0;; ++decision.depth) {
    path[decision.depth] = node;
    const RowLogits row = row_logits(params.sampling, b, node);
    const RowLaw law = row_law(params.sampling, b, decision.depth + 1);
    const bool is_coin = params.coins != nullptr && !law.is_greedy();
    if (is_coin || (params.next_law != nullptr && !law.is_greedy())) {
      work.sampler.keep(row, law, is_shared, work.kept);
    }
    Drawn drawn;
    if (is_coin) {
      const double coin = params.coins[b * params.nodes + node];
      drawn = {work.kept.draw(coin), work.kept.num() > 0 ? kOk : kNoFiniteLogit};
    } else {
      drawn = work.sampler.draw(row, law, is_shared);
    }
    decision.next_token = drawn.token;
    decision.status = drawn.status;
    node = drawn.status == kOk ? tree.find_child(node, drawn.token) : kPad;
    if (node != kPad) continue;
    if (params.next_law != nullptr && drawn.status == kOk) {
      double* next_law = params.next_law + b * params.sampling.vocab;
      law.is_greedy() ? void(next_law[drawn.token] = 1.0) : work.kept.spread(next_law);
    }
    return decision;
  }
}

// Log-probabilities of the emitted tokens, and the top-2 margins of the rows they come from.
void score(const VerifyParams& params, int64_t b, Workspace& work, bool is_shared) {
  const TreeView tree(params, b);
  const int32_t* path = params.path + b * params.nodes;
  RowLaw law = row_law(params.sampling, b, 0);
  const bool is_greedy = law.is_greedy();
  if (is_greedy) law = {.temperature = 1.0f};
  for (int32_t depth = 0; depth <= params.num_accepted[b]; ++depth) {
    const bool is_last = depth == params.num_accepted[b];
    const int64_t token = is_last ? params.next_tokens[b] : tree.token(path[depth + 1]);
    const RowLogits row = row_logits(params.sampling, b, path[depth]);
    const TopTwo best = work.sampler.top_two(row, is_shared);
    params.margins[b * params.nodes + depth] = best.first - best.second;
    work.sampler.keep(row, law, is_shared, work.kept);
    const bool is_defined = work.kept.num() > 0 && !(is_greedy && best.first == kInfinity);
    params.logprobs[b * params.nodes + depth] =
        is_defined ? static_cast<float>(std::log(work.kept.at(token))) : NAN;
  }
}

void verify_request(const VerifyParams& params, int64_t b, Workspace& work, bool is_shared) {
  for (int64_t i = b * params.nodes; i < (b + 1) * params.nodes; ++i) {
    params.path[i] = kPad;
    if (params.logprobs != nullptr) params.logprobs[i] = params.margins[i] = NAN;
    if (params.thresholds != nullptr) params.thresholds[i] = NAN;
  }
  if (params.next_law != nullptr) {
    double* law = params.next_law + b * params.sampling.vocab;
    for (int32_t v = 0; v < params.sampling.vocab; ++v) law[v] = 0.0;
  }
  Decision decision{0, kPad, kOk};
  const bool is_idle = TreeView(params, b).size() <= 0;
  if (!is_idle) {
    const bool is_walk = params.rule == Rule::kWalk || row_law(params.sampling, b, 0).is_greedy();
    decision = is_walk ? walk(params, b, work, is_shared)
                       : work.acceptor.decide(params, b, work.sampler, is_shared);
  }
  params.num_accepted[b] = decision.depth;
  params.next_tokens[b] = decision.next_token;
  params.status[b] = decision.status;
  if (params.logprobs != nullptr && !is_idle) score(params, b, work, is_shared);
}

}  // namespace

void verify(const VerifyParams& params) {
  const int32_t batch = params.sampling.batch;
  const bool is_shared = batch < num_threads();
  const int64_t grain = is_shared ? batch : rows_per_thread(params.sampling.vocab);
  parallel_for(batch, grain, [&](int64_t begin, int64_t end) {
    thread_local Workspace work;
    for (int64_t b = begin; b < end; ++b) verify_request(params, b, work, is_shared);
  });
}

}  // namespace specdec::SPECDEC_ISA
