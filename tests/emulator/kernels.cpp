// Runs emulated kernels over several shapes, for a sanitizer to watch. Every buffer is an
// allocation of its own and of its exact size. What they compute is checked elsewhere.
//
//   sanitized_<tool> NAME ORDER    NAME is an operator or a planted fault
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "../../csrc/accept_arguments.hpp"
#include "../../csrc/cuda/kernels.hpp"
#include "../../csrc/emu/machine.hpp"
#include "planted.hpp"

namespace specdec {
namespace {

// A contiguous tensor that owns its memory.
class Array {
 public:
  Array(DType dtype, int64_t element, std::vector<int64_t> sizes, int seed)
      : bytes_(static_cast<size_t>(element)) {
    view_ = {nullptr, dtype, {}, {}};
    int64_t stride = 1;
    for (size_t dim = sizes.size(); dim-- > 0; stride *= sizes[dim]) {
      view_.sizes[dim] = sizes[dim];
      view_.strides[dim] = stride;
      bytes_ *= static_cast<size_t>(sizes[dim]);
    }
    memory_ = std::make_unique<unsigned char[]>(bytes_);
    for (size_t i = 0; i < bytes_; ++i) {  // neither NaN nor infinite as any float
      memory_[i] = static_cast<unsigned char>((i * 37 + static_cast<size_t>(seed) * 11) % 0x3C);
    }
    view_.data = memory_.get();
  }

  template <class T>
  Array& fill(const std::vector<T>& values) {
    std::memcpy(memory_.get(), values.data(), bytes_);
    return *this;
  }

  operator const TensorView&() const { return view_; }
  operator OptionalView() const { return view_; }

 private:
  size_t bytes_;
  TensorView view_;
  std::unique_ptr<unsigned char[]> memory_;
};

Array floats(DType dtype, std::vector<int64_t> sizes, int seed = 0) {
  return Array(dtype, element_bytes(dtype), std::move(sizes), seed);
}

Array ints(std::vector<int64_t> sizes, const std::vector<int32_t>& values) {
  return std::move(Array(DType::kFloat32, 4, std::move(sizes), 0).fill(values));
}

Array longs(std::vector<int64_t> sizes) { return Array(DType::kFloat32, 8, std::move(sizes), 0); }

// A tree whose node i hangs on node i / 3.
void run_tree_mask() {
  for (const int64_t nodes : {1, 7, 150}) {
    std::vector<int32_t> parents;
    for (int64_t i = 0; i < 2 * nodes; ++i) {
      parents.push_back(static_cast<int32_t>(i % nodes == 0 ? -1 : i % nodes / 3));
    }
    Array ancestors = longs({2, nodes, num_words(nodes)});
    Array depths = ints({2, nodes}, std::vector<int32_t>(static_cast<size_t>(2 * nodes)));
    cuda::tree_mask(
        tree_mask_params(ints({2, nodes}, parents),
                         ints({2}, {static_cast<int32_t>(nodes), static_cast<int32_t>(nodes / 2)}),
                         ancestors, depths),
        nullptr);
  }
}

void run_write_kv() {
  for (const DType dtype : {DType::kFloat32, DType::kBfloat16}) {
    for (const int64_t dim : {5, 40, 64}) {
      const Array k = floats(dtype, {2, 2, 6, dim}), v = floats(dtype, {2, 2, 6, dim});
      const Array lengths = ints({2}, {3, 10}), num_nodes = ints({2}, {6, 4});
      const Array k_cache = floats(dtype, {2, 2, 16, dim}),
                  v_cache = floats(dtype, {2, 2, 16, dim});
      cuda::write_kv(write_kv_params(k, v, k_cache, v_cache, lengths, num_nodes, std::nullopt),
                     nullptr);
      const Array k_pages = floats(dtype, {5, 2, 8, dim}), v_pages = floats(dtype, {5, 2, 8, dim});
      cuda::write_kv(write_kv_params(k, v, k_pages, v_pages, lengths, num_nodes,
                                     ints({2, 2}, {3, 0, 9, 2})),  // 9: no such page
                     nullptr);
    }
  }
}

// Paths whose sources and targets overlap, one of them longer than what a thread stages.
void run_commit() {
  constexpr int64_t kNodes = 11;
  std::vector<int32_t> paths;
  for (const int32_t step : {1, 3}) {
    for (int32_t j = 0; j < kNodes; ++j) paths.push_back(j == 0 ? 0 : j * step + 1);
  }
  for (const DType dtype : {DType::kFloat32, DType::kFloat16}) {
    for (const int64_t dim : {5, 64}) {
      std::vector<Array> arrays;
      for (int i = 0; i < 4; ++i) arrays.push_back(floats(dtype, {2, 2, 32, dim}, i));
      std::vector<TensorView> caches(arrays.begin(), arrays.end());
      const Array lengths = ints({2}, {0, 11}), path = ints({2, kNodes}, paths);
      const Array num_kept = ints({2}, {10, 3});
      const Array hidden = floats(dtype, {2, kNodes, dim}), out = floats(dtype, {2, kNodes, dim});
      std::vector<CacheView> views;
      cuda::commit(commit_params(caches, lengths, path, num_kept, std::nullopt, hidden, out, views),
                   nullptr);
    }
  }
}

void run_topk_logprobs() {
  struct Case {
    DType dtype;
    int64_t rows, vocab, k;
  };
  for (const Case& c : {Case{DType::kFloat32, 1, 5, 5}, Case{DType::kBfloat16, 3, 1003, 8},
                        Case{DType::kFloat16, 2, 9001, 64}, Case{DType::kFloat32, 2, 700, 100}}) {
    const Array logits = floats(c.dtype, {c.rows, c.vocab});
    const Array logprobs = floats(DType::kFloat32, {c.rows, c.k}), tokens = longs({c.rows, c.k});
    const TopkLogprobsParams params = topk_logprobs_params(logits, c.k, logprobs, tokens);
    const size_t bytes = cuda::topk_logprobs_scratch_bytes(params);
    const auto scratch = std::make_unique<unsigned char[]>(bytes);
    cuda::topk_logprobs(params, scratch.get(), nullptr);
  }
}

template <class T>
Array numbers(const std::vector<T>& values) {
  return std::move(
      Array(DType::kFloat32, sizeof(T), {static_cast<int64_t>(values.size())}, 0).fill(values));
}

// Rows that are greedy, without filters, and with each; odd vocabularies, so that most begin
// anywhere. Summarised ahead and not, by blocks and by clusters.
struct Filters {
  Array seeds = numbers<int64_t>({1, 2, 3, 4, 5}), positions = numbers<int64_t>({9, 8, 7, 6, 5}),
        temperature = numbers<float>({0.0f, 0.7f, 1.0f, 1.3f, 1.0f}),
        top_k = numbers<int32_t>({0, 0, 7, 0, 40}),
        top_p = numbers<float>({1.0f, 1.0f, 1.0f, 0.6f, 0.9f}),
        min_p = numbers<float>({0.0f, 0.0f, 0.0f, 0.01f, 0.0f});

  SamplingParams params(const TensorView& logits, int last, const OptionalView& bias) const {
    return sampling_params<TensorView>(logits, last, logits.dtype, seeds, positions, temperature,
                                       top_k, top_p, min_p, bias, std::nullopt, std::nullopt,
                                       Domain::kTarget);
  }
};

// `run` is told whether rows are summarised ahead and shared by blocks.
void on_devices(const std::function<void(bool)>& run) {
  for (const bool is_large : {true, false}) {
    emu::machine.processors = is_large ? 16 : 1;
    emu::machine.largest_cluster = is_large ? 2 : 1;
    run(is_large);
  }
}

void run_sample() {
  const Filters filters;
  const Array coins = numbers<double>({0.5, 0.1, 0.9, 0.0, 0.7});
  on_devices([&](bool is_large) {
    const DType dtype = is_large ? DType::kFloat32 : DType::kBfloat16;
    const Array logits = floats(dtype, {5, 1031}), bias = floats(DType::kFloat32, {5, 1031});
    for (const int32_t num_draws : {0, 1, 3}) {  // 0: one, by coin
      const int32_t num = std::max(num_draws, 1);
      const Array tokens = longs({5, num}), status = ints({5}, {0, 0, 0, 0, 0});
      const Array probs = floats(DType::kFloat32, {5, 1031});
      SampleParams params{};
      params.sampling = filters.params(logits, 1, num > 1 ? bias : OptionalView());
      params.coins = num_draws == 0 ? pointer<double>(OptionalView(coins)) : nullptr;
      params.tokens = static_cast<const TensorView&>(tokens).as<int64_t>();
      params.status = static_cast<const TensorView&>(status).as<int32_t>();
      params.probs = static_cast<const TensorView&>(probs).as<float>();
      params.num_draws = num;
      const auto scratch = std::make_unique<unsigned char[]>(cuda::sample_scratch_bytes(params));
      cuda::sample(params, scratch.get(), nullptr);
    }
  });
}

// Trees of a root, two children of it and one of the first, drafted from laws over 401 ids.
void run_verify() {
  const Filters filters;
  constexpr int64_t kNodes = 4, kVocab = 517, kDraft = 401;
  std::vector<int32_t> parents, rows;
  std::vector<int64_t> tokens, offsets;
  std::vector<int8_t> kinds;
  std::vector<double> coins;
  for (int64_t b = 0; b < 5; ++b) {
    for (int32_t i = 0; i < kNodes; ++i) {
      parents.push_back(i == 0 ? -1 : (i - 1) / 2);
      rows.push_back(i % 2);
      tokens.push_back(60 * i + b);
      kinds.push_back(static_cast<int8_t>(b % 3));
      coins.push_back(b == 4 ? 0.0 : 0.3 * i);
    }
  }
  for (int64_t i = 0; i < kDraft; ++i) offsets.push_back(i / 4);
  const auto tree = [](auto values) {
    using T = typename decltype(values)::value_type;
    return std::move(Array(DType::kFloat32, sizeof(T), {5, kNodes}, 0).fill(values));
  };
  const Array tree_tokens = tree(tokens), tree_parents = tree(parents), tree_rows = tree(rows);
  const Array tree_kinds = tree(kinds), tree_coins = tree(coins);
  const Array sizes = numbers<int32_t>({4, 4, 4, 0, 4}), map = numbers(offsets);
  const Array laws = floats(DType::kFloat32, {5, 2, kDraft}, 3);
  on_devices([&](bool is_large) {
    for (const Rule rule : {Rule::kWalk, Rule::kTraversal, Rule::kToken, Rule::kTypical}) {
      if (!is_large && rule == Rule::kTypical) continue;
      const Array logits = floats(DType::kBfloat16, {5, kNodes, kVocab});
      const bool has_coins = rule == Rule::kToken || rule == Rule::kWalk;
      VerifyParams params = tree_params<TensorView>(
          filters.params(logits, 2, std::nullopt), tree_tokens, tree_parents, sizes,
          has_coins ? OptionalView(tree_coins) : OptionalView(), rule, 0.09, 0.3);
      if (rule == Rule::kToken || rule == Rule::kTraversal) {
        params.draft = draft_params<TensorView>(tree_kinds, tree_rows, laws,
                                                rule == Rule::kTraversal, nullptr);
        params.draft.offsets = static_cast<const TensorView&>(map).as<int64_t>();
      }
      const Array path = tree(parents), accepted = ints({5}, {0, 0, 0, 0, 0});
      const Array next = longs({5}), status = ints({5}, {0, 0, 0, 0, 0});
      const Array logprobs = floats(DType::kFloat32, {5, kNodes}), margins = tree(parents);
      const Array thresholds = tree(coins), law = longs({5, kVocab});
      const auto data = [](const Array& array) {
        return static_cast<const TensorView&>(array).data;
      };
      params.path = static_cast<int32_t*>(data(path));
      params.num_accepted = static_cast<int32_t*>(data(accepted));
      params.next_tokens = static_cast<int64_t*>(data(next));
      params.status = static_cast<int32_t*>(data(status));
      params.logprobs = static_cast<float*>(data(logprobs));
      params.margins = static_cast<float*>(data(margins));
      params.thresholds = static_cast<double*>(data(thresholds));
      params.next_law = static_cast<double*>(data(law));
      const auto scratch = std::make_unique<unsigned char[]>(cuda::verify_scratch_bytes(params));
      cuda::verify(params, scratch.get(), nullptr);
    }
  });
}

// Chains of which every third node is missing from its successors: some bits of each word are 0.
void run_tree_attention() {
  struct Case {
    DType dtype;
    int64_t heads, kv_heads, nodes, dim, slots, page_size;
    int32_t window;
    int processors;
  };
  for (const Case& c : {
           Case{DType::kBfloat16, 4, 2, 5, 64, 410, 0, 0, 2},     // a split of many tiles
           Case{DType::kBfloat16, 4, 2, 12, 64, 200, 0, 0, 4},    // a warp for each 16 rows
           Case{DType::kBfloat16, 1, 1, 66, 80, 330, 16, 90, 1},  // for each 32; pages
           Case{DType::kFloat16, 2, 1, 3, 256, 200, 0, 0, 4},
           Case{DType::kFloat16, 2, 1, 65, 256, 100, 0, 0, 1},  // two tiles of rows
           Case{DType::kFloat32, 4, 2, 5, 40, 170, 8, 0, 1},
           Case{DType::kFloat16, 2, 2, 4, 20, 80, 0, 30, 8},  // rows that are not aligned
       }) {
    constexpr int64_t kBatch = 3;
    const int64_t words = num_words(c.nodes), pages = c.page_size == 0 ? 0 : c.slots / c.page_size;
    const auto last = static_cast<int32_t>((pages == 0 ? c.slots : pages * c.page_size) - c.nodes);
    std::vector<int64_t> bits;
    std::vector<int32_t> depths, table;
    for (int64_t i = 0; i < kBatch * c.nodes; ++i) {
      const int64_t node = i % c.nodes;
      depths.push_back(static_cast<int32_t>(node));
      for (int64_t w = 0; w < words; ++w) {
        uint64_t word = 0;
        for (int64_t j = 64 * w; j <= node && j < 64 * (w + 1); ++j) {
          if (j == node || j % 3 != 1) word |= uint64_t{1} << (j % 64);
        }
        bits.push_back(static_cast<int64_t>(word));
      }
    }
    for (int64_t i = 0; i < kBatch * pages; ++i) {
      table.push_back(static_cast<int32_t>((i * 7 + 3) % (kBatch * pages)));
    }
    if (pages > 0) table.front() = -5, table.back() = 1000;  // no such pages
    table.resize(static_cast<size_t>(kBatch * std::max<int64_t>(pages, 1)));
    const std::vector<int64_t> cache =
        pages == 0 ? std::vector<int64_t>{kBatch, c.kv_heads, c.slots, c.dim}
                   : std::vector<int64_t>{kBatch * pages, c.kv_heads, c.page_size, c.dim};
    const Array q = floats(c.dtype, {kBatch, c.heads, c.nodes, c.dim});
    const Array keys = floats(c.dtype, cache, 1), values = floats(c.dtype, cache, 2);
    const Array ancestors = std::move(longs({kBatch, c.nodes, words}).fill(bits));
    const Array page_table = ints({kBatch, std::max<int64_t>(pages, 1)}, table);
    const Array out = floats(c.dtype, {kBatch, c.nodes, c.heads, c.dim});
    const Array lse = floats(DType::kFloat32, {kBatch, c.heads, c.nodes});
    const Array node_depths = ints({kBatch, c.nodes}, depths);
    const Array lengths = ints({kBatch}, {1, INT32_MAX - 9, last});
    const Array num_nodes = ints({kBatch}, {2, 7, static_cast<int32_t>(c.nodes)});
    const TreeAttentionParams params =
        tree_attention_params(q, keys, values, ancestors, node_depths, lengths, num_nodes,
                              pages == 0 ? std::nullopt : OptionalView(page_table), std::nullopt,
                              out, lse, 0.1, c.window, 0.0);
    emu::machine.processors = c.processors;
    const size_t bytes = cuda::tree_attention_scratch_bytes(params);
    const auto scratch = std::make_unique<unsigned char[]>(bytes);
    cuda::tree_attention(params, scratch.get(), nullptr);
  }
}

// The last tree is larger than shared memory.
void run_build_tree() {
  struct Case {
    int64_t depths, width, nodes;
    bool has_parents;
  };
  for (const Case& c : {Case{1, 1, 2, false}, Case{4, 5, 16, false}, Case{5, 40, 70, true},
                        Case{3, 4, 1300, false}}) {
    constexpr int64_t kBatch = 2;
    const std::vector<int64_t> sizes{kBatch, c.depths, c.width};
    const int64_t num = kBatch * c.depths * c.width;
    std::vector<int64_t> tokens;
    std::vector<int32_t> hang_on;
    std::vector<float> logprobs;
    for (int64_t i = 0; i < num; ++i) {
      tokens.push_back(i % 7 == 6 ? -1 : i % 3);
      hang_on.push_back(static_cast<int32_t>(i % (c.width + 1)));
      logprobs.push_back(-0.25f * static_cast<float>(i % 5));
    }
    const Array candidates = std::move(longs(sizes).fill(tokens));
    const Array gains = std::move(floats(DType::kFloat32, sizes).fill(logprobs));
    const Array beams = ints(sizes, hang_on), roots = longs({kBatch});
    const Array budgets = ints({kBatch}, {static_cast<int32_t>(c.nodes), 3});
    const size_t nodes = static_cast<size_t>(kBatch * c.nodes);
    const auto out = std::make_unique<int64_t[]>(nodes);
    const auto parents = std::make_unique<int32_t[]>(nodes);
    const auto num_nodes = std::make_unique<int32_t[]>(kBatch);
    const auto scores = std::make_unique<float[]>(nodes);
    const BuildTreeParams params = build_tree_params(
        roots, candidates, gains, budgets, c.has_parents ? OptionalView(beams) : std::nullopt,
        c.nodes, {out.get(), parents.get(), num_nodes.get(), scores.get()});
    const size_t bytes = cuda::build_tree_scratch_bytes(params);
    const auto scratch = std::make_unique<unsigned char[]>(bytes);
    cuda::build_tree(params, scratch.get(), nullptr);
  }
}

}  // namespace
}  // namespace specdec

int main(int argc, char** argv) {
  using namespace specdec;
  std::map<std::string, std::function<void()>> runs{
      {"build_tree", run_build_tree},
      {"tree_mask", run_tree_mask},
      {"write_kv", run_write_kv},
      {"commit", run_commit},
      {"topk_logprobs", run_topk_logprobs},
      {"sample", run_sample},
      {"verify", run_verify},
      {"tree_attention", run_tree_attention},
  };
  for (const auto& [name, run] : planted_faults()) runs.emplace(name, run);
  const auto run = runs.find(argc == 3 ? argv[1] : "");
  if (run == runs.end()) {
    std::fprintf(stderr, "usage: %s NAME ORDER, with NAME one of:\n", argv[0]);
    for (const auto& [name, unused] : runs) std::fprintf(stderr, "  %s\n", name.c_str());
    return 2;
  }
  try {
    emu::set_order(argv[2]);
    run->second();
    if (emu::counters.bank_conflicts > 0) {
      throw emu::Error(std::to_string(emu::counters.bank_conflicts) + " bank conflicts");
    }
  } catch (const emu::Error& error) {
    std::fprintf(stderr, "emulator: %s\n", error.what());
    return 3;
  }
  std::puts("done");
}
