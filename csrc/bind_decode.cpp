// Binds the CPU kernels of attention and acceptance to the PyTorch dispatcher, with the value
// checks of the references.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <charconv>
#include <string>
#include <tuple>

#include "core/philox.hpp"
#include "cpu/error.hpp"
#include "cpu/kernels.hpp"
#include "cpu/tree_attention.hpp"
#include "cpu/verify.hpp"
#include "shape_table.hpp"
#include "tensor.hpp"

namespace specdec {
namespace {

Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

OptionalTensor packed(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(packed(*tensor)) : std::nullopt;
}

// As Python prints a float.
std::string number(double value) {
  char text[32];
  std::string printed(text, std::to_chars(text, text + sizeof text, value).ptr);
  return printed.find_first_of(".en") == std::string::npos ? printed + ".0" : printed;
}

void check_attention(const Tensor& q, const Tensor& k_cache, const Tensor& ancestors,
                     const Tensor& lengths, const Tensor& num_nodes,
                     const OptionalTensor& page_table, int64_t window, double softcap) {
  const int64_t batch = q.size(0), heads = q.size(1), groups = k_cache.size(1),
                words = num_words(q.size(2));
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
  check_cache_rows("tree_attention", k_cache, lengths, page_table);
  if (window < 0 || softcap < 0) {
    fail("tree_attention: window and softcap must be >= 0, got %ld and %s", window,
         number(softcap).c_str());
  }
  int64_t last = INT32_MIN;
  bool is_negative = false;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = data<int32_t>(lengths)[b];
    last = std::max(last, length + data<int32_t>(num_nodes)[b]);
    is_negative |= length < 0;
  }
  if (last > capacity(k_cache, page_table) || is_negative) {
    fail("tree_attention: lengths + num_nodes must be in [0, %ld], got %ld",
         capacity(k_cache, page_table), last);
  }
}

std::tuple<Tensor, Tensor> tree_attention_cpu(const Tensor& q, const Tensor& k_cache,
                                              const Tensor& v_cache, const Tensor& ancestors,
                                              const Tensor& depths, const Tensor& lengths,
                                              const Tensor& num_nodes, OptionalTensor page_table,
                                              OptionalTensor sinks, double scale, int64_t window,
                                              double softcap, bool return_lse) {
  check_shapes("tree_attention",
               {q, k_cache, v_cache, ancestors, depths, lengths, num_nodes, page_table, sinks});
  const Tensor packed_ancestors = packed(ancestors), packed_depths = packed(depths);
  const Tensor packed_lengths = packed(lengths), packed_nodes = packed(num_nodes);
  const OptionalTensor packed_sinks = packed(sinks);
  check_attention(q, k_cache, ancestors, packed_lengths, packed_nodes, page_table, window, softcap);
  const int64_t batch = q.size(0), heads = q.size(1), nodes = q.size(2);
  Tensor out = empty({batch, nodes, heads, v_cache.size(3)}, q.scalar_type());
  Tensor lse = return_lse ? empty({batch, heads, nodes}, ScalarType::Float)
                          : empty({0, 0, 0}, ScalarType::Float);
  cpu_kernels().tree_attention({
      .q = cache_view(q),
      .k_cache = cache_view(k_cache),
      .v_cache = cache_view(v_cache),
      .slots = slot_map(k_cache, page_table),
      .ancestors = data<int64_t>(packed_ancestors),
      .depths = data<int32_t>(packed_depths),
      .lengths = data<int32_t>(packed_lengths),
      .num_nodes = data<int32_t>(packed_nodes),
      .sinks = data<float>(packed_sinks),
      .out = out.mutable_data_ptr(),
      .lse = return_lse ? mutable_data<float>(lse) : nullptr,
      .batch = int32(batch),
      .nodes = int32(nodes),
      .window = static_cast<int32_t>(std::min<int64_t>(window, INT32_MAX)),
      .scale = static_cast<float>(scale),
      .softcap = static_cast<float>(softcap),
      .dtype = dtype_of(q),
  });
  return {torch::stable::transpose(out, 1, 2), lse};
}

// The per-request arguments of a draw, contiguous; keeps the copies alive.
struct SamplingTensors {
  OptionalTensor seeds, positions, temperature, top_k, top_p, min_p;

  SamplingTensors(const char* op, const OptionalTensor& seeds, const OptionalTensor& positions,
                  const OptionalTensor& temperature, const OptionalTensor& top_k,
                  const OptionalTensor& top_p, const OptionalTensor& min_p)
      : seeds(packed(seeds)),
        positions(packed(positions)),
        temperature(packed(temperature)),
        top_k(packed(top_k)),
        top_p(packed(top_p)),
        min_p(packed(min_p)) {
    if (temperature && (!seeds || !positions)) {
      fail("%s: seeds and positions must be given with temperature, got None", op);
    }
  }

  SamplingParams params(const Tensor& logits, const OptionalTensor& bias, uint32_t domain) const {
    const int64_t last = logits.dim() - 1;
    return {
        .logits = logits.const_data_ptr(),
        .bias = data<float>(bias),
        .seeds = data<int64_t>(seeds),
        .positions = data<int64_t>(positions),
        .temperature = data<float>(temperature),
        .top_k = data<int32_t>(top_k),
        .top_p = data<float>(top_p),
        .min_p = data<float>(min_p),
        .stride_logits_b = logits.stride(0),
        .stride_logits_n = last == 2 ? logits.stride(1) : 0,
        .stride_logits_v = logits.stride(last),
        .stride_bias_b = bias ? bias->stride(0) : 0,
        .stride_bias_v = bias ? bias->stride(1) : 0,
        .batch = int32(logits.size(0)),
        .vocab = int32(logits.size(last)),
        .domain = domain,
        .dtype = dtype_of(logits),
    };
  }
};

std::tuple<Tensor, Tensor> sample_cpu(const Tensor& logits, OptionalTensor seeds,
                                      OptionalTensor positions, OptionalTensor temperature,
                                      OptionalTensor top_k, OptionalTensor top_p,
                                      OptionalTensor min_p, OptionalTensor bias, int64_t domain) {
  check_shapes("sample", {logits, seeds, positions, temperature, top_k, top_p, min_p, bias});
  const SamplingTensors sampling("sample", seeds, positions, temperature, top_k, top_p, min_p);
  Tensor tokens = empty({logits.size(0)}, ScalarType::Long);
  Tensor status = empty({logits.size(0)}, ScalarType::Int);
  cpu_kernels().sample({
      .sampling = sampling.params(logits, bias, static_cast<uint32_t>(domain)),
      .tokens = mutable_data<int64_t>(tokens),
      .status = mutable_data<int32_t>(status),
  });
  return {tokens, status};
}

void check_rule(const std::string& rule, const OptionalTensor& kinds,
                const OptionalTensor& draft_probs, const OptionalTensor& coins, bool lossy) {
  const char* rules[] = {"walk", "token", "block", "traversal", "gd_traversal", "typical"};
  if (std::find(std::begin(rules), std::end(rules), rule) == std::end(rules)) {
    fail(
        "verify: rule must be one of walk, token, block, traversal, gd_traversal, typical, got "
        "'%s'",
        rule.c_str());
  }
  if (rule == "typical" && !lossy) {
    fail("verify: rule 'typical' is lossy and must be asked for with lossy=True");
  }
  if (rule != "walk") {
    fail("verify: rule '%s' is not written yet; available: walk", rule.c_str());
  }
  if (draft_probs || coins) {
    fail("verify: rule 'walk' takes neither draft_probs nor coins");
  }
  if (kinds) {
    const Tensor values = packed(*kinds);
    const int8_t* kind = data<int8_t>(values);
    if (std::any_of(kind, kind + values.numel(), [](int8_t value) { return value != 0; })) {
      fail("verify: rule 'walk' tests one-hot drafts only, got sampled nodes in kinds");
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> verify_cpu(
    const Tensor& logits, const Tensor& tokens, const Tensor& parents, const Tensor& num_nodes,
    OptionalTensor seeds, OptionalTensor positions, OptionalTensor temperature,
    OptionalTensor top_k, OptionalTensor top_p, OptionalTensor min_p, OptionalTensor bias,
    OptionalTensor kinds, OptionalTensor draft_probs, OptionalTensor coins, std::string rule,
    bool lossy) {
  check_shapes("verify", {logits, tokens, parents, num_nodes, seeds, positions, temperature, top_k,
                          top_p, min_p, bias, kinds, draft_probs, coins});
  check_rule(rule, kinds, draft_probs, coins, lossy);
  const SamplingTensors sampling("verify", seeds, positions, temperature, top_k, top_p, min_p);
  const Tensor packed_nodes = packed(num_nodes);
  const int64_t batch = logits.size(0), nodes = logits.size(1);
  Tensor path = empty({batch, nodes}, ScalarType::Int);
  Tensor num_accepted = empty({batch}, ScalarType::Int);
  Tensor next_tokens = empty({batch}, ScalarType::Long);
  Tensor status = empty({batch}, ScalarType::Int);
  cpu_kernels().verify({
      .sampling = sampling.params(logits, bias, static_cast<uint32_t>(Domain::kTarget)),
      .tokens = data<int64_t>(tokens),
      .parents = data<int32_t>(parents),
      .num_nodes = data<int32_t>(packed_nodes),
      .path = mutable_data<int32_t>(path),
      .num_accepted = mutable_data<int32_t>(num_accepted),
      .next_tokens = mutable_data<int64_t>(next_tokens),
      .status = mutable_data<int32_t>(status),
      .stride_tokens_b = tokens.stride(0),
      .stride_tokens_n = tokens.stride(1),
      .stride_parents_b = parents.stride(0),
      .stride_parents_n = parents.stride(1),
      .nodes = int32(nodes),
  });
  return {path, num_accepted, next_tokens, status};
}

}  // namespace
}  // namespace specdec

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels, CPU, library) {
  library.impl("tree_attention", TORCH_BOX(&specdec::tree_attention_cpu));
  library.impl("sample", TORCH_BOX(&specdec::sample_cpu));
  library.impl("verify", TORCH_BOX(&specdec::verify_cpu));
}
