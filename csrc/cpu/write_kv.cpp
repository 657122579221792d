// Copies new keys and values into their slots. One task owns the nodes of one head of one request;
// every byte is read once and written once. All slots are checked before the first write.
#include "../core/write_kv.hpp"

#include "cache.hpp"
#include "error.hpp"
#include "parallel.hpp"

namespace specdec::SPECDEC_ISA {
namespace {

constexpr int64_t kBytesPerTask = 32 << 10;

int32_t nodes_of(const WriteKvParams& params, int64_t b) {
  const int32_t num = params.num_nodes[b * params.stride_num_nodes];
  return num < 0 ? 0 : num < params.nodes ? num : params.nodes;
}

void check_slots(const WriteKvParams& params) {
  for (int64_t b = 0; b < params.batch; ++b) {
    for (int64_t i = 0; i < nodes_of(params, b); ++i) {
      const int64_t slot = params.lengths[b * params.stride_lengths] + i;
      const bool is_inside = slot >= 0 && slot < params.capacity;
      const int64_t page = is_inside ? params.slots.page(b, slot) : b;
      if (!is_inside || page < 0 || page >= params.slots.pages) {
        fail(
            "write_kv: slot lengths + node must be in [0, %ld) on one of %d pages, got slot %ld on "
            "page %ld "
            "for row %ld",
            params.capacity, params.slots.pages, slot, page, b);
      }
    }
  }
}

void write_head(const WriteKvParams& params, const CacheView& source, const CacheView& cache,
                int64_t b, int64_t g) {
  const int64_t bytes = element_bytes(params.dtype);
  const char* from =
      static_cast<const char*>(source.data) + (b * source.stride_c + g * source.stride_g) * bytes;
  for (int64_t i = 0; i < nodes_of(params, b); ++i) {
    const int64_t slot = params.lengths[b * params.stride_lengths] + i;
    copy_elements(slot_bytes(cache, params.slots, b, g, slot, bytes), cache.stride_d,
                  from + i * source.stride_s * bytes, source.stride_d, cache.head_dim, bytes);
  }
}

}  // namespace

void write_kv(const WriteKvParams& params) {
  check_slots(params);
  const int64_t heads = params.k_cache.heads;
  const int64_t head_bytes = int64_t{params.nodes} * (params.k.head_dim + params.v.head_dim) *
                                 element_bytes(params.dtype) +
                             1;
  parallel_for(params.batch * heads, kBytesPerTask / head_bytes + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   write_head(params, params.k, params.k_cache, task / heads, task % heads);
                   write_head(params, params.v, params.v_cache, task / heads, task % heads);
                 }
               });
}

}  // namespace specdec::SPECDEC_ISA
