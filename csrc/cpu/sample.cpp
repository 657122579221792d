// Draws one token per row. One thread owns a row, or all share each row when rows are few. Bytes
// moved per row: its logits once; sampled rows also write and reread their scores in a buffer that
// stays in cache.
#include "parallel.hpp"
#include "sampling.hpp"

namespace specdec::SPECDEC_ISA {

void sample(const SampleParams& params) {
  const int32_t rows = params.sampling.batch;
  const bool shares_rows = rows < num_threads();
  const auto draw_rows = [&](int64_t begin, int64_t end) {
    thread_local RowSampler sampler;
    for (int64_t r = begin; r < end; ++r) {
      const RowLogits row = row_logits(params.sampling, r, 0);
      const Drawn drawn = sampler.draw(row, row_law(params.sampling, r, 0), shares_rows);
      params.tokens[r] = drawn.token;
      params.status[r] = drawn.status;
    }
  };
  parallel_for(rows, shares_rows ? rows : 1, draw_rows);
}

}  // namespace specdec::SPECDEC_ISA
