// The emulated kernels as a Python module. Tensors come as torch's Python objects, of which only
// the address, sizes, strides and dtype are asked; nothing of torch is compiled in.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/accept_arguments.hpp"
#include "../../csrc/cuda/kernels.hpp"
#include "../../csrc/emu/machine.hpp"

namespace py = pybind11;
using specdec::OptionalView;
using specdec::TensorView;

namespace {

specdec::DType dtype_of(const py::handle& tensor) {
  const auto name = py::str(tensor.attr("dtype")).cast<std::string>();
  if (name == "torch.bfloat16") return specdec::DType::kBfloat16;
  return name == "torch.float16" ? specdec::DType::kFloat16 : specdec::DType::kFloat32;
}

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<TensorView> {
  PYBIND11_TYPE_CASTER(TensorView, const_name("Tensor"));

  bool load(handle tensor, bool) {
    if (!hasattr(tensor, "data_ptr")) return false;
    value = {reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>()),
             dtype_of(tensor),
             {},
             {}};
    int dim = 0;
    for (const auto size : tensor.attr("shape")) value.sizes[dim++] = size.cast<int64_t>();
    dim = 0;
    for (const auto stride : tensor.attr("stride")()) value.strides[dim++] = stride.cast<int64_t>();
    return true;
  }
};

}  // namespace pybind11::detail

namespace specdec {
namespace {

void run_tree_mask(const TensorView& parents, const TensorView& num_nodes,
                   const TensorView& ancestors, const TensorView& depths) {
  cuda::tree_mask(tree_mask_params(parents, num_nodes, ancestors, depths), nullptr);
}

void run_write_kv(const TensorView& k, const TensorView& v, const TensorView& k_cache,
                  const TensorView& v_cache, const TensorView& lengths, const TensorView& num_nodes,
                  const OptionalView& page_table) {
  cuda::write_kv(write_kv_params(k, v, k_cache, v_cache, lengths, num_nodes, page_table), nullptr);
}

void run_commit(const std::vector<TensorView>& caches, const TensorView& lengths,
                const TensorView& path, const TensorView& num_kept, const OptionalView& page_table,
                const OptionalView& hidden, const OptionalView& hidden_out) {
  std::vector<CacheView> views;
  cuda::commit(
      commit_params(caches, lengths, path, num_kept, page_table, hidden, hidden_out, views),
      nullptr);
}

void run_topk_logprobs(const TensorView& logits, int64_t k, const TensorView& logprobs,
                       const TensorView& tokens) {
  const TopkLogprobsParams params = topk_logprobs_params(logits, k, logprobs, tokens);
  std::vector<uint64_t> scratch(cuda::topk_logprobs_scratch_bytes(params) / 8 + 1, ~uint64_t{0});
  cuda::topk_logprobs(params, scratch.data(), nullptr);
}

// Scratch of a call, whose contents must not matter.
std::vector<uint64_t> poisoned(size_t bytes) {
  return std::vector<uint64_t>(bytes / 8 + 1, ~uint64_t{0});
}

void run_sample(const TensorView& logits, const OptionalView& seeds, const OptionalView& positions,
                const OptionalView& temperature, const OptionalView& top_k,
                const OptionalView& top_p, const OptionalView& min_p, const OptionalView& bias,
                const OptionalView& mask, const OptionalView& streams, const OptionalView& coins,
                int64_t num_draws, int64_t domain, const TensorView& tokens,
                const TensorView& status, const OptionalView& probs) {
  SampleParams params{};
  params.sampling = sampling_params(logits, 1, logits.dtype, seeds, positions, temperature, top_k,
                                    top_p, min_p, bias, mask, streams, static_cast<Domain>(domain));
  params.coins = pointer<double>(coins);
  params.tokens = tokens.as<int64_t>();
  params.status = status.as<int32_t>();
  params.probs = probs ? probs->as<float>() : nullptr;
  params.num_draws = int32(num_draws);
  cuda::sample(params, poisoned(cuda::sample_scratch_bytes(params)).data(), nullptr);
}

using Views = std::vector<OptionalView>;

// `keys`: seeds, positions, temperature, top_k, top_p, min_p, bias, mask. `draft`: kinds, rows,
// probs, logits, offsets. `outputs` in the order of the operator's; those of logprobs and law may
// be None.
void run_verify(const TensorView& logits, const TensorView& tokens, const TensorView& parents,
                const TensorView& num_nodes, const Views& keys, const Views& draft,
                const OptionalView& coins, const std::string& rule, bool is_lossy, double epsilon,
                double delta, const Views& outputs) {
  const SamplingParams sampling = sampling_params<TensorView>(
      logits, 2, logits.dtype, keys[0], keys[1], keys[2], keys[3], keys[4], keys[5], keys[6],
      keys[7], std::nullopt, Domain::kTarget);
  VerifyParams params = tree_params(sampling, tokens, parents, num_nodes, coins,
                                    parse_rule(rule, is_lossy), epsilon, delta);
  check_laws(draft[1].has_value(), draft[2].has_value(), draft[3].has_value());
  params.draft =
      draft_params(draft[0], draft[1], draft[2] ? draft[2] : draft[3], !draft[2], nullptr);
  if (params.draft.laws != nullptr) params.draft.offsets = pointer<int64_t>(draft[4]);
  params.path = outputs[0]->as<int32_t>();
  params.num_accepted = outputs[1]->as<int32_t>();
  params.next_tokens = outputs[2]->as<int64_t>();
  params.status = outputs[3]->as<int32_t>();
  params.logprobs = outputs[4] ? outputs[4]->as<float>() : nullptr;
  params.margins = outputs[5] ? outputs[5]->as<float>() : nullptr;
  params.thresholds = outputs[6] ? outputs[6]->as<double>() : nullptr;
  params.next_law = outputs[7] ? outputs[7]->as<double>() : nullptr;
  cuda::verify(params, poisoned(cuda::verify_scratch_bytes(params)).data(), nullptr);
}

void run_tree_attention(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
                        const TensorView& ancestors, const TensorView& depths,
                        const TensorView& lengths, const TensorView& num_nodes,
                        const OptionalView& page_table, const OptionalView& sinks,
                        const TensorView& out, const OptionalView& lse, double scale,
                        int64_t window, double softcap) {
  const TreeAttentionParams params =
      tree_attention_params(q, k_cache, v_cache, ancestors, depths, lengths, num_nodes, page_table,
                            sinks, out, lse, scale, window, softcap);
  std::vector<uint64_t> scratch(cuda::tree_attention_scratch_bytes(params) / 8 + 1, ~uint64_t{0});
  cuda::tree_attention(params, scratch.data(), nullptr);
}

void run_build_tree(const TensorView& roots, const TensorView& candidates,
                    const TensorView& logprobs, const TensorView& budgets,
                    const OptionalView& candidate_parents, const TensorView& tokens,
                    const TensorView& parents, const TensorView& num_nodes,
                    const TensorView& scores) {
  const BuildTreeParams params = build_tree_params(
      roots, candidates, logprobs, budgets, candidate_parents, tokens.size(1),
      {tokens.as<int64_t>(), parents.as<int32_t>(), num_nodes.as<int32_t>(), scores.as<float>()});
  std::vector<uint64_t> scratch(cuda::build_tree_scratch_bytes(params) / 8, ~uint64_t{0});
  cuda::build_tree(params, scratch.data(), nullptr);
}

// What ran since the last call.
py::dict take_counters() {
  const emu::Counters c = std::exchange(emu::counters, {});
  using namespace py::literals;
  return py::dict("launches"_a = c.launches, "blocks"_a = c.blocks, "barriers"_a = c.barriers,
                  "warp_operations"_a = c.warp_operations, "atomics"_a = c.atomics,
                  "loaded_bytes"_a = c.loaded_bytes, "stored_bytes"_a = c.stored_bytes,
                  "copied_bytes"_a = c.copied_bytes, "matrix_loads"_a = c.matrix_loads,
                  "shared_accesses"_a = c.shared_accesses, "bank_conflicts"_a = c.bank_conflicts,
                  "matrix_products"_a = c.matrix_products, "matrix_flops"_a = c.matrix_flops,
                  "dynamic_shared"_a = c.dynamic_shared);
}

}  // namespace
}  // namespace specdec

PYBIND11_MODULE(cuda_emulated, module) {
  using namespace specdec;
  py::register_exception<emu::Error>(module, "EmulatorError");
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const std::runtime_error& mistake) {  // what fail throws: a caller's mistake
      PyErr_SetString(PyExc_ValueError, mistake.what());
    }
  });
  module.def("set_order", &emu::set_order);
  module.def("set_processors", [](int num) { emu::machine.processors = num; });
  module.def("set_largest_cluster", [](int num) { emu::machine.largest_cluster = num; });
  module.def("take_counters", &take_counters);
  module.def("check_topk", &check_topk);
  module.def("tree_mask", &run_tree_mask);
  module.def("write_kv", &run_write_kv);
  module.def("commit", &run_commit);
  module.def("check_max_nodes", &check_max_nodes);
  module.def("build_tree", &run_build_tree);
  module.def("topk_logprobs", &run_topk_logprobs);
  module.def("sample", &run_sample);
  module.def("verify", &run_verify);
  module.def("tree_attention", &run_tree_attention);
}
