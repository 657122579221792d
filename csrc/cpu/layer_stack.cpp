// Decoder layers in turn, by the kernels of their parts. Nothing but these runs between two layers:
// of a small model's few rows, what an interpreter does there takes a fifth of the time. Bytes
// moved: the panels, and the keys and values of visible slots, once.
#include "../core/layer_stack.hpp"

#include "parallel.hpp"

namespace specdec::SPECDEC_ISA {

void after_attention(const AfterAttentionParams&);
void before_attention(const BeforeAttentionParams&);
void tree_attention(const TreeAttentionParams&);
void write_kv(const WriteKvParams&);

namespace {

// Of one row of a cache or, with the stride of slots, from one node on.
CacheView from(CacheView view, int64_t num, int64_t stride, DType dtype) {
  view.data = static_cast<char*>(view.data) + num * stride * element_bytes(dtype);
  return view;
}

// Attention of one request as of a batch of its own.
void attend(const StackedLayer& layer, int64_t b, int64_t first) {
  TreeAttentionParams attention = layer.attention;
  WriteKvParams write = layer.write;
  const DType dtype = attention.dtype;
  const int32_t size = attention.num_nodes[b];
  if (size <= 0) return;
  attention.batch = write.batch = 1;
  if (size < attention.nodes) attention.nodes = size;
  write.k = from(write.k, first, write.k.stride_s, dtype);
  write.v = from(write.v, first, write.v.stride_s, dtype);
  CacheView* const caches[] = {&write.k_cache, &write.v_cache, &attention.k_cache,
                               &attention.v_cache};
  for (CacheView* cache : caches) *cache = from(*cache, b, cache->stride_c, dtype);
  write.lengths += b * write.stride_lengths;
  write.num_nodes += b * write.stride_num_nodes;
  attention.q = from(attention.q, first, attention.q.stride_s, dtype);
  attention.ancestors += b * layer.attention.nodes;  // a word each
  attention.depths += b * layer.attention.nodes;
  attention.lengths += b;
  attention.num_nodes += b;
  const int64_t node = int64_t{attention.q.heads} * attention.v_cache.head_dim;
  attention.out = static_cast<char*>(attention.out) + first * node * element_bytes(dtype);
  write_kv(write);
  tree_attention(attention);
}

}  // namespace

void layer_stack(const LayerStackParams& params) {
  for (int64_t i = 0; i < params.num_layers; ++i) {
    const StackedLayer& layer = params.layers[i];
    before_attention(layer.before);
    if (params.firsts == nullptr) {
      write_kv(layer.write);
      tree_attention(layer.attention);
    } else {
      parallel_for(layer.attention.batch, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) attend(layer, b, params.firsts[b]);
      });
    }
    after_attention(layer.after);
  }
}

}  // namespace specdec::SPECDEC_ISA
