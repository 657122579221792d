// Draws the tokens of each row. One thread owns a row, or all share each row when rows are few.
// Bytes moved per row: its logits once, and again from cache the blocks that may pass a filter.
#include "parallel.hpp"
#include "sampling.hpp"

namespace specdec::SPECDEC_ISA {
namespace {

void sample_row(const SampleParams& params, int64_t r, RowSampler& sampler, bool is_shared) {
  const RowLogits row = row_logits(params.sampling, r, 0);
  const RowLaw law = row_law(params.sampling, r, 0);
  int64_t* tokens = params.tokens + r * params.num_draws;
  const bool is_coin = params.coins != nullptr && !law.is_greedy();
  if (params.num_draws > 1) {
    params.status[r] = sampler.draw_many(row, law, params.num_draws, tokens);
  } else if (!is_coin) {
    const Drawn drawn = sampler.draw(row, law, is_shared);
    tokens[0] = drawn.token;
    params.status[r] = drawn.status;
  }
  if (!is_coin && params.probs == nullptr) return;
  thread_local KeptLaw kept;
  sampler.keep(row, law, is_shared, kept);
  if (params.probs != nullptr) {
    float* probs = params.probs + r * params.sampling.vocab;
    std::memset(probs, 0, sizeof(float) * static_cast<size_t>(params.sampling.vocab));
    kept.spread(probs);
  }
  if (!is_coin) return;
  tokens[0] = kept.draw(params.coins[r]);
  params.status[r] = kept.num() > 0 ? kOk : kNoFiniteLogit;
}

}  // namespace

void sample(const SampleParams& params) {
  const int32_t rows = params.sampling.batch;
  const bool is_shared = rows < num_threads();
  const int64_t grain = is_shared ? rows : rows_per_thread(params.sampling.vocab);
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    thread_local RowSampler sampler;
    for (int64_t r = begin; r < end; ++r) sample_row(params, r, sampler, is_shared);
  });
}

}  // namespace specdec::SPECDEC_ISA
