// The first half of a pre-norm decoder layer, of which eager models make eight operators and more.
// The kernels of `rms_norm`, `packed_linear`, maybe `rms_norm`, and `rope` in turn: what lies
// between them stays in the cache, rounded to the dtype where eager values are. Bytes moved: the
// panels, once.
#include "../core/before_attention.hpp"

#include "../core/rope.hpp"
#include "layer_parts.hpp"
#include "scratch.hpp"

namespace specdec::SPECDEC_ISA {

void rope(const RopeParams&);

namespace {

template <class T>
void half_layer(const BeforeAttentionParams& params) {
  thread_local Scratch<T> normed_rows, flat_q, flat_k;
  const int32_t rows = params.batch * params.nodes;
  const T* x = static_cast<const T*>(params.x);
  T* q = flat_q.reserve(int64_t{rows} * params.q.outputs);
  T* k = flat_k.reserve(int64_t{rows} * params.k.outputs);
  if (params.norm_weight != nullptr) {
    T* normed = normed_rows.reserve(int64_t{rows} * params.features);
    norm(x, params.norm_weight, params.epsilon, rows, params.features, normed, params.dtype);
    x = normed;
  }
  const PackedWeight<T> weights[] = {into(params.q, q), into(params.k, k),
                                     into(params.v, static_cast<T*>(params.v_out))};
  multiply_packed<T>({x, params.features, rows, params.features}, weights, 3);
  const int32_t q_heads = rows * params.heads, k_heads = rows * params.groups;
  if (params.q_norm_weight != nullptr)
    norm(q, params.q_norm_weight, params.epsilon, q_heads, params.head_dim, q, params.dtype);
  if (params.k_norm_weight != nullptr)
    norm(k, params.k_norm_weight, params.epsilon, k_heads, params.head_dim, k, params.dtype);
  const auto heads = [&](const T* values, int32_t num, void* out) {
    const int64_t stride_n = int64_t{num} * params.head_dim;
    return RopeHeads{values, out, params.nodes * stride_n, params.head_dim, stride_n, num};
  };
  rope({
      .q = heads(q, params.heads, params.q_out),
      .k = heads(k, params.groups, params.k_out),
      .cos = params.cos,
      .sin = params.sin,
      .stride_cos_b = params.stride_cos_b,
      .stride_cos_n = params.stride_cos_n,
      .stride_sin_b = params.stride_sin_b,
      .stride_sin_n = params.stride_sin_n,
      .batch = params.batch,
      .nodes = params.nodes,
      .head_dim = params.head_dim,
      .dtype = params.dtype,
  });
}

}  // namespace

void before_attention(const BeforeAttentionParams& params) {
  with_dtype(params.dtype, [&](auto tag) { half_layer<decltype(tag)>(params); });
}

}  // namespace specdec::SPECDEC_ISA
