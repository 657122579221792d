// Binds the CPU kernels that draw and accept tokens to the PyTorch dispatcher, with the value
// checks of the references.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "accept_tensors.hpp"
#include "core/acceptance.hpp"
#include "cpu/kernels.hpp"
#include "shape_table.hpp"

namespace specdec {
namespace {

// Memory of an output that is written only on request: [0, 0] otherwise.
Output on_request(bool is_wanted, int64_t rows, int64_t columns, ScalarType dtype) {
  return is_wanted ? Output({rows, columns}, dtype) : Output({0, 0}, dtype);
}

auto sample_cpu(const Tensor& logits, const OptionalTensor& seeds, const OptionalTensor& positions,
                const OptionalTensor& temperature, const OptionalTensor& top_k,
                const OptionalTensor& top_p, const OptionalTensor& min_p,
                const OptionalTensor& bias, const OptionalTensor& mask,
                const OptionalTensor& streams, const OptionalTensor& coins, int64_t num_draws,
                int64_t domain, bool return_probs) {
  check_shapes("sample", {logits, seeds, positions, temperature, top_k, top_p, min_p, bias, mask,
                          streams, coins});
  const SamplingTensors sampling("sample", seeds, positions, temperature, top_k, top_p, min_p,
                                 streams, coins);
  check_draws(num_draws, coins.has_value());
  const int64_t rows = logits.size(0);
  Output tokens({rows, num_draws}, ScalarType::Long);
  Output status({rows}, ScalarType::Int);
  Output probs = on_request(return_probs, rows, logits.size(1), ScalarType::Float);
  cpu_kernels().sample({
      .sampling = sampling.params(logits, bias, mask, static_cast<Domain>(domain)),
      .coins = data<double>(sampling.coins),
      .tokens = tokens.data<int64_t>(),
      .status = status.data<int32_t>(),
      .probs = return_probs ? probs.data<float>() : nullptr,
      .num_draws = int32(num_draws),
  });
  return released(tokens, status, probs);
}

// The drafted trees and the laws of their sampled nodes, contiguous where a kernel wants them so.
struct DraftTensors {
  const Tensor& parents;
  Tensor num_nodes;
  OptionalTensor kinds, rows, laws;
  bool is_logits;
  std::vector<int32_t> draft_ids;

  DraftTensors(const Tensor& parents, const Tensor& num_nodes, const OptionalTensor& kinds,
               const OptionalTensor& rows, const OptionalTensor& probs,
               const OptionalTensor& logits, const OptionalTensor& offsets, int64_t vocab)
      : parents(parents),
        num_nodes(packed(num_nodes)),
        kinds(packed(kinds)),
        rows(packed(rows)),
        laws(probs ? probs : logits),
        is_logits(!probs) {
    check_laws(rows.has_value(), probs.has_value(), logits.has_value());
    if (laws) map_ids(offsets, vocab);
  }

  // Fills `draft_ids` where the draft's ids are not the target's.
  void map_ids(const OptionalTensor& offsets, int64_t vocab) {
    const int64_t draft_vocab = laws->size(2);
    bool fits = offsets || draft_vocab <= vocab;
    if (offsets) draft_ids.assign(static_cast<size_t>(vocab), -1);
    const OptionalTensor values = packed(offsets);
    for (int64_t u = 0; offsets && u < draft_vocab && fits; ++u) {
      const int64_t token = u + data<int64_t>(values)[u];
      fits = token >= 0 && token < vocab && draft_ids[static_cast<size_t>(token)] < 0;
      if (fits) draft_ids[static_cast<size_t>(token)] = static_cast<int32_t>(u);
    }
    if (!fits)
      fail("verify: draft ids must map to distinct target ids in [0, V) = [0, %ld)", vocab);
  }

  int64_t parent(int64_t b, int64_t i) const {
    return data<int32_t>(parents)[b * parents.stride(0) + i * parents.stride(1)];
  }

  int kind(int64_t b, int64_t i) const {
    return kinds ? data<int8_t>(*kinds)[b * parents.size(1) + i] : 0;
  }

  void check(Rule rule) const {
    if (!kinds && rule != Rule::kBlock) return;
    for (int64_t b = 0; b < parents.size(0); ++b) {
      const int64_t size = std::min<int64_t>(data<int32_t>(num_nodes)[b], parents.size(1));
      for (int64_t i = 1; i < size; ++i) check_node(rule, b, i);
      for (int64_t i = 1; i < size; ++i) {
        if (kind(b, i) != kOneHot) check_law(b, parent(b, i));
      }
    }
  }

  void check_node(Rule rule, int64_t b, int64_t i) const {
    const int value = kind(b, i);
    const char* name = kRules[static_cast<size_t>(rule)];
    if (value < kOneHot || value > kSampledWithoutReplacement) {
      fail("verify: kinds[%ld, %ld] must be 0, 1 or 2, got %d", b, i, value);
    }
    if (value != kOneHot && (rule == Rule::kWalk || rule == Rule::kTypical)) {
      fail("verify: rule '%s' tests one-hot drafts only, got kinds[%ld, %ld] = %d", name, b, i,
           value);
    }
    if (rule == Rule::kBlock && parent(b, i) != i - 1) {
      fail("verify: rule 'block' tests chains, got parents[%ld, %ld] = %ld", b, i, parent(b, i));
    }
    if (rule != Rule::kGdTraversal || value == kOneHot) return;
    for (int64_t j = 1; j < i; ++j) {
      if (parent(b, j) == parent(b, i)) {
        fail(
            "verify: rule 'gd_traversal' tests one sampled child, before the others, got "
            "kinds[%ld, %ld] = %d",
            b, i, value);
      }
    }
  }

  void check_law(int64_t b, int64_t node) const {
    const char* rule =
        "verify: draft_rows[%ld, %ld] must name the draft law of its sampled children, got %s";
    if (!rows) fail(rule, b, node, "None");
    const bool is_node = node >= 0 && node < parents.size(1);
    const int64_t row = is_node ? data<int32_t>(*rows)[b * parents.size(1) + node] : -1;
    if (row < 0 || row >= laws->size(1)) fail(rule, b, node, std::to_string(row).c_str());
  }

  DraftParams params() const {
    return draft_params(kinds, rows, laws, is_logits,
                        draft_ids.empty() ? nullptr : draft_ids.data());
  }
};

auto verify_cpu(const Tensor& logits, const Tensor& tokens, const Tensor& parents,
                const Tensor& num_nodes, const OptionalTensor& seeds,
                const OptionalTensor& positions, const OptionalTensor& temperature,
                const OptionalTensor& top_k, const OptionalTensor& top_p,
                const OptionalTensor& min_p, const OptionalTensor& bias, const OptionalTensor& mask,
                const OptionalTensor& kinds, const OptionalTensor& draft_rows,
                const OptionalTensor& draft_probs, const OptionalTensor& draft_logits,
                const OptionalTensor& draft_offsets, const OptionalTensor& coins,
                const std::string& rule_name, bool lossy, double typical_epsilon,
                double typical_delta, bool return_logprobs, bool return_law) {
  check_shapes("verify", {logits, tokens, parents, num_nodes, seeds, positions, temperature, top_k,
                          top_p, min_p, bias, mask, kinds, draft_rows, draft_probs, draft_logits,
                          draft_offsets, coins});
  const Rule rule = parse_rule(rule_name, lossy);
  const int64_t batch = logits.size(0), nodes = logits.size(1), vocab = logits.size(2);
  const DraftTensors draft(parents, num_nodes, kinds, draft_rows, draft_probs, draft_logits,
                           draft_offsets, vocab);
  draft.check(rule);
  const SamplingTensors sampling("verify", seeds, positions, temperature, top_k, top_p, min_p,
                                 std::nullopt, coins);
  Output path({batch, nodes}, ScalarType::Int);
  Output num_accepted({batch}, ScalarType::Int);
  Output next_tokens({batch}, ScalarType::Long);
  Output status({batch}, ScalarType::Int);
  Output logprobs = on_request(return_logprobs, batch, nodes, ScalarType::Float);
  Output margins = on_request(return_logprobs, batch, nodes, ScalarType::Float);
  Output thresholds = on_request(return_law, batch, nodes, ScalarType::Double);
  Output next_law = on_request(return_law, batch, vocab, ScalarType::Double);
  VerifyParams params =
      tree_params(sampling.params(logits, bias, mask, Domain::kTarget), tokens, parents,
                  draft.num_nodes, sampling.coins, rule, typical_epsilon, typical_delta);
  params.draft = draft.params();
  params.path = path.data<int32_t>();
  params.num_accepted = num_accepted.data<int32_t>();
  params.next_tokens = next_tokens.data<int64_t>();
  params.status = status.data<int32_t>();
  params.logprobs = return_logprobs ? logprobs.data<float>() : nullptr;
  params.margins = return_logprobs ? margins.data<float>() : nullptr;
  params.thresholds = return_law ? thresholds.data<double>() : nullptr;
  params.next_law = return_law ? next_law.data<double>() : nullptr;
  cpu_kernels().verify(params);
  return released(path, num_accepted, next_tokens, status, logprobs, margins, thresholds, next_law);
}

}  // namespace
}  // namespace specdec

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels, CPU, library) {
  library.impl("sample", TORCH_BOX(&specdec::sample_cpu));
  library.impl("verify", TORCH_BOX(&specdec::verify_cpu));
}
