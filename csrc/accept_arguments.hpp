// What `sample` and `verify` take, from tensors of torch or of a test; each is described by its
// data, sizes and strides. Tensors of one number per request are contiguous.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <string>

#include "arguments.hpp"
#include "core/philox.hpp"
#include "core/verify.hpp"
#include "cpu/error.hpp"

namespace specdec {

template <class T, class Tensor>
const T* pointer(const Tensor& tensor) {
  if constexpr (requires { tensor.const_data_ptr(); }) {
    return static_cast<const T*>(tensor.const_data_ptr());
  } else {
    return tensor.template as<const T>();
  }
}

template <class T, class Tensor>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}

// `last` is the vocabulary's dimension: 2 of logits [B, N, V], 1 of [R, V].
template <class Tensor>
SamplingParams sampling_params(
    const Tensor& logits, int last, DType dtype, const std::optional<Tensor>& seeds,
    const std::optional<Tensor>& positions, const std::optional<Tensor>& temperature,
    const std::optional<Tensor>& top_k, const std::optional<Tensor>& top_p,
    const std::optional<Tensor>& min_p, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& streams, Domain domain) {
  return {
      .logits = pointer<void>(logits),
      .bias = pointer<float>(bias),
      .mask = pointer<bool>(mask),
      .seeds = pointer<int64_t>(seeds),
      .positions = pointer<int64_t>(positions),
      .temperature = pointer<float>(temperature),
      .top_k = pointer<int32_t>(top_k),
      .top_p = pointer<float>(top_p),
      .min_p = pointer<float>(min_p),
      .streams = pointer<int64_t>(streams),
      .stride_logits_b = logits.stride(0),
      .stride_logits_n = last == 2 ? logits.stride(1) : 0,
      .stride_logits_v = logits.stride(last),
      .stride_bias_b = bias ? bias->stride(0) : 0,
      .stride_bias_v = bias ? bias->stride(1) : 0,
      .stride_mask_b = mask ? mask->stride(0) : 0,
      .stride_mask_v = mask ? mask->stride(1) : 0,
      .batch = int32(logits.size(0)),
      .vocab = int32(logits.size(last)),
      .domain = static_cast<uint32_t>(domain),
      .dtype = dtype,
  };
}

template <class Tensor>
DraftParams draft_params(const std::optional<Tensor>& kinds, const std::optional<Tensor>& rows,
                         const std::optional<Tensor>& laws, bool is_logits,
                         const int32_t* draft_ids) {
  DraftParams params;
  params.kinds = pointer<int8_t>(kinds);
  if (!laws) return params;
  params.rows = pointer<int32_t>(rows);
  params.laws = pointer<float>(laws);
  params.draft_ids = draft_ids;
  params.stride_laws_b = laws->stride(0);
  params.stride_laws_q = laws->stride(1);
  params.stride_laws_u = laws->stride(2);
  params.num_laws = int32(laws->size(1));
  params.draft_vocab = int32(laws->size(2));
  params.is_logits = is_logits;
  return params;
}

// The tree, and how to test it; outputs and draft are the caller's.
template <class Tensor>
VerifyParams tree_params(const SamplingParams& sampling, const Tensor& tokens,
                         const Tensor& parents, const Tensor& num_nodes,
                         const std::optional<Tensor>& coins, Rule rule, double typical_epsilon,
                         double typical_delta) {
  VerifyParams params{};
  params.sampling = sampling;
  params.tokens = pointer<int64_t>(tokens);
  params.parents = pointer<int32_t>(parents);
  params.num_nodes = pointer<int32_t>(num_nodes);
  params.coins = pointer<double>(coins);
  params.stride_tokens_b = tokens.stride(0);
  params.stride_tokens_n = tokens.stride(1);
  params.stride_parents_b = parents.stride(0);
  params.stride_parents_n = parents.stride(1);
  params.typical_epsilon = typical_epsilon;
  params.typical_delta = typical_delta;
  params.rule = rule;
  params.nodes = int32(tokens.size(1));
  return params;
}

inline void check_draws(int64_t num_draws, bool has_coins) {
  if (num_draws < 1 || (has_coins && num_draws > 1)) {
    fail("sample: num_draws must be >= 1, and 1 with coins, got %ld", num_draws);
  }
}

inline constexpr std::array<const char*, 6> kRules = {"walk",      "token",        "block",
                                                      "traversal", "gd_traversal", "typical"};

inline Rule parse_rule(const std::string& name, bool is_lossy) {
  const auto found = std::find(kRules.begin(), kRules.end(), name);
  if (found == kRules.end()) {
    fail(
        "verify: rule must be one of walk, token, block, traversal, gd_traversal, typical, got "
        "'%s'",
        name.c_str());
  }
  if (name == "typical" && !is_lossy) {
    fail("verify: rule 'typical' is lossy and must be asked for with lossy=True");
  }
  return static_cast<Rule>(found - kRules.begin());
}

inline void check_laws(bool has_rows, bool has_probs, bool has_logits) {
  if (has_probs && has_logits) {
    fail("verify: draft_probs or draft_logits must be given, got both");
  }
  if ((has_probs || has_logits) != has_rows) {
    fail("verify: draft_rows and a draft law must be given together, got one");
  }
}

}  // namespace specdec
