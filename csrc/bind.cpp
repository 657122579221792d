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

int64_t multiply_registers(int64_t rounds) { return cpu_kernels().multiply_registers(rounds); }

int64_t fingerprint(const Tensor& values) {
  const Tensor contiguous = packed(values);
  const int64_t num_bytes = contiguous.numel() * static_cast<int64_t>(contiguous.element_size());
  return static_cast<int64_t>(cpu_kernels().fingerprint(contiguous.const_data_ptr(), num_bytes));
}

void declare(std::string op, std::string table) { declare_shapes(op, table); }

}  // namespace
}  // namespace specdec

STABLE_TORCH_LIBRARY(specdec_kernels_native, library) {
  library.def("declare(str op, str table) -> ()");
  library.def("built_with_cuda() -> bool");
  library.def("cpu_capability() -> str");
  library.def("fingerprint(Tensor values) -> int");
  library.def("multiply_registers(int rounds) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels_native, CompositeExplicitAutograd, library) {
  library.impl("declare", TORCH_BOX(&specdec::declare));
  library.impl("built_with_cuda", TORCH_BOX(&specdec::built_with_cuda));
  library.impl("cpu_capability", TORCH_BOX(&specdec::cpu_capability));
  library.impl("fingerprint", TORCH_BOX(&specdec::fingerprint));
  library.impl("multiply_registers", TORCH_BOX(&specdec::multiply_registers));
}

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels, CPU, library) {
  library.impl("tree_mask", TORCH_BOX(&specdec::tree_mask_cpu));
  library.impl("write_kv", TORCH_BOX(&specdec::write_kv_cpu));
  library.impl("commit", TORCH_BOX(&specdec::commit_cpu));
  library.impl("build_tree", TORCH_BOX(&specdec::build_tree_cpu));
  library.impl("topk_logprobs", TORCH_BOX(&specdec::topk_logprobs_cpu));
  library.impl("tree_attention", TORCH_BOX(&specdec::tree_attention_cpu));
}
