// Ancestor words and depths in one sweep: a parent comes before its children, so its row is ready.
#include "../core/tree_mask.hpp"

#include <cstring>

#include "error.hpp"

namespace specdec::SPECDEC_ISA {
namespace {

void check_parent(int64_t b, int32_t i, int32_t parent) {
  if (i == 0 && parent != -1) {
    fail("tree_mask: parents[%ld, 0] must be -1 (the root), got %d", b, parent);
  }
  if (i > 0 && (parent < 0 || parent >= i)) {
    fail("tree_mask: parents[%ld, %d] must be in [0, %d), got %d", b, i, i, parent);
  }
}

}  // namespace

void tree_mask(const TreeMaskParams& params) {
  const int64_t words = params.words;
  for (int64_t b = 0; b < params.batch; ++b) {
    const int32_t size = params.num_nodes[b * params.stride_num_nodes];
    if (size < 0 || size > params.nodes) {
      fail("tree_mask: num_nodes[%ld] must be in [0, %d], got %d", b, params.nodes, size);
    }
    int64_t* ancestors = params.ancestors + b * params.nodes * words;
    int32_t* depths = params.depths + b * params.nodes;
    std::memset(ancestors, 0, static_cast<size_t>(params.nodes * words) * sizeof(int64_t));
    std::memset(depths, 0, static_cast<size_t>(params.nodes) * sizeof(int32_t));
    for (int32_t i = 0; i < size; ++i) {
      const int32_t parent =
          params.parents[b * params.stride_parents_b + i * params.stride_parents_n];
      check_parent(b, i, parent);
      int64_t* own = ancestors + i * words;
      if (i > 0) {
        std::memcpy(own, ancestors + parent * words, static_cast<size_t>(words) * sizeof(int64_t));
        depths[i] = depths[parent] + 1;
      }
      own[i / 64] |= static_cast<int64_t>(uint64_t{1} << (i % 64));
    }
  }
}

}  // namespace specdec::SPECDEC_ISA
