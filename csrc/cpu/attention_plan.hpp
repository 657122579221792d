// How the work of one attention call is cut into items, and where their partial results lie.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>

#include "../core/tree_attention.hpp"
#include "parallel.hpp"
#include "scratch.hpp"
#include "tile.hpp"
#include "visibility.hpp"

namespace specdec::SPECDEC_ISA {

inline constexpr int32_t kMaxTileRows = 192;  // query rows; their totals fit the L2 cache
inline constexpr int32_t kMinSplitTiles = 4;  // key tiles that are worth a merge
inline constexpr int32_t kItemsPerThread = 4;

// Running softmax of the rows of a tile, with logits in base 2: out = total / weight.
struct RowStates {
  float* total;    // [rows, columns]
  float* largest;  // [rows], logit
  float* weight;   // [rows], sum of 2^(logit - largest)

  RowStates from(int64_t row, int32_t columns) const {
    return {total + row * columns, largest + row, weight + row};
  }
};

struct Item {
  int32_t b, g;
  int32_t first_node, num_nodes;
  int32_t first_slot, end_slot;
  int32_t split, num_splits;
  int64_t first_partial;       // partial row of split 0; the other splits follow
  std::atomic<int32_t>* left;  // unfinished splits of the row tile
};

// Buffers of one call.
struct Plan {
  Scratch<Item> items;
  Scratch<std::atomic<int32_t>> left;
  Scratch<float> partial_states;
  int32_t num_items = 0;
  RowStates partials;
};

// Query heads per key/value head.
inline int32_t query_group(const TreeAttentionParams& params) {
  return params.q.heads / params.k_cache.heads;
}

inline int32_t key_tiles(const RequestTree& tree) {
  return (tree.end_slot() - tree.first_slot() + kTileKeys - 1) / kTileKeys;
}

// Calls `visit(b, tree, first_node, num_nodes)` for the row tiles of every request, about equal
// within a request.
template <class Visit>
void for_row_tiles(const TreeAttentionParams& params, Visit visit) {
  const int32_t group = query_group(params);
  const int32_t most = group < kMaxTileRows ? kMaxTileRows / group : 1;  // nodes
  for (int32_t b = 0; b < params.batch; ++b) {
    const RequestTree tree = request_tree(params, b);
    if (tree.size == 0) continue;
    const int32_t tiles = (tree.size + most - 1) / most, step = (tree.size + tiles - 1) / tiles;
    for (int32_t node = 0; node < tree.size; node += step) {
      visit(b, tree, node, node + step < tree.size ? step : tree.size - node);
    }
  }
}

// Items of about equal work, a few per thread; one thread splits nothing.
inline void make_plan(const TreeAttentionParams& params, int32_t columns, Plan& plan) {
  int64_t work = 0, row_tiles = 0;
  for_row_tiles(params, [&](int32_t, const RequestTree& tree, int32_t, int32_t) {
    work += key_tiles(tree);
    ++row_tiles;
  });
  const int64_t wanted_items = num_threads() > 1 ? int64_t{num_threads()} * kItemsPerThread : 1;
  const int64_t share = work * params.k_cache.heads / wanted_items + 1;  // key tiles of an item
  const int64_t tiles = share > kMinSplitTiles ? share : kMinSplitTiles;
  Item* items = plan.items.reserve(work * params.k_cache.heads / tiles +
                                   2 * row_tiles * params.k_cache.heads);
  std::atomic<int32_t>* left = plan.left.reserve(row_tiles * params.k_cache.heads);
  int64_t partial_rows = 0;
  plan.num_items = 0;
  for_row_tiles(
      params, [&](int32_t b, const RequestTree& tree, int32_t first_node, int32_t num_nodes) {
        const int64_t total = key_tiles(tree);
        const int32_t num_splits =
            static_cast<int32_t>(num_threads() > 1 ? (total + tiles - 1) / tiles : 1);
        for (int32_t g = 0; g < params.k_cache.heads; ++g, ++left) {
          new (left) std::atomic<int32_t>(num_splits);
          for (int32_t split = 0; split < num_splits; ++split) {
            const int32_t first =
                tree.first_slot() + static_cast<int32_t>(total * split / num_splits) * kTileKeys;
            const int32_t last = tree.first_slot() +
                                 static_cast<int32_t>(total * (split + 1) / num_splits) * kTileKeys;
            const int32_t end = last < tree.end_slot() ? last : tree.end_slot();
            items[plan.num_items++] = {b,   g,     first_node, num_nodes,    first,
                                       end, split, num_splits, partial_rows, left};
          }
          if (num_splits > 1) partial_rows += int64_t{num_splits} * num_nodes * query_group(params);
        }
      });
  float* memory = plan.partial_states.reserve(partial_rows * (columns + 2));
  plan.partials = {memory, memory + partial_rows * columns, memory + partial_rows * (columns + 1)};
}

}  // namespace specdec::SPECDEC_ISA
