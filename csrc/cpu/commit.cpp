// Moves accepted nodes to the front of the tree's slots. One task owns one head of one cache for
// one request and walks the path in order: entries only move down, and entry j lands before the
// source of any later entry, so the move is safe in place. Nodes that already lie right are not
// touched. Everything is checked before the first write.
#include "../core/commit.hpp"

#include "cache.hpp"
#include "error.hpp"
#include "parallel.hpp"

namespace specdec::SPECDEC_ISA {
namespace {

constexpr int64_t kHeadsPerTask = 16;

int32_t path_entry(const CommitParams& params, int64_t b, int64_t j) {
  return params.path[b * params.stride_path_b + j * params.stride_path_n];
}

int32_t kept_of(const CommitParams& params, int64_t b) {
  return params.num_kept[b * params.stride_num_kept];
}

void check_row(const CommitParams& params, int64_t b) {
  const int32_t kept = kept_of(params, b);
  if (kept < 0 || kept > params.nodes) {
    fail("commit: num_kept[%ld] must be in [0, %d], got %d", b, params.nodes, kept);
  }
  int32_t low = 0;
  for (int32_t j = 0; j < kept; ++j) {
    const int32_t node = path_entry(params, b, j);
    if (node < low || node >= params.nodes) {
      fail("commit: path[%ld, %d] must be in [%d, %d), got %d", b, j, low, params.nodes, node);
    }
    low = node + 1;
  }
  if (kept == 0 || params.num_caches == 0) return;
  const int64_t first = params.lengths[b * params.stride_lengths];
  const int64_t last = first + path_entry(params, b, kept - 1);
  bool is_inside = first >= 0 && last < params.capacity;
  for (int64_t slot = first; is_inside && slot <= last; ++slot) {
    const int64_t page = params.slots.page(b, slot);
    is_inside = page >= 0 && page < params.slots.pages;
  }
  if (!is_inside) {
    fail("commit: slots must be in [0, %ld) on one of %d pages, got slots %ld to %ld in row %ld",
         params.capacity, params.slots.pages, first, last, b);
  }
}

void move_head(const CommitParams& params, const CacheView& cache, int64_t b, int64_t g) {
  const int64_t bytes = element_bytes(params.dtype);
  const int64_t first = params.lengths[b * params.stride_lengths];
  for (int32_t j = 0; j < kept_of(params, b); ++j) {
    const int32_t node = path_entry(params, b, j);
    if (node == j) continue;
    copy_elements(slot_bytes(cache, params.slots, b, g, first + j, bytes), cache.stride_d,
                  slot_bytes(cache, params.slots, b, g, first + node, bytes), cache.stride_d,
                  cache.head_dim, bytes);
  }
}

bool moves(const CommitParams& params, int64_t b) {
  const int32_t kept = kept_of(params, b);
  return kept > 0 && path_entry(params, b, kept - 1) != kept - 1;
}

void gather_hidden(const CommitParams& params, int64_t b) {
  const int64_t bytes = element_bytes(params.hidden_dtype);
  const int64_t row_bytes = params.features * bytes;
  for (int64_t j = 0; j < params.nodes; ++j) {
    char* target = static_cast<char*>(params.hidden_out) + (b * params.nodes + j) * row_bytes;
    if (j >= kept_of(params, b)) {
      std::memset(target, 0, static_cast<size_t>(row_bytes));
      continue;
    }
    const int64_t element =
        b * params.stride_hidden_b + path_entry(params, b, j) * params.stride_hidden_n;
    copy_elements(target, 1, static_cast<const char*>(params.hidden) + element * bytes,
                  params.stride_hidden_f, params.features, bytes);
  }
}

}  // namespace

void commit(const CommitParams& params) {
  for (int64_t b = 0; b < params.batch; ++b) check_row(params, b);
  const int64_t pairs = params.num_caches * params.batch;
  const int64_t heads = params.num_caches > 0 ? params.caches[0].heads : 1;
  parallel_for(pairs, kHeadsPerTask / (heads + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const CacheView& cache = params.caches[pair / params.batch];
      const int64_t b = pair % params.batch;
      if (!moves(params, b)) continue;
      for (int64_t g = 0; g < cache.heads; ++g) move_head(params, cache, b, g);
    }
  });
  for (int64_t b = 0; b < params.batch; ++b) {
    params.lengths[b * params.stride_lengths] += kept_of(params, b);
    if (params.hidden != nullptr) gather_hidden(params, b);
  }
}

}  // namespace specdec::SPECDEC_ISA
