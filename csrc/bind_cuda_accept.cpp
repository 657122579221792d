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

}  // namespace
}  // namespace specdec

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels, CUDA, library) {
  library.impl("sample", TORCH_BOX(&specdec::sample_cuda));
}
