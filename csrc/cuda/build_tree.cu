// Grows the best tree of N nodes, best first: one warp owns a request. Its candidates are read from
// global memory once, to where its tree grows, which is shared memory wherever both fit there.
// Beside each node lies the best of its children that are still open, so the frontier is as wide as
// the tree. A step takes the best open child of all, hangs it in the tree unless a sibling has its
// token, and looks over two rows of candidates: for the parent's next child, and for the first
// child of the new node. Bytes moved: inputs once, outputs once.
//
// Delicate: order. Costs, which are path scores negated, are double sums of float losses, as the
// reference's, and compare as such; ties go to the smaller (depth, candidate, parent).
#include "../core/build_tree.hpp"

#include <cmath>

#include "kernels.hpp"
#include "portability.cuh"

namespace specdec::cuda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kLanes = ~0u;
constexpr size_t kSharedLimit = 48 << 10;
constexpr int64_t kNodeBytes = 2 * sizeof(double) + sizeof(int64_t) + 4 * sizeof(int32_t);
constexpr int64_t kCandidateBytes = sizeof(int64_t) + sizeof(float) + sizeof(int32_t);
constexpr int32_t kNone = -1;
constexpr int64_t kPad = -1;

struct GrowthParams {
  BuildTreeParams call;
  unsigned char* scratch;  // [B, request_bytes]; null where shared memory holds a request
  int64_t request_bytes;
};

__device__ int32_t lane_id() { return static_cast<int32_t>(threadIdx.x); }

// One request under way.
struct Growth {
  double* cost;        // [N] of the path to each node
  double* open_cost;   // [N] of its best open child; infinite where it has none
  int64_t* token;      // [N]
  int64_t* candidate;  // [T, K]
  float* loss;         // [T, K], -log probability; infinite where absent
  int32_t* child_of;   // [T, K], candidate of the depth before
  int32_t* parent;     // [N]
  int32_t* own;        // [N] candidate that became the node
  int32_t* depth;      // [N] of its children
  int32_t* open;       // [N] its best open child
  int32_t depths, width;

  __device__ Growth(unsigned char* memory, const BuildTreeParams& call)
      : depths(call.depths), width(call.width) {
    const int64_t nodes = call.max_nodes, num = int64_t{depths} * width;
    cost = reinterpret_cast<double*>(memory);
    open_cost = cost + nodes;
    token = reinterpret_cast<int64_t*>(open_cost + nodes);
    candidate = token + nodes;
    loss = reinterpret_cast<float*>(candidate + num);
    child_of = reinterpret_cast<int32_t*>(loss + num);
    parent = child_of + num;
    own = parent + nodes;
    depth = own + nodes;
    open = depth + nodes;
  }

  __device__ void load(const BuildTreeParams& call, int64_t b) {
    const int64_t num = int64_t{depths} * width;
    for (int64_t i = lane_id(); i < num; i += kWarp) {
      const int64_t t = i / width, k = i % width;
      const int64_t id = load_global(call.candidates + b * call.stride_candidates_b +
                                     t * call.stride_candidates_t + k * call.stride_candidates_k);
      const float logprob = load_global(call.logprobs + b * call.stride_logprobs_b +
                                        t * call.stride_logprobs_t + k * call.stride_logprobs_k);
      candidate[i] = id;
      loss[i] = id == kPad || logprob != logprob ? INFINITY : logprob > 0.0f ? 0.0f : -logprob;
      child_of[i] = call.candidate_parents == nullptr
                        ? kNone
                        : load_global(call.candidate_parents + b * call.stride_parents_b +
                                      t * call.stride_parents_t + k * call.stride_parents_k);
    }
  }
};

// What a lane proposes, and what the warp agrees on.
struct Choice {
  double cost;
  int32_t index;  // kNone: nothing
};

// The lanes that hold the smallest cost; none where it is infinite. Costs are not negative, so they
// are in the order of their bits.
__device__ unsigned cheapest_lanes(double cost) {
  const uint64_t bits = bit_cast<uint64_t>(cost);
  const unsigned high = static_cast<unsigned>(bits >> 32), low = static_cast<unsigned>(bits);
  const unsigned least_high = __reduce_min_sync(kLanes, high);
  const unsigned least_low = __reduce_min_sync(kLanes, high == least_high ? low : ~0u);
  const bool is_least = high == least_high && low == least_low && cost < INFINITY;
  return __ballot_sync(kLanes, is_least);
}

__device__ bool is_in(unsigned lanes) { return (lanes >> lane_id() & 1) != 0; }

// Of those lanes, the ones with the smallest value.
__device__ unsigned least_of(unsigned lanes, int32_t value) {
  const unsigned offered = is_in(lanes) ? static_cast<unsigned>(value) : ~0u;
  const unsigned least = __reduce_min_sync(kLanes, offered);
  return __ballot_sync(kLanes, is_in(lanes) && offered == least);
}

__device__ Choice of_lane(unsigned lanes, const Choice& choice) {
  if (lanes == 0) return {INFINITY, kNone};
  const int lane = __ffs(static_cast<int>(lanes)) - 1;
  return {__shfl_sync(kLanes, choice.cost, lane), __shfl_sync(kLanes, choice.index, lane)};
}

// The cheapest child of a node, the lower candidate of equals, among those after (cost, candidate).
__device__ Choice best_child(const Growth& growth, int32_t depth, int32_t own, double path,
                             const Choice& after) {
  Choice best{INFINITY, kNone};
  if (depth < growth.depths) {
    const int64_t row = int64_t{depth} * growth.width;
    for (int32_t k = lane_id(); k < growth.width; k += kWarp) {
      if (growth.child_of[row + k] != own && own != kNone) continue;
      const double cost = path + static_cast<double>(growth.loss[row + k]);
      const bool is_open = cost > after.cost || (cost == after.cost && k > after.index);
      if (is_open && cost < best.cost) best = {cost, k};
    }
  }
  unsigned lanes = cheapest_lanes(best.cost);
  if (__popc(lanes) > 1) lanes = least_of(lanes, best.index);
  return of_lane(lanes, best);
}

// The node whose open child is the cheapest; of equals that of the smallest (depth, candidate,
// node).
__device__ Choice best_parent(const Growth& growth, int32_t size) {
  Choice best{INFINITY, kNone};
  const auto is_before = [&](int32_t a, int32_t b) {
    if (growth.depth[a] != growth.depth[b]) return growth.depth[a] < growth.depth[b];
    return growth.open[a] < growth.open[b];
  };
  for (int32_t node = lane_id(); node < size; node += kWarp) {
    const double cost = growth.open_cost[node];
    const bool is_better =
        cost < best.cost || (cost == best.cost && cost < INFINITY && is_before(node, best.index));
    if (is_better) best = {cost, node};
  }
  unsigned lanes = cheapest_lanes(best.cost);
  if (__popc(lanes) > 1) {
    const int32_t node = max(best.index, 0);
    lanes = least_of(lanes, growth.depth[node]);
    lanes = least_of(lanes, growth.open[node]);
    lanes = least_of(lanes, node);
  }
  return of_lane(lanes, best);
}

// Number of nodes.
__device__ int32_t grow(const Growth& growth, int64_t root, int32_t budget, bool are_marginals) {
  const int32_t lane = lane_id();
  const auto add = [&](int32_t node, int64_t token, int32_t parent, const Choice& choice,
                       int32_t depth) {
    const int32_t own = are_marginals ? kNone : choice.index;
    const Choice first = best_child(growth, depth, own, choice.cost, {-1.0, kNone});
    if (lane == 0) {
      growth.token[node] = token;
      growth.parent[node] = parent;
      growth.cost[node] = choice.cost;
      growth.own[node] = own;
      growth.depth[node] = depth;
      growth.open_cost[node] = first.cost;
      growth.open[node] = first.index;
    }
  };
  if (budget < 1) return 0;
  add(0, root, kNone, {0.0, kNone}, 0);  // its children are what the lane itself has loaded
  __syncwarp();
  int32_t size = 1;
  while (size < budget) {
    const Choice best = best_parent(growth, size);
    const int32_t node = best.index;
    if (node == kNone) break;
    const int32_t depth = growth.depth[node];
    const Choice taken{best.cost, growth.open[node]};
    const int64_t token = growth.candidate[int64_t{depth} * growth.width + taken.index];
    bool is_twin = false;
    for (int32_t other = lane; other < size; other += kWarp) {
      is_twin |= growth.parent[other] == node && growth.token[other] == token;
    }
    const bool is_new = __any_sync(kLanes, is_twin) == 0;
    const Choice next = best_child(growth, depth, growth.own[node], growth.cost[node], taken);
    __syncwarp();  // all have read the node
    if (lane == 0) {
      growth.open_cost[node] = next.cost;
      growth.open[node] = next.index;
    }
    if (is_new) add(size++, token, node, taken, depth + 1);
    __syncwarp();
  }
  return size;
}

__global__ void __launch_bounds__(kWarp)
    build_tree_kernel(const __grid_constant__ GrowthParams params) {
  SPECDEC_DYNAMIC_SHARED(unsigned char, shared);
  const BuildTreeParams& call = params.call;
  const int64_t b = blockIdx.x;
  const bool is_shared = params.scratch == nullptr;
  Growth growth(is_shared ? shared : params.scratch + b * params.request_bytes, call);
  growth.load(call, b);
  const int32_t budget = call.budgets[b * call.stride_budgets];
  const int64_t root = call.roots[b * call.stride_roots];
  const int32_t size =
      grow(growth, root, min(max(budget, 0), call.max_nodes), call.candidate_parents == nullptr);
  for (int32_t node = lane_id(); node < call.max_nodes; node += kWarp) {
    const int64_t i = b * call.max_nodes + node;
    const bool is_node = node < size;
    store_global(call.tokens + i, is_node ? growth.token[node] : int64_t{0});
    store_global(call.parents + i, is_node ? growth.parent[node] : kNone);
    store_global(call.scores + i,
                 is_node ? static_cast<float>(0.0 - growth.cost[node]) : -INFINITY);
  }
  if (lane_id() == 0) store_global(call.num_nodes + b, size);
}

int64_t request_bytes(const BuildTreeParams& call) {
  return call.max_nodes * kNodeBytes + int64_t{call.depths} * call.width * kCandidateBytes;
}

bool fits_shared(const BuildTreeParams& call) {
  return request_bytes(call) <= static_cast<int64_t>(kSharedLimit);
}

}  // namespace

size_t build_tree_scratch_bytes(const BuildTreeParams& call) {
  return fits_shared(call) ? 0 : static_cast<size_t>(call.batch * request_bytes(call));
}

void build_tree(const BuildTreeParams& call, void* scratch, Stream stream) {
  if (call.batch == 0) return;
  const bool is_shared = fits_shared(call);
  // Requests begin at multiples of 8 bytes: so do doubles.
  const GrowthParams params{call, is_shared ? nullptr : static_cast<unsigned char*>(scratch),
                            request_bytes(call)};
  launch("build_tree", build_tree_kernel, dim3(static_cast<unsigned>(call.batch)), kWarp,
         is_shared ? static_cast<size_t>(request_bytes(call)) : 0, stream, params);
}

}  // namespace specdec::cuda
