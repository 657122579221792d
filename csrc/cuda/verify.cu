// Accepts a path of each draft tree. With rows for few processors a first launch summarises those
// of all nodes, tile by tile, spread over the device; else each is when a rule visits it. A group,
// a block or where requests are few a cluster of blocks, then owns a request and follows a rule: it
// searches thresholds on the rows that it visits, and reads of them only the tiles that can matter.
// What is asked for besides is spread over the device afterwards: verify_outputs.cu.
//
// Bytes moved, with e per logit: with the first launch, the logits of all nodes, B N V e, and 20
// for each 512 of them; without, those of the visited rows. Then per visited row the tiles that
// filters, masses or noise must see, from L2.
//
// The delicate steps are noise and masses: row_law.cuh, node_laws.cuh.
#include <algorithm>

#include "acceptance.cuh"
#include "summaries.cuh"
#include "verify_outputs.cuh"

namespace specdec::cuda {
namespace {

constexpr int64_t kRowsPerProcessor = 4;  // that are summarised ahead, unmeasured

// Draws the target's token at a node and follows it while it is a drafted child. Greedy requests
// follow the argmax under every rule.
template <bool kIsGreedy, class T>
__device__ Outcome walk(const Request<T>& request, int32_t& token) {
  const VerifyParams& call = request.params.call;
  const bool is_sampled = !kIsGreedy && request.filters.is_sampled();
  const bool is_coin = is_sampled && call.coins != nullptr;
  const bool has_keys =
      !is_sampled || (request.params.is_summarized && !request.filters.has_any() && !is_coin);
  int32_t node = 0;
#pragma unroll 1
  for (int32_t offset = 1;; ++offset) {
    token = 0;
    if (!request.template open<kIsGreedy>(node, 1.0)) return {kNoFiniteLogit, node};
    const Scores<T> scores = request.scores(node);
    if (has_keys) {
      token = token_of(best_key(request.group, scores));
    } else if constexpr (!kIsGreedy) {
      const float edge = request.records[node].edge;
      if (is_coin) {
        token = draw_by_coin(request.group, scores.row, RowLaw<T>{scores, edge, 1.0},
                             request.coin(node), request.tile_masses());
      } else {
        const Noise noise(call.sampling, request.b, offset);
        token = token_of(draw_noisy(request.group, scores, noise, edge));
      }
    }
    const int64_t wanted = token;
    const int32_t child = request.tree.next_child(node, node, &wanted);
    if (child < 0) return {kOk, node};
    node = child;
  }
}

// `decide` -> the outcome and the next token of a request that is not idle.
template <class T, class Decide>
__device__ void run(const DecideParams& params, Decide decide) {
  const VerifyParams& call = params.call;
  const int64_t b = blockIdx.x / cluster_size();
  Group group(params.exchange + b * (kExchangeBytes / 8));
  const Request<T> request(params, group, b);
  const bool is_first = group.rank() == 0;
  if (is_first && call.thresholds != nullptr) {
    for (int32_t i = group.thread(); i < call.nodes; i += kGroupThreads) {
      call.thresholds[b * call.nodes + i] = static_cast<double>(NAN);
    }
  }
  __syncthreads();
  Outcome outcome{kOk, 0};
  int32_t token = -1, depth = -1;
  if (request.tree.size > 0) {
    outcome = decide(request, token);
    depth = request.tree.depth(outcome.node);
  }
  if (!is_first) return;
  int32_t* path = call.path + b * call.nodes;
  for (int32_t i = depth + 1 + group.thread(); i < call.nodes; i += kGroupThreads) path[i] = -1;
  if (!group.is_leader()) return;
  for (int32_t node = outcome.node, place = depth; place >= 0; --place) {
    path[place] = node;
    if (node > 0) node = request.tree.parent(node);
  }
  call.num_accepted[b] = max(depth, 0);
  call.next_tokens[b] = token;
  call.status[b] = outcome.status;
}

template <class T>
__global__ void __launch_bounds__(kGroupThreads, 1)
    walk_kernel(const __grid_constant__ DecideParams params) {
  run<T>(params,
         [](const Request<T>& request, int32_t& token) { return walk<false>(request, token); });
}

template <class T>
__global__ void __launch_bounds__(kGroupThreads, 1)
    test_kernel(const __grid_constant__ DecideParams params) {
  run<T>(params, [](const Request<T>& request, int32_t& token) {
    if (!request.filters.is_sampled()) return walk<true>(request, token);
    const Outcome outcome = try_drafts(request);
    token = outcome.status == kOk ? request.draw_next(outcome.node) : 0;
    return outcome;
  });
}

template <class T>
__global__ void __launch_bounds__(kGroupThreads, 1)
    typical_kernel(const __grid_constant__ DecideParams params) {
  run<T>(params, [](const Request<T>& request, int32_t& token) {
    if (!request.filters.is_sampled()) return walk<true>(request, token);
    const Outcome outcome = find_typical(request);
    token = outcome.status == kOk ? request.draw_next(outcome.node) : 0;
    return outcome;
  });
}

struct MapParams {
  const int64_t* offsets;  // [U]
  int32_t* draft_ids;      // [V]
  int32_t draft_vocab, vocab;
};

__global__ void __launch_bounds__(kGroupThreads)
    clear_ids_kernel(const __grid_constant__ MapParams params) {
  const int64_t token = int64_t{blockIdx.x} * kGroupThreads + threadIdx.x;
  if (token < params.vocab) params.draft_ids[token] = -1;
}

// Ids outside of the vocabulary are left out; of several for a token, which none should be, the
// largest counts.
__global__ void __launch_bounds__(kGroupThreads)
    map_ids_kernel(const __grid_constant__ MapParams params) {
  const int64_t id = int64_t{blockIdx.x} * kGroupThreads + threadIdx.x;
  if (id >= params.draft_vocab) return;
  const int64_t token = id + params.offsets[id];
  if (token < 0 || token >= params.vocab) return;
  atomicMax(&params.draft_ids[token], static_cast<int32_t>(id));
}

void map_ids(const DecideParams& params, Stream stream) {
  const DraftParams& draft = params.call.draft;
  const int32_t vocab = params.call.sampling.vocab;
  const MapParams map{draft.offsets, params.draft_ids, draft.draft_vocab, vocab};
  const auto blocks = [](int32_t num) {
    return dim3(static_cast<unsigned>((num + kGroupThreads - 1) / kGroupThreads));
  };
  launch("verify", clear_ids_kernel, blocks(vocab), kGroupThreads, 0, stream, map);
  if (draft.draft_vocab == 0) return;
  launch("verify", map_ids_kernel, blocks(draft.draft_vocab), kGroupThreads, 0, stream, map);
}

DecideParams plan(const VerifyParams& call, Scratch& scratch) {
  DecideParams params{};
  const int64_t batch = call.sampling.batch, rows = batch * call.nodes;
  params.call = call;
  params.row_tiles = num_tiles(call.sampling.vocab);
  params.blocks = static_cast<int32_t>(group_blocks("verify", batch));
  params.summaries = take_summaries(scratch, rows * params.row_tiles);
  params.exchange = scratch.take<uint64_t>(batch * (kExchangeBytes / 8));
  params.mass_tiles = std::max(params.row_tiles, num_tiles(call.draft.draft_vocab));
  params.tile_masses = scratch.take<double>(batch * params.mass_tiles);
  params.records = scratch.take<NodeRecord>(rows * params.blocks);
  if (call.draft.offsets != nullptr) {
    params.draft_ids = scratch.take<int32_t>(call.sampling.vocab);
    params.call.draft.draft_ids = params.draft_ids;
  }
  params.is_summarized = rows > 0 && rows <= kRowsPerProcessor * num_processors("verify");
  params.wants_totals = call.rule != Rule::kWalk || call.next_law != nullptr;
  return params;
}

}  // namespace

size_t verify_scratch_bytes(const VerifyParams& call) {
  Scratch scratch(nullptr);
  plan(call, scratch);
  return scratch.bytes();
}

void verify(const VerifyParams& call, void* memory, Stream stream) {
  const SamplingParams& sampling = call.sampling;
  if (sampling.batch == 0) return;
  Scratch scratch(memory);
  const DecideParams params = plan(call, scratch);
  if (params.draft_ids != nullptr) map_ids(params, stream);
  if (params.is_summarized) {
    SummarizeParams summarize{};
    summarize.sampling = sampling;
    summarize.summaries = params.summaries;
    summarize.parents = call.parents;
    summarize.num_nodes = call.num_nodes;
    summarize.stride_parents_b = call.stride_parents_b;
    summarize.stride_parents_n = call.stride_parents_n;
    summarize.nodes = call.nodes;
    summarize.row_tiles = params.row_tiles;
    summarize.wants_noise =
        call.rule == Rule::kWalk && sampling.temperature != nullptr && call.coins == nullptr;
    summarize.wants_masses = params.wants_totals;
    summarize_rows("verify", summarize, stream);
  }
  const unsigned blocks = static_cast<unsigned>(params.blocks);
  with_element(sampling.dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = call.rule == Rule::kWalk      ? walk_kernel<T>
                        : call.rule == Rule::kTypical ? typical_kernel<T>
                                                      : test_kernel<T>;
    launch_clusters("verify", kernel, dim3(static_cast<unsigned>(sampling.batch) * blocks),
                    kGroupThreads, blocks, stream, params);
  });
  if (call.logprobs != nullptr && call.nodes > 0) score_path(params, stream);
  if (call.next_law != nullptr) write_law(params, stream);
}

}  // namespace specdec::cuda
