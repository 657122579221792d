// Ancestor words and depths. One thread owns one word of one node and walks from the node towards
// the root, until its ancestors have left the word; the thread of word 0 counts the depth. A block
// owns a slice of one request's words and keeps the parents, clamped, in shared memory, or reads
// them again where a tree is larger than that. Bytes moved: parents once a block, outputs once.
#include "../core/tree_mask.hpp"

#include "kernels.hpp"
#include "portability.cuh"

namespace specdec::cuda {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kSharedNodes = 4096;
constexpr int64_t kBlocksPerRequest = 64;

// A parent comes before its child; a bad one counts as the root.
__device__ int32_t parent_of(const TreeMaskParams& params, int64_t b, int32_t node) {
  const int64_t element = b * params.stride_parents_b + node * params.stride_parents_n;
  return node == 0 ? -1 : min(max(load_global(params.parents + element), 0), node - 1);
}

__global__ void __launch_bounds__(kBlockThreads)
    tree_mask_kernel(const __grid_constant__ TreeMaskParams params) {
  SPECDEC_SHARED(int32_t, parents, [kSharedNodes]);
  const int64_t b = blockIdx.x;
  const int32_t size = min(params.num_nodes[b * params.stride_num_nodes], params.nodes);
  const bool is_shared = params.nodes <= kSharedNodes;
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  for (int32_t node = thread; is_shared && node < size; node += kBlockThreads) {
    parents[node] = parent_of(params, b, node);
  }
  __syncthreads();
  const int64_t num_words = int64_t{params.nodes} * params.words;
  for (int64_t i = int64_t{blockIdx.y} * kBlockThreads + thread; i < num_words;
       i += int64_t{gridDim.y} * kBlockThreads) {
    const int32_t node = static_cast<int32_t>(i / params.words);
    const int32_t word = static_cast<int32_t>(i % params.words);
    uint64_t bits = 0;
    int32_t depth = -1;
    for (int32_t ancestor = node < size ? node : -1; ancestor >= 64 * word;
         ancestor = is_shared ? parents[ancestor] : parent_of(params, b, ancestor)) {
      if (ancestor / 64 == word) bits |= uint64_t{1} << ancestor % 64;
      ++depth;
    }
    store_global(params.ancestors + b * num_words + i, static_cast<int64_t>(bits));
    if (word == 0) store_global(params.depths + b * params.nodes + node, max(depth, 0));
  }
}

}  // namespace

void tree_mask(const TreeMaskParams& params, Stream stream) {
  const int64_t num_words = int64_t{params.nodes} * params.words;
  if (params.batch == 0 || num_words == 0) return;
  const int64_t blocks =
      std::min((num_words + kBlockThreads - 1) / kBlockThreads, kBlocksPerRequest);
  launch("tree_mask", tree_mask_kernel,
         dim3(static_cast<unsigned>(params.batch), static_cast<unsigned>(blocks)), kBlockThreads, 0,
         stream, params);
}

}  // namespace specdec::cuda
