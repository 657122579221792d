// Binds the CPU kernels of caches and attention to the PyTorch dispatcher: tensors to parameter
// structs, with the value checks of the references. Schemas come from Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/tree_attention.hpp"
#include "cpu/error.hpp"
#include "cpu/kernels.hpp"
#include "operators.hpp"
#include "shape_table.hpp"
#include "tensor.hpp"

namespace specdec {
namespace {

std::tuple<Tensor, Tensor> tree_mask_cpu(const Tensor& parents, const Tensor& num_nodes) {
  return tree_mask(parents, num_nodes, cpu_kernels().tree_mask);
}

void write_kv_cpu(const Tensor& k, const Tensor& v, Tensor k_cache, Tensor v_cache,
                  const Tensor& lengths, const Tensor& num_nodes, OptionalTensor page_table) {
  write_kv(k, v, k_cache, v_cache, lengths, num_nodes, page_table, cpu_kernels().write_kv);
}

Tensor commit_cpu(std::vector<Tensor> k_caches, std::vector<Tensor> v_caches, Tensor lengths,
                  const Tensor& path, const Tensor& num_kept, OptionalTensor page_table,
                  OptionalTensor hidden) {
  return commit(k_caches, v_caches, lengths, path, num_kept, page_table, hidden,
                cpu_kernels().commit);
}

std::tuple<Tensor, Tensor> topk_logprobs_cpu(const Tensor& logits, int64_t k) {
  return topk_logprobs(logits, k, cpu_kernels().topk_logprobs);
}

auto build_tree_cpu(const Tensor& roots, const Tensor& candidates, const Tensor& logprobs,
                    const Tensor& budgets, OptionalTensor candidate_parents, int64_t max_nodes) {
  check_shapes("build_tree", {roots, candidates, logprobs, budgets, candidate_parents});
  check_max_nodes(max_nodes);
  const int64_t batch = roots.size(0);
  Output tokens({batch, max_nodes}, ScalarType::Long);
  Output parents({batch, max_nodes}, ScalarType::Int);
  Output num_nodes({batch}, ScalarType::Int);
  Output scores({batch, max_nodes}, ScalarType::Float);
  cpu_kernels().build_tree(build_tree_params(view(roots), view(candidates), view(logprobs),
                                             view(budgets), view(candidate_parents), max_nodes,
                                             {tokens.data<int64_t>(), parents.data<int32_t>(),
                                              num_nodes.data<int32_t>(), scores.data<float>()}));
  return released(tokens, parents, num_nodes, scores);
}

void check_panels(const Tensor& x, const Tensor& panels, int64_t num_outputs,
                  const OptionalTensor& bias) {
  const int64_t outputs = num_outputs > 0 ? (num_outputs + kPanelOutputs - 1) / kPanelOutputs : 0;
  const int64_t pairs = (x.size(1) + 1) / 2;
  if (panels.size(0) != outputs || panels.size(1) != pairs || panels.size(2) != kPanelOutputs ||
      panels.size(3) != 2) {
    fail(
        "packed_linear: panels must be [ceil(num_outputs / 16), ceil(F / 2), 16, 2] = [%ld, %ld, "
        "16, 2], got [%ld, %ld, %ld, %ld]",
        outputs, pairs, panels.size(0), panels.size(1), panels.size(2), panels.size(3));
  }
  if (bias && bias->size(0) != num_outputs) {
    fail("packed_linear: bias must be [num_outputs] = [%ld], got [%ld]", num_outputs,
         bias->size(0));
  }
}

// The tensor, or a copy with unit stride in its last dimension.
Tensor with_unit_stride(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) > 1 && x.stride(last) != 1 ? torch::stable::contiguous(x) : x;
}

auto packed_linear_cpu(const Tensor& x, const Tensor& panels, int64_t num_outputs,
                       OptionalTensor bias) {
  check_shapes("packed_linear", {x, panels, bias});
  check_panels(x, panels, num_outputs, bias);
  const Tensor rows = with_unit_stride(x);
  const Tensor packed_panels = packed(panels);
  const OptionalTensor packed_bias = packed(bias);
  Output out({x.size(0), num_outputs}, ScalarType::BFloat16);
  const TensorView out_view{
      out.data<Bfloat16>(), DType::kBfloat16, {x.size(0), num_outputs}, {num_outputs, 1}};
  cpu_kernels().packed_linear(packed_linear_params(view(rows), view(packed_panels), num_outputs,
                                                   view(packed_bias), out_view));
  return released(out);
}

auto rms_norm_cpu(const Tensor& x, const Tensor& weight, double epsilon) {
  check_shapes("rms_norm", {x, weight});
  const Tensor rows = with_unit_stride(x), scale = packed(weight);
  const TensorView rows_view = view(rows);
  Output out({x.size(0), x.size(1)}, x.scalar_type());
  const TensorView out_view{
      out.data<void>(), rows_view.dtype, {x.size(0), x.size(1)}, {x.size(1), 1}};
  cpu_kernels().rms_norm(rms_norm_params(rows_view, view(scale), epsilon, out_view));
  return released(out);
}

auto rope_cpu(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin) {
  check_shapes("rope", {q, k, cos, sin});
  if (q.size(3) % 2 != 0) {
    fail("rope: D must be even, got %ld", q.size(3));
  }
  const Tensor queries = with_unit_stride(q), keys = with_unit_stride(k);
  const Tensor cosines = with_unit_stride(cos), sines = with_unit_stride(sin);
  Output q_out({q.size(0), q.size(1), q.size(2), q.size(3)}, q.scalar_type());
  Output k_out({k.size(0), k.size(1), k.size(2), k.size(3)}, q.scalar_type());
  cpu_kernels().rope(rope_params(view(queries), view(keys), view(cosines), view(sines),
                                 q_out.data<void>(), k_out.data<void>()));
  return released(q_out, k_out);
}

// What the reference rejects in tensor contents.
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

std::tuple<Tensor, Tensor> tree_attention_cpu(const Tensor& q, const Tensor& k_cache,
                                              const Tensor& v_cache, const Tensor& ancestors,
                                              const Tensor& depths, const Tensor& lengths,
                                              const Tensor& num_nodes, OptionalTensor page_table,
                                              OptionalTensor sinks, double scale, int64_t window,
                                              double softcap, bool return_lse) {
  return tree_attention(q, k_cache, v_cache, ancestors, depths, lengths, num_nodes, page_table,
                        sinks, scale, window, softcap, return_lse,
                        [&](const TreeAttentionParams& params) {
                          check_lengths(params);
                          cpu_kernels().tree_attention(params);
                        });
}

bool built_with_cuda() {
#if defined(SPECDEC_WITH_CUDA)
  return true;
#else
  return false;
#endif
}

std::string cpu_capability() { return cpu_kernels().name; }

void declare(std::string op, std::string table) { declare_shapes(op, table); }

}  // namespace
}  // namespace specdec

STABLE_TORCH_LIBRARY(specdec_kernels_native, library) {
  library.def("declare(str op, str table) -> ()");
  library.def("built_with_cuda() -> bool");
  library.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels_native, CompositeExplicitAutograd, library) {
  library.impl("declare", TORCH_BOX(&specdec::declare));
  library.impl("built_with_cuda", TORCH_BOX(&specdec::built_with_cuda));
  library.impl("cpu_capability", TORCH_BOX(&specdec::cpu_capability));
}

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels, CPU, library) {
  library.impl("tree_mask", TORCH_BOX(&specdec::tree_mask_cpu));
  library.impl("write_kv", TORCH_BOX(&specdec::write_kv_cpu));
  library.impl("commit", TORCH_BOX(&specdec::commit_cpu));
  library.impl("build_tree", TORCH_BOX(&specdec::build_tree_cpu));
  library.impl("packed_linear", TORCH_BOX(&specdec::packed_linear_cpu));
  library.impl("rms_norm", TORCH_BOX(&specdec::rms_norm_cpu));
  library.impl("rope", TORCH_BOX(&specdec::rope_cpu));
  library.impl("topk_logprobs", TORCH_BOX(&specdec::topk_logprobs_cpu));
  library.impl("tree_attention", TORCH_BOX(&specdec::tree_attention_cpu));
}
