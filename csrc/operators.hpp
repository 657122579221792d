// The operators, given a kernel: checks, outputs on the device of the inputs, `run(params)`.
#pragma once

#include <tuple>
#include <vector>

#include "arguments.hpp"
#include "shape_table.hpp"
#include "tensor.hpp"

namespace specdec {

template <class Run>
std::tuple<Tensor, Tensor> tree_mask(const Tensor& parents, const Tensor& num_nodes, Run run) {
  check_shapes("tree_mask", {parents, num_nodes});
  const int64_t batch = parents.size(0), nodes = parents.size(1);
  Tensor ancestors = empty_like(parents, {batch, nodes, num_words(nodes)}, ScalarType::Long);
  Tensor depths = empty_like(parents, {batch, nodes}, ScalarType::Int);
  run(tree_mask_params(view(parents), view(num_nodes), mutable_view(ancestors),
                       mutable_view(depths)));
  return {ancestors, depths};
}

template <class Run>
void write_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
              const Tensor& lengths, const Tensor& num_nodes, const OptionalTensor& page_table,
              Run run) {
  check_shapes("write_kv", {k, v, k_cache, v_cache, lengths, num_nodes, page_table});
  run(write_kv_params(view(k), view(v), mutable_view(k_cache), mutable_view(v_cache), view(lengths),
                      view(num_nodes), view(page_table)));
}

template <class Run>
Tensor commit(const std::vector<Tensor>& k_caches, const std::vector<Tensor>& v_caches,
              const Tensor& lengths, const Tensor& path, const Tensor& num_kept,
              const OptionalTensor& page_table, const OptionalTensor& hidden, Run run) {
  check_shapes("commit", {k_caches, v_caches, lengths, path, num_kept, page_table, hidden});
  std::vector<TensorView> caches;
  for (const auto* list : {&k_caches, &v_caches}) {
    for (const Tensor& cache : *list) caches.push_back(mutable_view(cache));
  }
  Tensor hidden_out = empty_like(lengths, {0, 0, 0}, ScalarType::Float);
  if (hidden) {
    hidden_out = empty_like(*hidden, {hidden->size(0), hidden->size(1), hidden->size(2)},
                            hidden->scalar_type());
  }
  std::vector<CacheView> views;
  run(commit_params(caches, mutable_view(lengths), view(path), view(num_kept), view(page_table),
                    view(hidden), mutable_view(hidden_out), views));
  return hidden_out;
}

template <class Run>
std::tuple<Tensor, Tensor> tree_attention(const Tensor& q, const Tensor& k_cache,
                                          const Tensor& v_cache, const Tensor& ancestors,
                                          const Tensor& depths, const Tensor& lengths,
                                          const Tensor& num_nodes, const OptionalTensor& page_table,
                                          const OptionalTensor& sinks, double scale, int64_t window,
                                          double softcap, bool return_lse, Run run) {
  check_shapes("tree_attention",
               {q, k_cache, v_cache, ancestors, depths, lengths, num_nodes, page_table, sinks});
  const Tensor packed_ancestors = packed(ancestors), packed_depths = packed(depths);
  const Tensor packed_lengths = packed(lengths), packed_nodes = packed(num_nodes);
  const OptionalTensor packed_sinks = packed(sinks);
  const int64_t batch = q.size(0), heads = q.size(1), nodes = q.size(2);
  const auto made = [&](std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return q.is_cpu() ? empty(sizes, dtype) : empty_like(q, sizes, dtype);  // the former is faster
  };
  Tensor out = made({batch, nodes, heads, v_cache.size(3)}, q.scalar_type());
  Tensor lse = return_lse ? made({batch, heads, nodes}, ScalarType::Float)
                          : made({0, 0, 0}, ScalarType::Float);
  run(tree_attention_params(view(q), view(k_cache), view(v_cache), view(packed_ancestors),
                            view(packed_depths), view(packed_lengths), view(packed_nodes),
                            view(page_table), view(packed_sinks), mutable_view(out),
                            return_lse ? OptionalView(mutable_view(lse)) : std::nullopt, scale,
                            window, softcap));
  return {torch::stable::transpose(out, 1, 2), lse};
}

template <class Run>
std::tuple<Tensor, Tensor> topk_logprobs(const Tensor& logits, int64_t k, Run run) {
  check_shapes("topk_logprobs", {logits});
  check_topk(logits.size(1), k);
  Tensor logprobs = empty_like(logits, {logits.size(0), k}, ScalarType::Float);
  Tensor tokens = empty_like(logits, {logits.size(0), k}, ScalarType::Long);
  run(topk_logprobs_params(view(logits), k, mutable_view(logprobs), mutable_view(tokens)));
  return {logprobs, tokens};
}

}  // namespace specdec
