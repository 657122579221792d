// From tensors to what the kernels take, the same for every backend: the CPU and CUDA bindings
// describe torch's tensors with TensorView, the emulated kernels those of their tests.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "core/build_tree.hpp"
#include "core/cache.hpp"
#include "core/commit.hpp"
#include "core/packed_linear.hpp"
#include "core/rms_norm.hpp"
#include "core/rope.hpp"
#include "core/topk_logprobs.hpp"
#include "core/tree_attention.hpp"
#include "core/tree_mask.hpp"
#include "core/write_kv.hpp"

namespace specdec {

// A tensor of up to four dimensions, strides in elements; the dtype of floats.
struct TensorView {
  void* data;
  DType dtype;
  int64_t sizes[4], strides[4];

  int64_t size(int dim) const { return sizes[dim]; }
  int64_t stride(int dim) const { return strides[dim]; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

using OptionalView = std::optional<TensorView>;

int32_t int32(int64_t size);

inline int64_t num_words(int64_t nodes) { return (nodes + 63) / 64; }

CacheView cache_view(const TensorView& cache);
SlotMap slot_map(const TensorView& cache, const OptionalView& page_table);

// Slots of one request.
int64_t capacity(const TensorView& cache, const OptionalView& page_table);

// A contiguous cache has one row per request.
void check_cache_rows(const char* op, const TensorView& cache, int64_t batch,
                      const OptionalView& page_table);

TreeMaskParams tree_mask_params(const TensorView& parents, const TensorView& num_nodes,
                                const TensorView& ancestors, const TensorView& depths);

WriteKvParams write_kv_params(const TensorView& k, const TensorView& v, const TensorView& k_cache,
                              const TensorView& v_cache, const TensorView& lengths,
                              const TensorView& num_nodes, const OptionalView& page_table);

// `caches` are the keys, then the values, of every layer; the params point into `cache_views`.
CommitParams commit_params(const std::vector<TensorView>& caches, const TensorView& lengths,
                           const TensorView& path, const TensorView& num_kept,
                           const OptionalView& page_table, const OptionalView& hidden,
                           const OptionalView& hidden_out, std::vector<CacheView>& cache_views);

// Checks of sizes and options that no call may have; those of lengths are the host's. `ancestors`,
// `depths`, `lengths`, `num_nodes` and `sinks` must be contiguous.
TreeAttentionParams tree_attention_params(const TensorView& q, const TensorView& k_cache,
                                          const TensorView& v_cache, const TensorView& ancestors,
                                          const TensorView& depths, const TensorView& lengths,
                                          const TensorView& num_nodes,
                                          const OptionalView& page_table, const OptionalView& sinks,
                                          const TensorView& out, const OptionalView& lse,
                                          double scale, int64_t window, double softcap);

// What the reference rejects in the contents of tensors, where the host sees them.
void check_lengths(const TreeAttentionParams& params);

// The results of build_tree, contiguous.
struct BuiltTree {
  int64_t* tokens;     // [B, N]
  int32_t* parents;    // [B, N]
  int32_t* num_nodes;  // [B]
  float* scores;       // [B, N]
};

void check_max_nodes(int64_t max_nodes);
BuildTreeParams build_tree_params(const TensorView& roots, const TensorView& candidates,
                                  const TensorView& logprobs, const TensorView& budgets,
                                  const OptionalView& candidate_parents, int64_t max_nodes,
                                  const BuiltTree& built);

PackedLinearParams packed_linear_params(const TensorView& x, const TensorView& panels,
                                        int64_t num_outputs, const OptionalView& bias,
                                        const TensorView& out);

RmsNormParams rms_norm_params(const TensorView& x, const TensorView& weight, double epsilon,
                              const TensorView& out);

RopeParams rope_params(const TensorView& q, const TensorView& k, const TensorView& cos,
                       const TensorView& sin, void* q_out, void* k_out);

void check_topk(int64_t vocab, int64_t k);
TopkLogprobsParams topk_logprobs_params(const TensorView& logits, int64_t k,
                                        const TensorView& logprobs, const TensorView& tokens);

}  // namespace specdec
