// The first half of a pre-norm decoder layer, of which eager models make eight operators and more.
// The kernels of `rms_norm`, `packed_linear`, maybe `rms_norm`, and `rope` in turn: what lies
// between them stays in the cache, rounded to bfloat16 where eager values are. Bytes moved: the
// panels, once.
#include "../core/before_attention.hpp"

#include "../core/rope.hpp"
#include "layer_parts.hpp"
#include "scratch.hpp"

namespace specdec::SPECDEC_ISA {

void rope(const RopeParams&);

void before_attention(const BeforeAttentionParams& params) {
  thread_local Scratch<Bfloat16> normed_rows, flat_q, flat_k;
  const int32_t rows = params.batch * params.nodes;
  Bfloat16* normed = normed_rows.reserve(int64_t{rows} * params.features);
  Bfloat16* q = flat_q.reserve(int64_t{rows} * params.q.outputs);
  Bfloat16* k = flat_k.reserve(int64_t{rows} * params.k.outputs);
  norm(params.x, params.norm_weight, params.epsilon, rows, params.features, normed);
  const PackedWeight weights[] = {into(params.q, q), into(params.k, k),
                                  into(params.v, params.v_out)};
  multiply_packed({normed, params.features, rows, params.features}, weights, 3);
  const int32_t q_heads = rows * params.heads, k_heads = rows * params.groups;
  if (params.q_norm_weight != nullptr)
    norm(q, params.q_norm_weight, params.epsilon, q_heads, params.head_dim, q);
  if (params.k_norm_weight != nullptr)
    norm(k, params.k_norm_weight, params.epsilon, k_heads, params.head_dim, k);
  const auto heads = [&](const Bfloat16* x, int32_t num, Bfloat16* out) {
    const int64_t stride_n = int64_t{num} * params.head_dim;
    return RopeHeads{x, out, params.nodes * stride_n, params.head_dim, stride_n, num};
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
      .dtype = DType::kBfloat16,
  });
}

}  // namespace specdec::SPECDEC_ISA
