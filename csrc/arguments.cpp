#include "arguments.hpp"

#include <algorithm>
#include <charconv>
#include <string>

#include "cpu/error.hpp"

namespace specdec {
namespace {

// As Python prints a float.
std::string number(double value) {
  char text[32];
  std::string printed(text, std::to_chars(text, text + sizeof text, value).ptr);
  return printed.find_first_of(".en") == std::string::npos ? printed + ".0" : printed;
}

void check_attention(const TensorView& q, const TensorView& k_cache, const TensorView& ancestors,
                     const OptionalView& page_table, int64_t window, double softcap) {
  const int64_t heads = q.size(1), groups = k_cache.size(1), words = num_words(q.size(2));
  if (groups == 0 || heads % groups != 0) {
    fail("tree_attention: query heads must be a multiple of key/value heads, got %ld and %ld",
         heads, groups);
  }
  if (ancestors.size(2) != words) {
    fail(
        "tree_attention: ancestors must be [B, N, W] with W = ceil(N/64) = %ld, got [%ld, %ld, "
        "%ld]",
        words, ancestors.size(0), ancestors.size(1), ancestors.size(2));
  }
  check_cache_rows("tree_attention", k_cache, q.size(0), page_table);
  if (window < 0 || softcap < 0) {
    fail("tree_attention: window and softcap must be >= 0, got %ld and %s", window,
         number(softcap).c_str());
  }
}

}  // namespace

int32_t int32(int64_t size) {
  if (size > INT32_MAX) fail("sizes must fit in 32 bits, got %ld", size);
  return static_cast<int32_t>(size);
}

CacheView cache_view(const TensorView& cache) {
  return {cache.data,      cache.stride(0),      cache.stride(1),     cache.stride(2),
          cache.stride(3), int32(cache.size(1)), int32(cache.size(3))};
}

SlotMap slot_map(const TensorView& cache, const OptionalView& page_table) {
  return {page_table ? page_table->as<int32_t>() : nullptr, page_table ? page_table->stride(0) : 0,
          page_table ? page_table->stride(1) : 0, int32(cache.size(0)), int32(cache.size(2))};
}

int64_t capacity(const TensorView& cache, const OptionalView& page_table) {
  return page_table ? cache.size(2) * page_table->size(1) : cache.size(2);
}

void check_cache_rows(const char* op, const TensorView& cache, int64_t batch,
                      const OptionalView& page_table) {
  if (!page_table && cache.size(0) != batch) {
    fail("%s: k_cache must be [B, G, S, D] with B = %ld, got [%ld, %ld, %ld, %ld]", op, batch,
         cache.size(0), cache.size(1), cache.size(2), cache.size(3));
  }
}

TreeMaskParams tree_mask_params(const TensorView& parents, const TensorView& num_nodes,
                                const TensorView& ancestors, const TensorView& depths) {
  return {
      .parents = parents.as<int32_t>(),
      .num_nodes = num_nodes.as<int32_t>(),
      .ancestors = ancestors.as<int64_t>(),
      .depths = depths.as<int32_t>(),
      .stride_parents_b = parents.stride(0),
      .stride_parents_n = parents.stride(1),
      .stride_num_nodes = num_nodes.stride(0),
      .batch = int32(parents.size(0)),
      .nodes = int32(parents.size(1)),
      .words = int32(num_words(parents.size(1))),
  };
}

WriteKvParams write_kv_params(const TensorView& k, const TensorView& v, const TensorView& k_cache,
                              const TensorView& v_cache, const TensorView& lengths,
                              const TensorView& num_nodes, const OptionalView& page_table) {
  check_cache_rows("write_kv", k_cache, lengths.size(0), page_table);
  return {
      .k_cache = cache_view(k_cache),
      .v_cache = cache_view(v_cache),
      .k = cache_view(k),
      .v = cache_view(v),
      .slots = slot_map(k_cache, page_table),
      .lengths = lengths.as<int32_t>(),
      .num_nodes = num_nodes.as<int32_t>(),
      .stride_lengths = lengths.stride(0),
      .stride_num_nodes = num_nodes.stride(0),
      .capacity = capacity(k_cache, page_table),
      .batch = int32(k.size(0)),
      .nodes = int32(k.size(2)),
      .dtype = k.dtype,
  };
}

CommitParams commit_params(const std::vector<TensorView>& caches, const TensorView& lengths,
                           const TensorView& path, const TensorView& num_kept,
                           const OptionalView& page_table, const OptionalView& hidden,
                           const OptionalView& hidden_out, std::vector<CacheView>& cache_views) {
  for (const TensorView& cache : caches) {
    check_cache_rows("commit", cache, lengths.size(0), page_table);
    cache_views.push_back(cache_view(cache));
  }
  CommitParams params{};
  params.caches = cache_views.data();
  params.num_caches = static_cast<int64_t>(cache_views.size());
  params.lengths = lengths.as<int32_t>();
  params.path = path.as<int32_t>();
  params.num_kept = num_kept.as<int32_t>();
  params.stride_lengths = lengths.stride(0);
  params.stride_path_b = path.stride(0);
  params.stride_path_n = path.stride(1);
  params.stride_num_kept = num_kept.stride(0);
  params.batch = int32(path.size(0));
  params.nodes = int32(path.size(1));
  if (!caches.empty()) {
    params.slots = slot_map(caches.front(), page_table);
    params.capacity = capacity(caches.front(), page_table);
    params.dtype = caches.front().dtype;
  }
  if (hidden) {
    params.hidden = hidden->data;
    params.hidden_out = hidden_out->data;
    params.stride_hidden_b = hidden->stride(0);
    params.stride_hidden_n = hidden->stride(1);
    params.stride_hidden_f = hidden->stride(2);
    params.features = int32(hidden->size(2));
    params.hidden_dtype = hidden->dtype;
  }
  return params;
}

TreeAttentionParams tree_attention_params(const TensorView& q, const TensorView& k_cache,
                                          const TensorView& v_cache, const TensorView& ancestors,
                                          const TensorView& depths, const TensorView& lengths,
                                          const TensorView& num_nodes,
                                          const OptionalView& page_table, const OptionalView& sinks,
                                          const TensorView& out, const OptionalView& lse,
                                          double scale, int64_t window, double softcap) {
  check_attention(q, k_cache, ancestors, page_table, window, softcap);
  return {
      .q = cache_view(q),
      .k_cache = cache_view(k_cache),
      .v_cache = cache_view(v_cache),
      .slots = slot_map(k_cache, page_table),
      .ancestors = ancestors.as<int64_t>(),
      .depths = depths.as<int32_t>(),
      .lengths = lengths.as<int32_t>(),
      .num_nodes = num_nodes.as<int32_t>(),
      .sinks = sinks ? sinks->as<float>() : nullptr,
      .out = out.data,
      .lse = lse ? lse->as<float>() : nullptr,
      .capacity = std::min<int64_t>(capacity(k_cache, page_table), INT32_MAX),
      .batch = int32(q.size(0)),
      .nodes = int32(q.size(2)),
      .window = static_cast<int32_t>(std::min<int64_t>(window, INT32_MAX)),
      .scale = static_cast<float>(scale),
      .softcap = static_cast<float>(softcap),
      .dtype = q.dtype,
  };
}

void check_lengths(const TreeAttentionParams& params) {
  int64_t last = INT32_MIN;
  bool is_negative = false;
  for (int64_t b = 0; b < params.batch; ++b) {
    last = std::max(last, int64_t{params.lengths[b]} + params.num_nodes[b]);
    is_negative |= params.lengths[b] < 0;
  }
  if (last > params.capacity || is_negative) {
    fail("tree_attention: lengths + num_nodes must be in [0, %ld], got %ld", params.capacity, last);
  }
}

void check_max_nodes(int64_t max_nodes) {
  if (max_nodes < 1) fail("build_tree: max_nodes must be >= 1, got %ld", max_nodes);
}

BuildTreeParams build_tree_params(const TensorView& roots, const TensorView& candidates,
                                  const TensorView& logprobs, const TensorView& budgets,
                                  const OptionalView& candidate_parents, int64_t max_nodes,
                                  const BuiltTree& built) {
  const auto parents_stride = [&](int dim) {
    return candidate_parents ? candidate_parents->stride(dim) : 0;
  };
  return {
      .roots = roots.as<int64_t>(),
      .candidates = candidates.as<int64_t>(),
      .logprobs = logprobs.as<float>(),
      .budgets = budgets.as<int32_t>(),
      .candidate_parents = candidate_parents ? candidate_parents->as<int32_t>() : nullptr,
      .tokens = built.tokens,
      .parents = built.parents,
      .num_nodes = built.num_nodes,
      .scores = built.scores,
      .stride_roots = roots.stride(0),
      .stride_budgets = budgets.stride(0),
      .stride_candidates_b = candidates.stride(0),
      .stride_candidates_t = candidates.stride(1),
      .stride_candidates_k = candidates.stride(2),
      .stride_logprobs_b = logprobs.stride(0),
      .stride_logprobs_t = logprobs.stride(1),
      .stride_logprobs_k = logprobs.stride(2),
      .stride_parents_b = parents_stride(0),
      .stride_parents_t = parents_stride(1),
      .stride_parents_k = parents_stride(2),
      .batch = int32(candidates.size(0)),
      .depths = int32(candidates.size(1)),
      .width = int32(candidates.size(2)),
      .max_nodes = int32(max_nodes),
  };
}

PackedLinearParams packed_linear_params(const TensorView& x, const TensorView& panels,
                                        int64_t num_outputs, const OptionalView& bias,
                                        const TensorView& out) {
  return {
      .x = x.data,
      .panels = panels.data,
      .bias = bias ? bias->data : nullptr,
      .out = out.data,
      .stride_row = x.stride(0),
      .rows = int32(x.size(0)),
      .features = int32(x.size(1)),
      .outputs = int32(num_outputs),
      .dtype = x.dtype,
  };
}

RmsNormParams rms_norm_params(const TensorView& x, const TensorView& weight, double epsilon,
                              const TensorView& out) {
  return {
      .x = x.data,
      .weight = weight.data,
      .out = out.data,
      .stride_row = x.stride(0),
      .rows = int32(x.size(0)),
      .features = int32(x.size(1)),
      .epsilon = static_cast<float>(epsilon),
      .dtype = x.dtype,
  };
}

RopeParams rope_params(const TensorView& q, const TensorView& k, const TensorView& cos,
                       const TensorView& sin, void* q_out, void* k_out) {
  const auto heads = [](const TensorView& x, void* out) {
    return RopeHeads{x.data, out, x.stride(0), x.stride(1), x.stride(2), int32(x.size(1))};
  };
  return {
      .q = heads(q, q_out),
      .k = heads(k, k_out),
      .cos = cos.data,
      .sin = sin.data,
      .stride_cos_b = cos.stride(0),
      .stride_cos_n = cos.stride(1),
      .stride_sin_b = sin.stride(0),
      .stride_sin_n = sin.stride(1),
      .batch = int32(q.size(0)),
      .nodes = int32(q.size(2)),
      .head_dim = int32(q.size(3)),
      .dtype = q.dtype,
  };
}

void check_topk(int64_t vocab, int64_t k) {
  if (k < 1 || k > vocab) {
    fail("topk_logprobs: k must be in [1, V] = [1, %ld], got %ld", vocab, k);
  }
}

TopkLogprobsParams topk_logprobs_params(const TensorView& logits, int64_t k,
                                        const TensorView& logprobs, const TensorView& tokens) {
  return {
      .logits = logits.data,
      .logprobs = logprobs.as<float>(),
      .tokens = tokens.as<int64_t>(),
      .stride_row = logits.stride(0),
      .stride_vocab = logits.stride(1),
      .rows = int32(logits.size(0)),
      .vocab = int32(logits.size(1)),
      .k = int32(k),
      .dtype = logits.dtype,
  };
}

}  // namespace specdec
