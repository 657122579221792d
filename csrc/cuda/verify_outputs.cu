// `score_path`: a block owns a place of the path, and reads its row once more where its sum is not
// known yet, and the tile with the largest logit. `write_law`: a warp owns a tile of the last
// node's row, and writes 8 bytes per token. Bytes moved: (rows on the path) V e, and B V (e + 8),
// with e per logit.
//
// Delicate: margins are of biased logits, whatever the filters; log-probabilities of a greedy
// request are those of the plain softmax.
#include "verify_outputs.cuh"

namespace specdec::cuda {
namespace {

// The difference of the two largest biased logits of a row: the second lies in the tile of the
// first, or is the largest of another one.
template <class T>
__device__ float margin_of(Group& group, const LogitRow<T>& row, const Summaries& summaries) {
  RankKey best = kNoKey, other = kNoKey;
  for (int32_t tile = group.thread(); tile < row.tiles(); tile += kGroupThreads) {
    best = max(best, rank_key(load_global(summaries.maxima + tile) + 0.0f, tile));
  }
  best = group.block_largest(best);
  const int32_t tile = token_of(best);
  for (int32_t i = group.thread(); i < row.tiles(); i += kGroupThreads) {
    if (i != tile) other = max(other, rank_key(load_global(summaries.maxima + i) + 0.0f, i));
  }
  if (group.thread() < kWarpSize) {
    RankKey first = kNoKey, second = kNoKey;
#pragma unroll
    for (int j = 0; j < LogitRow<T>::kLoads; ++j) {
      float values[LogitRow<T>::kVector];
      row.load(row.first_token(tile, j), values);
#pragma unroll
      for (int i = 0; i < LogitRow<T>::kVector; ++i) {
        const RankKey key = rank_key(values[i] + 0.0f, row.first_token(tile, j) + i);
        second = max(second, min(first, key));
        first = max(first, key);
      }
    }
    const RankKey most = warp_largest(first);
    other = max(other, first == most ? second : first);
  }
  other = group.block_largest(other);
  return score_of(best) - (other == kNoKey ? -INFINITY : score_of(other));
}

template <class T>
__global__ void __launch_bounds__(kGroupThreads)
    score_path_kernel(const __grid_constant__ DecideParams params) {
  const VerifyParams& call = params.call;
  const int64_t place = blockIdx.x, b = place / call.nodes;
  const int32_t depth = static_cast<int32_t>(place % call.nodes);
  const int32_t node = call.path[place];
  Group group(nullptr);
  double logprob = static_cast<double>(NAN);
  float margin = NAN;
  if (node >= 0) {
    const LogitRow<T> row(call.sampling, b, node);
    const Summaries summaries = params.summaries.row(b * call.nodes + node, params.row_tiles);
    const NodeRecord& record = params.records[b * params.blocks * call.nodes + node];
    const Scores<T> scores{row, summaries, record.largest, record.is_infinite != 0};
    const bool is_last = depth >= call.num_accepted[b];
    const int64_t token =
        is_last ? call.next_tokens[b] : TreeView(call, b).token(call.path[place + 1]);
    if (scores.largest > -INFINITY && scores.largest < INFINITY && record.edge <= scores.largest) {
      const bool is_token = token >= 0 && token < row.vocab;
      const float value = is_token ? scores.score(row.at(static_cast<int32_t>(token))) : -INFINITY;
      const double total =
          record.total > 0.0
              ? record.total
              : measure(group, row, RowLaw<T>{scores, record.edge, 1.0}, summaries.masses);
      logprob = value >= record.edge
                    ? static_cast<double>(value) - static_cast<double>(scores.largest) - log(total)
                    : -static_cast<double>(INFINITY);
    }
    margin = margin_of(group, row, summaries);
  }
  if (!group.is_leader()) return;
  call.logprobs[place] = static_cast<float>(logprob);
  call.margins[place] = margin;
}

template <class T>
__global__ void __launch_bounds__(kGroupThreads)
    write_law_kernel(const __grid_constant__ DecideParams params) {
  constexpr int kVector = LogitRow<T>::kVector;
  const VerifyParams& call = params.call;
  const int64_t b = blockIdx.x;
  const int32_t last = call.nodes > 0 ? call.path[b * call.nodes + call.num_accepted[b]] : -1;
  const bool is_fine = last >= 0 && call.status[b] == kOk;
  const int32_t node = max(last, 0);
  const LogitRow<T> row(call.sampling, b, node);
  const int32_t tile = static_cast<int32_t>(blockIdx.y * kGroupWarps + threadIdx.x / kWarpSize);
  if (tile >= row.tiles()) return;
  const NodeRecord* records = params.records + b * params.blocks * call.nodes;
  const NodeRecord& record = records[node];
  const Summaries summaries = params.summaries.row(b * call.nodes + node, params.row_tiles);
  const TreeView tree(call, b);
  const Draft draft{call.draft, b, b * call.nodes};
  double* next_law = call.next_law + b * row.vocab;
#pragma unroll 1
  for (int j = 0; j < LogitRow<T>::kLoads; ++j) {
    const int32_t first = row.first_token(tile, j);
    double masses[kVector] = {};
    if (is_fine && row.is_sampled) {
      const Scores<T> scores{row, summaries, record.largest, record.is_infinite != 0};
      NodeLaw<T>(scores, tree, draft, records, node).load(first, masses);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (first + i >= row.vocab) continue;
      if (is_fine && !row.is_sampled) masses[i] = first + i == call.next_tokens[b] ? 1.0 : 0.0;
      store_global(next_law + first + i, masses[i]);
    }
  }
}

}  // namespace

void score_path(const DecideParams& params, Stream stream) {
  const SamplingParams& sampling = params.call.sampling;
  with_element(sampling.dtype, [&](auto element) {
    launch("verify", score_path_kernel<decltype(element)>,
           dim3(static_cast<unsigned>(sampling.batch * params.call.nodes)), kGroupThreads, 0,
           stream, params);
  });
}

void write_law(const DecideParams& params, Stream stream) {
  const SamplingParams& sampling = params.call.sampling;
  const dim3 grid(static_cast<unsigned>(sampling.batch),
                  static_cast<unsigned>((params.row_tiles + kGroupWarps - 1) / kGroupWarps));
  with_element(sampling.dtype, [&](auto element) {
    launch("verify", write_law_kernel<decltype(element)>, grid, kGroupThreads, 0, stream, params);
  });
}

}  // namespace specdec::cuda
