// Binds the CUDA kernels that draw and accept tokens to the PyTorch dispatcher.
#include <torch/csrc/stable/library.h>

#include "accept_tensors.hpp"
#include "on_device.hpp"
#include "shape_table.hpp"

namespace specdec {
namespace {

// Memory of an output that is written only on request: [0, 0] otherwise.
Tensor on_request(const Tensor& like, bool is_wanted, int64_t rows, int64_t columns,
                  ScalarType dtype) {
  return is_wanted ? empty_like(like, {rows, columns}, dtype) : empty_like(like, {0, 0}, dtype);
}

// Freed at the end of the call, in the order of the stream: torch's allocator sees to that.
Tensor scratch_of(const Tensor& like, size_t bytes) {
  return empty_like(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

std::tuple<Tensor, Tensor, Tensor> sample_cuda(
    const Tensor& logits, const OptionalTensor& seeds, const OptionalTensor& positions,
    const OptionalTensor& temperature, const OptionalTensor& top_k, const OptionalTensor& top_p,
    const OptionalTensor& min_p, const OptionalTensor& bias, const OptionalTensor& mask,
    const OptionalTensor& streams, const OptionalTensor& coins, int64_t num_draws, int64_t domain,
    bool return_probs) {
  const OnDevice device("sample", logits);
  check_shapes("sample", {logits, seeds, positions, temperature, top_k, top_p, min_p, bias, mask,
                          streams, coins});
  const SamplingTensors sampling("sample", seeds, positions, temperature, top_k, top_p, min_p,
                                 streams, coins);
  check_draws(num_draws, coins.has_value());
  const int64_t rows = logits.size(0);
  Tensor tokens = empty_like(logits, {rows, num_draws}, ScalarType::Long);
  Tensor status = empty_like(logits, {rows}, ScalarType::Int);
  Tensor probs = on_request(logits, return_probs, rows, logits.size(1), ScalarType::Float);
  const SampleParams params{
      .sampling = sampling.params(logits, bias, mask, static_cast<Domain>(domain)),
      .coins = data<double>(sampling.coins),
      .tokens = mutable_data<int64_t>(tokens),
      .status = mutable_data<int32_t>(status),
      .probs = return_probs ? mutable_data<float>(probs) : nullptr,
      .num_draws = int32(num_draws),
  };
  Tensor scratch = scratch_of(logits, cuda::sample_scratch_bytes(params));
  cuda::sample(params, scratch.mutable_data_ptr(), device.stream());
  return {tokens, status, probs};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> verify_cuda(
    const Tensor& logits, const Tensor& tokens, const Tensor& parents, const Tensor& num_nodes,
    const OptionalTensor& seeds, const OptionalTensor& positions, const OptionalTensor& temperature,
    const OptionalTensor& top_k, const OptionalTensor& top_p, const OptionalTensor& min_p,
    const OptionalTensor& bias, const OptionalTensor& mask, const OptionalTensor& kinds,
    const OptionalTensor& draft_rows, const OptionalTensor& draft_probs,
    const OptionalTensor& draft_logits, const OptionalTensor& draft_offsets,
    const OptionalTensor& coins, const std::string& rule_name, bool lossy, double typical_epsilon,
    double typical_delta, bool return_logprobs, bool return_law) {
  const OnDevice device("verify", logits);
  check_shapes("verify", {logits, tokens, parents, num_nodes, seeds, positions, temperature, top_k,
                          top_p, min_p, bias, mask, kinds, draft_rows, draft_probs, draft_logits,
                          draft_offsets, coins});
  const Rule rule = parse_rule(rule_name, lossy);
  check_laws(draft_rows.has_value(), draft_probs.has_value(), draft_logits.has_value());
  const SamplingTensors sampling("verify", seeds, positions, temperature, top_k, top_p, min_p,
                                 std::nullopt, coins);
  const Tensor sizes = packed(num_nodes);
  const OptionalTensor packed_kinds = packed(kinds), rows = packed(draft_rows),
                       offsets = packed(draft_offsets);
  const int64_t batch = logits.size(0), nodes = logits.size(1), vocab = logits.size(2);
  Tensor path = empty_like(logits, {batch, nodes}, ScalarType::Int);
  Tensor num_accepted = empty_like(logits, {batch}, ScalarType::Int);
  Tensor next_tokens = empty_like(logits, {batch}, ScalarType::Long);
  Tensor status = empty_like(logits, {batch}, ScalarType::Int);
  Tensor logprobs = on_request(logits, return_logprobs, batch, nodes, ScalarType::Float);
  Tensor margins = on_request(logits, return_logprobs, batch, nodes, ScalarType::Float);
  Tensor thresholds = on_request(logits, return_law, batch, nodes, ScalarType::Double);
  Tensor next_law = on_request(logits, return_law, batch, vocab, ScalarType::Double);
  VerifyParams params =
      tree_params(sampling.params(logits, bias, mask, Domain::kTarget), tokens, parents, sizes,
                  sampling.coins, rule, typical_epsilon, typical_delta);
  params.draft = draft_params(packed_kinds, rows, draft_probs ? draft_probs : draft_logits,
                              !draft_probs, nullptr);
  if (params.draft.laws != nullptr) params.draft.offsets = data<int64_t>(offsets);
  params.path = mutable_data<int32_t>(path);
  params.num_accepted = mutable_data<int32_t>(num_accepted);
  params.next_tokens = mutable_data<int64_t>(next_tokens);
  params.status = mutable_data<int32_t>(status);
  params.logprobs = return_logprobs ? mutable_data<float>(logprobs) : nullptr;
  params.margins = return_logprobs ? mutable_data<float>(margins) : nullptr;
  params.thresholds = return_law ? mutable_data<double>(thresholds) : nullptr;
  params.next_law = return_law ? mutable_data<double>(next_law) : nullptr;
  Tensor scratch = scratch_of(logits, cuda::verify_scratch_bytes(params));
  cuda::verify(params, scratch.mutable_data_ptr(), device.stream());
  return {path, num_accepted, next_tokens, status, logprobs, margins, thresholds, next_law};
}

}  // namespace
}  // namespace specdec

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels, CUDA, library) {
  library.impl("sample", TORCH_BOX(&specdec::sample_cuda));
  library.impl("verify", TORCH_BOX(&specdec::verify_cuda));
}
