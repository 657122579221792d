// Draws the tokens of each row. With rows for few processors a first launch summarises all of them,
// tile by tile, spread over the device; else each row's group does. A group, a block or where rows
// are few a cluster of blocks, then owns a row: it finds the filters' edge and draws, from the
// summaries or the tiles that can matter. A last launch spreads the law, if asked.
//
// Bytes moved per row, with e per logit: V e once, and again from L2 the tiles that filters, masses
// or noise must see; 20 for each 512 logits of summaries. With probs V (e + 4) more.
//
// Segments and summaries in global memory, and not one kernel of clusters over V: sm_80 has none,
// and rows in numbers fill a device without. A cluster is used where there are few rows to search.
#include "../core/acceptance.hpp"
#include "row_draws.cuh"
#include "summaries.cuh"

namespace specdec::cuda {
namespace {

// What `probs` is written from.
struct DrawnLaw {
  double total;
  float largest, edge;
  int32_t is_infinite;
};

struct DrawParams {
  SampleParams call;
  Summaries summaries;  // of R rows
  uint64_t* exchange;   // [R, kExchangeBytes / 8]
  double* tile_masses;  // [R, tiles]
  DrawnLaw* laws;       // [R]
  int32_t row_tiles;
  bool is_summarized;
};

// Writes the best key of each tile.
template <class T>
__device__ void find_tile_keys(Group& group, const Scores<T>& scores, const Noise* noise,
                               float edge) {
  for (int32_t tile = group.first_tile(); tile < scores.row.tiles(); tile += group.tile_step()) {
    const bool can_draw = scores.tile_largest(tile) >= edge;
    const RankKey key = can_draw ? tile_key(scores, noise, edge, tile, ~RankKey{0}) : kNoKey;
    if (this_lane() == 0) scores.summaries.best[tile] = key;
  }
  group.sync();
}

// Draws without replacement, in falling order: each draw advances the tile that it came from.
template <class T>
__device__ void draw_many(Group& group, const Scores<T>& scores, const Noise* noise, float edge,
                          int32_t num, int64_t* tokens) {
  const bool writes = group.rank() == 0 && group.is_leader();
  for (int32_t i = 0; i < num; ++i) {
    const RankKey key = best_key(group, scores);
    if (writes) tokens[i] = key != kNoKey ? token_of(key) : -1;
    if (key == kNoKey) continue;
    group.sync();  // all have read the keys
    if (group.rank() == 0 && group.thread() < kWarpSize) {
      const int32_t tile = token_of(key) / kTile;
      const RankKey next = tile_key(scores, noise, edge, tile, key);
      if (this_lane() == 0) scores.summaries.best[tile] = next;
    }
    group.sync();
  }
}

template <class T>
__global__ void __launch_bounds__(kGroupThreads, 1)
    draw_kernel(const __grid_constant__ DrawParams params) {
  const SampleParams& call = params.call;
  const int64_t r = blockIdx.x / cluster_size();
  Group group(params.exchange + r * (kExchangeBytes / 8));
  const RowFilters filters(call.sampling, r);
  const LogitRow<T> row(call.sampling, r, 0);
  const bool is_coin = call.coins != nullptr && filters.is_sampled();
  const bool wants_law = call.probs != nullptr && filters.is_sampled();
  const bool wants_mass = filters.is_sampled() && (filters.top_p < 1.0f || wants_law);
  const Summaries summaries = params.summaries.row(r, params.row_tiles);
  if (!params.is_summarized) summarize_row(group, row, wants_mass, summaries);
  const Scores<T> scores = open_row(group, row, summaries);
  double* tile_masses = params.tile_masses + r * params.row_tiles;
  double total = 0.0;
  const float edge = scores.is_empty()
                         ? kLowest
                         : find_edge(group, scores, filters, wants_law, tile_masses, total);
  const bool is_fine = !scores.is_empty() && edge <= scores.largest;
  const bool writes = group.rank() == 0 && group.is_leader();
  int64_t* tokens = call.tokens + r * call.num_draws;
  if (writes) call.status[r] = is_fine ? kOk : kNoFiniteLogit;
  if (!is_fine) {
    for (int32_t i = 0; writes && i < call.num_draws; ++i) tokens[i] = i == 0 ? 0 : -1;
    return;
  }
  const bool is_noisy = filters.is_sampled() && !is_coin;
  const bool has_keys = !filters.is_sampled() || (params.is_summarized && !filters.has_any());
  if (call.num_draws > 1) {
    if (is_noisy) {
      const Noise noise(call.sampling, r, 0);
      if (!has_keys) find_tile_keys(group, scores, &noise, edge);
      draw_many(group, scores, &noise, edge, call.num_draws, tokens);
    } else {
      draw_many<T>(group, scores, nullptr, edge, call.num_draws, tokens);
    }
  } else {
    int32_t token;
    if (is_coin) {
      token = draw_by_coin(group, row, RowLaw<T>{scores, edge, 1.0}, call.coins[r], tile_masses);
    } else if (has_keys) {
      token = token_of(best_key(group, scores));
    } else {
      token = token_of(draw_noisy(group, scores, Noise(call.sampling, r, 0), edge));
    }
    if (writes) tokens[0] = token;
  }
  if (writes && wants_law) params.laws[r] = {total, scores.largest, edge, scores.is_infinite};
}

// A warp owns a tile.
template <class T>
__global__ void __launch_bounds__(kGroupThreads)
    write_probs_kernel(const __grid_constant__ DrawParams params) {
  constexpr int kVector = LogitRow<T>::kVector;
  const SampleParams& call = params.call;
  const int64_t r = blockIdx.x;
  const LogitRow<T> row(call.sampling, r, 0);
  const int32_t tile = static_cast<int32_t>(blockIdx.y * kGroupWarps + threadIdx.x / kWarpSize);
  if (tile >= row.tiles()) return;
  const bool is_fine = call.status[r] == kOk;
  const int64_t token = call.tokens[r * call.num_draws];
  float* probs = call.probs + r * row.vocab;
  Scores<T> scores{row, {}, 0.0f, false};
  RowLaw<T> law{scores, kLowest, 0.0};
  if (is_fine && row.is_sampled) {
    const DrawnLaw drawn = params.laws[r];
    scores.largest = drawn.largest;
    scores.is_infinite = drawn.is_infinite != 0;
    law = {scores, drawn.edge, 1.0 / drawn.total};
  }
#pragma unroll 1
  for (int j = 0; j < LogitRow<T>::kLoads; ++j) {
    const int32_t first = row.first_token(tile, j);
    double masses[kVector] = {};
    if (is_fine && row.is_sampled) law.load(first, masses);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (first + i >= row.vocab) continue;
      if (is_fine && !row.is_sampled) masses[i] = first + i == token ? 1.0 : 0.0;
      store_global(probs + first + i, static_cast<float>(masses[i]));
    }
  }
}

DrawParams plan(const SampleParams& call, Scratch& scratch) {
  DrawParams params{};
  const int64_t rows = call.sampling.batch;
  params.call = call;
  params.row_tiles = num_tiles(call.sampling.vocab);
  params.summaries = take_summaries(scratch, rows * params.row_tiles);
  params.exchange = scratch.take<uint64_t>(rows * (kExchangeBytes / 8));
  params.tile_masses = scratch.take<double>(rows * params.row_tiles);
  params.laws = scratch.take<DrawnLaw>(rows);
  params.is_summarized = rows < num_processors("sample");
  return params;
}

}  // namespace

size_t sample_scratch_bytes(const SampleParams& call) {
  Scratch scratch(nullptr);
  plan(call, scratch);
  return scratch.bytes();
}

void sample(const SampleParams& call, void* memory, Stream stream) {
  const int64_t rows = call.sampling.batch;
  if (rows == 0) return;
  Scratch scratch(memory);
  const DrawParams params = plan(call, scratch);
  if (params.is_summarized) {
    SummarizeParams summarize{};
    summarize.sampling = call.sampling;
    summarize.summaries = params.summaries;
    summarize.nodes = 1;
    summarize.row_tiles = params.row_tiles;
    summarize.wants_noise = call.sampling.temperature != nullptr && call.coins == nullptr;
    summarize.wants_masses = call.probs != nullptr;
    summarize_rows("sample", summarize, stream);
  }
  const unsigned blocks = group_blocks("sample", rows);
  const dim3 tiles(static_cast<unsigned>(rows),
                   static_cast<unsigned>((params.row_tiles + kGroupWarps - 1) / kGroupWarps));
  with_element(call.sampling.dtype, [&](auto element) {
    using T = decltype(element);
    launch_clusters("sample", draw_kernel<T>, dim3(static_cast<unsigned>(rows) * blocks),
                    kGroupThreads, blocks, stream, params);
    if (call.probs == nullptr) return;
    launch("sample", write_probs_kernel<T>, tiles, kGroupThreads, 0, stream, params);
  });
}

}  // namespace specdec::cuda
