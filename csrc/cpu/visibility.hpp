// Which keys of a tile each tree node sees, one bit per key.
#pragma once

#include <cstdint>

#include "../core/tree_attention.hpp"
#include "tile.hpp"

namespace specdec::SPECDEC_ISA {

static_assert(kTileKeys == 64, "a tile's keys are the bits of one word");

// The `num` lowest bits; none if num <= 0, all if num >= 64.
inline uint64_t low_bits(int64_t num) {
  return num <= 0 ? 0 : num >= 64 ? ~uint64_t{0} : (uint64_t{1} << num) - 1;
}

// The tree of one request and its place in the cache.
struct RequestTree {
  const int64_t* ancestors;  // [N, W]
  const int32_t* depths;     // [N]
  int32_t num_words;
  int32_t length;
  int32_t size;       // nodes
  int32_t max_depth;  // of them
  int32_t window;

  // First slot that any node sees: the root looks back furthest.
  int32_t first_slot() const { return window > 0 && length >= window ? length - window + 1 : 0; }
  int32_t end_slot() const { return length + size; }

  // Whether every node sees every one of the kTileKeys slots from `slot` on.
  bool sees_all(int32_t slot) const {
    const bool is_prefix = slot + kTileKeys <= length;
    return is_prefix && (window == 0 || slot > length + max_depth - window);
  }

  // Bit j: `node` sees slot + j.
  uint64_t seen(int32_t node, int32_t slot) const {
    const int64_t hidden = window == 0 ? 0 : int64_t{length} + depths[node] - window + 1 - slot;
    return (low_bits(int64_t{length} - slot) & ~low_bits(hidden)) | seen_nodes(node, slot - length);
  }

 private:
  // Bit j: `node` sees node first + j (first may be negative).
  uint64_t seen_nodes(int32_t node, int32_t first) const {
    const uint64_t* words =
        reinterpret_cast<const uint64_t*>(ancestors) + static_cast<int64_t>(node) * num_words;
    uint64_t bits = 0;
    if (first > -kTileKeys && first < 0) {
      bits = words[0] << -first;
    } else if (first >= 0) {
      const int32_t word = first / 64, shift = first % 64;
      bits = words[word] >> shift;
      if (shift > 0 && word + 1 < num_words) bits |= words[word + 1] << (64 - shift);
    }
    bits &= low_bits(int64_t{size} - first);
    if (window == 0) return bits;
    for (uint64_t left = bits; left != 0; left &= left - 1) {
      const int32_t j = __builtin_ctzll(left);
      if (depths[node] - depths[first + j] >= window) bits &= ~(uint64_t{1} << j);
    }
    return bits;
  }
};

inline RequestTree request_tree(const TreeAttentionParams& params, int64_t b) {
  const int32_t num_words = (params.nodes + 63) / 64;
  const int32_t wanted = params.num_nodes[b] < params.nodes ? params.num_nodes[b] : params.nodes;
  RequestTree tree{params.ancestors + b * params.nodes * num_words,
                   params.depths + b * params.nodes,
                   num_words,
                   params.lengths[b],
                   wanted > 0 ? wanted : 0,
                   0,
                   params.window};
  for (int32_t i = 0; i < tree.size; ++i) {
    if (tree.depths[i] > tree.max_depth) tree.max_depth = tree.depths[i];
  }
  return tree;
}

}  // namespace specdec::SPECDEC_ISA
