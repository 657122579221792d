// Binds the CUDA kernels to the PyTorch dispatcher: current stream, device of the first tensor.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "cuda/kernels.hpp"
#include "operators.hpp"

// In the CUDA part of PyTorch only, so weak: the library also loads where that is missing. Stream
// has a native handle from PyTorch 2.13 on, this function is in every version.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace specdec {
namespace {

// The device of a tensor is current, and its current stream known, while this lives.
class OnDevice {
 public:
  OnDevice(const char* op, const Tensor& tensor) : guard_(tensor.get_device_index()) {
    if (aoti_torch_get_current_cuda_stream == nullptr) fail("%s: PyTorch has no CUDA here", op);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }

  cuda::Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_ = nullptr;
};

std::tuple<Tensor, Tensor> tree_mask_cuda(const Tensor& parents, const Tensor& num_nodes) {
  const OnDevice device("tree_mask", parents);
  return tree_mask(parents, num_nodes,
                   [&](const TreeMaskParams& params) { cuda::tree_mask(params, device.stream()); });
}

void write_kv_cuda(const Tensor& k, const Tensor& v, Tensor k_cache, Tensor v_cache,
                   const Tensor& lengths, const Tensor& num_nodes, OptionalTensor page_table) {
  const OnDevice device("write_kv", k);
  write_kv(k, v, k_cache, v_cache, lengths, num_nodes, page_table,
           [&](const WriteKvParams& params) { cuda::write_kv(params, device.stream()); });
}

Tensor commit_cuda(std::vector<Tensor> k_caches, std::vector<Tensor> v_caches, Tensor lengths,
                   const Tensor& path, const Tensor& num_kept, OptionalTensor page_table,
                   OptionalTensor hidden) {
  const OnDevice device("commit", lengths);
  return commit(k_caches, v_caches, lengths, path, num_kept, page_table, hidden,
                [&](const CommitParams& params) { cuda::commit(params, device.stream()); });
}

std::tuple<Tensor, Tensor> topk_logprobs_cuda(const Tensor& logits, int64_t k) {
  const OnDevice device("topk_logprobs", logits);
  return topk_logprobs(logits, k, [&](const TopkLogprobsParams& params) {
    const int64_t bytes = static_cast<int64_t>(cuda::topk_logprobs_scratch_bytes(params));
    // Freed when this returns, in the order of the stream: torch's allocator sees to that.
    Tensor scratch = empty_like(logits, {bytes}, ScalarType::Byte);
    cuda::topk_logprobs(params, scratch.mutable_data_ptr(), device.stream());
  });
}

std::tuple<Tensor, Tensor> tree_attention_cuda(const Tensor& q, const Tensor& k_cache,
                                               const Tensor& v_cache, const Tensor& ancestors,
                                               const Tensor& depths, const Tensor& lengths,
                                               const Tensor& num_nodes, OptionalTensor page_table,
                                               OptionalTensor sinks, double scale, int64_t window,
                                               double softcap, bool return_lse) {
  const OnDevice device("tree_attention", q);
  return tree_attention(
      q, k_cache, v_cache, ancestors, depths, lengths, num_nodes, page_table, sinks, scale, window,
      softcap, return_lse, [&](const TreeAttentionParams& params) {
        const int64_t bytes = static_cast<int64_t>(cuda::tree_attention_scratch_bytes(params));
        Tensor scratch = empty_like(q, {bytes}, ScalarType::Byte);
        cuda::tree_attention(params, scratch.mutable_data_ptr(), device.stream());
      });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> build_tree_cuda(
    const Tensor& roots, const Tensor& candidates, const Tensor& logprobs, const Tensor& budgets,
    OptionalTensor candidate_parents, int64_t max_nodes) {
  const OnDevice device("build_tree", roots);
  check_shapes("build_tree", {roots, candidates, logprobs, budgets, candidate_parents});
  check_max_nodes(max_nodes);
  const int64_t batch = roots.size(0);
  Tensor tokens = empty_like(roots, {batch, max_nodes}, ScalarType::Long);
  Tensor parents = empty_like(roots, {batch, max_nodes}, ScalarType::Int);
  Tensor num_nodes = empty_like(roots, {batch}, ScalarType::Int);
  Tensor scores = empty_like(roots, {batch, max_nodes}, ScalarType::Float);
  const BuildTreeParams params =
      build_tree_params(view(roots), view(candidates), view(logprobs), view(budgets),
                        view(candidate_parents), max_nodes,
                        {mutable_data<int64_t>(tokens), mutable_data<int32_t>(parents),
                         mutable_data<int32_t>(num_nodes), mutable_data<float>(scores)});
  const int64_t bytes = static_cast<int64_t>(cuda::build_tree_scratch_bytes(params));
  Tensor scratch = empty_like(roots, {bytes}, ScalarType::Byte);
  cuda::build_tree(params, scratch.mutable_data_ptr(), device.stream());
  return {tokens, parents, num_nodes, scores};
}

}  // namespace
}  // namespace specdec

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels, CUDA, library) {
  library.impl("tree_mask", TORCH_BOX(&specdec::tree_mask_cuda));
  library.impl("write_kv", TORCH_BOX(&specdec::write_kv_cuda));
  library.impl("commit", TORCH_BOX(&specdec::commit_cuda));
  library.impl("build_tree", TORCH_BOX(&specdec::build_tree_cuda));
  library.impl("topk_logprobs", TORCH_BOX(&specdec::topk_logprobs_cuda));
  library.impl("tree_attention", TORCH_BOX(&specdec::tree_attention_cuda));
}
