// Walks each request's tree: draws the target's token at a node and follows it while it is a
// drafted child. One thread owns a request, or all share each row when requests are few. Bytes
// moved: the logits of visited nodes, once.
#include "parallel.hpp"
#include "sampling.hpp"

namespace specdec::SPECDEC_ISA {
namespace {

constexpr int32_t kPad = -1;

// The first child of `node` that holds `token`, or kPad. Padding is not read.
int32_t find_child(const VerifyParams& params, int64_t b, int32_t size, int32_t node,
                   int64_t token) {
  const int32_t* parents = params.parents + b * params.stride_parents_b;
  const int64_t* tokens = params.tokens + b * params.stride_tokens_b;
  for (int32_t i = 1; i < size; ++i) {
    if (parents[i * params.stride_parents_n] == node &&
        tokens[i * params.stride_tokens_n] == token) {
      return i;
    }
  }
  return kPad;
}

void walk(const VerifyParams& params, int64_t b, RowSampler& sampler, bool shares_rows) {
  const int32_t size = params.num_nodes[b] < params.nodes ? params.num_nodes[b] : params.nodes;
  int32_t* path = params.path + b * params.nodes;
  for (int32_t i = 0; i < params.nodes; ++i) path[i] = kPad;
  int32_t depth = 0;
  Drawn drawn{kPad, 0};
  for (int32_t node = size > 0 ? 0 : kPad; node != kPad && depth < params.nodes; ++depth) {
    path[depth] = node;
    const RowLogits row = row_logits(params.sampling, b, node);
    drawn = sampler.draw(row, row_law(params.sampling, b, depth + 1), shares_rows);
    node = drawn.status == 0 ? find_child(params, b, size, node, drawn.token) : kPad;
  }
  params.num_accepted[b] = depth > 0 ? depth - 1 : 0;
  params.next_tokens[b] = drawn.token;
  params.status[b] = drawn.status;
}

}  // namespace

void verify(const VerifyParams& params) {
  const int32_t batch = params.sampling.batch;
  const bool shares_rows = batch < num_threads();
  parallel_for(batch, shares_rows ? batch : 1, [&](int64_t begin, int64_t end) {
    thread_local RowSampler sampler;
    for (int64_t b = begin; b < end; ++b) walk(params, b, sampler, shares_rows);
  });
}

}  // namespace specdec::SPECDEC_ISA
