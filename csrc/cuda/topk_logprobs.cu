// Top-k and normaliser of each row. For k <= 64 one pass over the logits: a block of the first
// launch owns a segment of one row and holds it in registers, a fixed number of 16-byte loads per
// thread. The k-th largest of the threads' maxima bounds the k-th key of the segment from below,
// and at most k threads hold keys that reach it, so what must be sorted always fits. A block of the
// second launch owns a row and merges its segments. Bytes moved: the row once, and 8 (k + 2) for
// each segment.
//
// Any other k: one block owns a row, finds the k-th key digit by digit in eight sweeps, and sorts
// what reaches it in global memory.
//
// The delicate step is the normaliser: exponentials in float relative to the largest score that
// their thread has seen, sums across threads, and the logarithm's difference, in double.
#include "../core/topk_logprobs.hpp"

#include <algorithm>

#include "kernels.hpp"
#include "ranked.cuh"

namespace specdec::cuda {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kWarps = kBlockThreads / 32;
constexpr int kMaxSmallK = 64;
constexpr int kScoresPerThread = 32;
constexpr int kSegment = kBlockThreads * kScoresPerThread;
constexpr int kShortlist = kMaxSmallK * kScoresPerThread;  // keys that can reach the bound
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;

// The sum of exp(score - largest); nothing was seen while `largest` is -inf.
struct Mass {
  float largest;
  double sum;

  __device__ void add(const Mass& other) {
    const float most = fmaxf(largest, other.largest);
    if (most == -INFINITY) return;
    sum = sum * static_cast<double>(expf(largest - most)) +
          other.sum * static_cast<double>(expf(other.largest - most));
    largest = most;
  }
};

struct TopkParams {
  TopkLogprobsParams call;
  RankKey* keys;     // [R, segments, k], or [R, sorted] for a large k
  float* largest;    // [R, segments]
  double* sums;      // [R, segments]
  int32_t segments;  // of a row
  int32_t sorted;    // a power of two >= k
};

// The block's total, in every thread.
__device__ Mass block_mass(Mass mass) {
  SPECDEC_SHARED(float, largest, [kWarps]);
  SPECDEC_SHARED(double, sums, [kWarps]);
  for (int bits = 16; bits > 0; bits /= 2) {
    mass.add({__shfl_xor_sync(~0u, mass.largest, bits), __shfl_xor_sync(~0u, mass.sum, bits)});
  }
  if (threadIdx.x % 32 == 0) {
    largest[threadIdx.x / 32] = mass.largest;
    sums[threadIdx.x / 32] = mass.sum;
  }
  __syncthreads();
  Mass total{-INFINITY, 0.0};
  for (int warp = 0; warp < kWarps; ++warp) total.add({largest[warp], sums[warp]});
  return total;
}

template <class T>
struct Row {
  static constexpr int kVector = 16 / sizeof(T);
  struct alignas(16) Vector {
    T elements[kVector];
  };

  const T* logits;
  int64_t stride;
  int32_t vocab;

  __device__ Row(const TopkLogprobsParams& call, int64_t row)
      : logits(static_cast<const T*>(call.logits) + row * call.stride_row),
        stride(call.stride_vocab),
        vocab(call.vocab) {}

  __device__ float score(int64_t token) const {
    return ranked_score(to_float(load_global(logits + token * stride)));
  }

  // Elements by which the row begins after a 16-byte boundary.
  __device__ int32_t misalignment() const {
    return static_cast<int32_t>(reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T));
  }

  // Scores of the tokens from `first` on, which is such that they lie on a 16-byte boundary; -inf
  // outside of the row.
  __device__ void load(int64_t first, float (&scores)[kVector]) const {
    if (stride == 1 && first >= 0 && first + kVector <= vocab) {
      const auto vector = load_global(reinterpret_cast<const Vector*>(logits + first));
#pragma unroll
      for (int i = 0; i < kVector; ++i) scores[i] = ranked_score(to_float(vector.elements[i]));
      return;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const bool is_inside = first + i >= 0 && first + i < vocab;
      scores[i] = is_inside ? score(first + i) : -INFINITY;
    }
  }
};

// Keeps the best k of the block's keys, sorted, at the front of the returned list. Thread t brings
// its scores; score (j, i) is of token first + j * tokens_per_load + i.
template <int kLoads, int kVector>
__device__ const RankKey* select(const float (&scores)[kLoads][kVector], int64_t first,
                                 int32_t vocab, int32_t k) {
  SPECDEC_SHARED(RankKey, maxima, [kBlockThreads]);
  SPECDEC_SHARED(RankKey, shortlist, [kShortlist]);
  SPECDEC_SHARED(int32_t, length, [1]);
  constexpr int32_t kTokensPerLoad = kBlockThreads * kVector;
  const int32_t begin = static_cast<int32_t>(max(-first, int64_t{0}));
  const int32_t end = static_cast<int32_t>(min(vocab - first, int64_t{kSegment}));
  const auto token_at = [&](int j, int i) {  // -1 outside of the row
    const int32_t offset = j * kTokensPerLoad + i;
    return offset >= begin && offset < end ? static_cast<int32_t>(first) + offset : -1;
  };
  float best = -INFINITY;
  int32_t best_token = -1;
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {  // tokens ascend: the first of equal scores stays
      if (token_at(j, i) < 0 || (best_token >= 0 && scores[j][i] <= best)) continue;
      best = scores[j][i];
      best_token = token_at(j, i);
    }
  }
  maxima[threadIdx.x] = best_token < 0 ? kNoKey : rank_key(best, best_token);
  if (threadIdx.x == 0) length[0] = 0;
  sort_keys(maxima, kBlockThreads);
  const RankKey bound = maxima[k - 1];
  const float bound_score = bound == kNoKey ? -INFINITY : score_of(bound);
  if (best >= bound_score) {
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (scores[j][i] < bound_score || token_at(j, i) < 0) continue;
        const RankKey key = rank_key(scores[j][i], token_at(j, i));
        if (key >= bound) shortlist[atomicAdd(length, 1)] = key;
      }
    }
  }
  __syncthreads();
  int32_t padded = 2;
  while (padded < max(length[0], k)) padded *= 2;
  for (int32_t i = length[0] + static_cast<int32_t>(threadIdx.x); i < padded; i += kBlockThreads) {
    shortlist[i] = kNoKey;
  }
  sort_keys(shortlist, padded);
  return shortlist;
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    topk_segment_kernel(const __grid_constant__ TopkParams params) {
  constexpr int kVector = Row<T>::kVector, kLoads = kScoresPerThread / kVector;
  const int64_t r = blockIdx.x, segment = r * params.segments + blockIdx.y;
  const Row<T> row(params.call, r);
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  const int64_t first =
      int64_t{blockIdx.y} * kSegment - row.misalignment() + int64_t{thread} * kVector;
  float scores[kLoads][kVector];
#pragma unroll
  for (int j = 0; j < kLoads; ++j) row.load(first + j * kBlockThreads * kVector, scores[j]);
  Mass mass{-INFINITY, 0.0};
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) mass.largest = fmaxf(mass.largest, scores[j][i]);
  }
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      sum += mass.largest == -INFINITY ? 0.0f : expf(scores[j][i] - mass.largest);
    }
  }
  mass.sum = static_cast<double>(sum);
  mass = block_mass(mass);
  const int32_t k = params.call.k;
  const RankKey* best = select(scores, first, row.vocab, k);
  if (thread < k) store_global(params.keys + segment * k + thread, best[thread]);
  if (thread == 0) {
    store_global(params.largest + segment, mass.largest);
    store_global(params.sums + segment, mass.sum);
  }
}

__device__ void store_result(const TopkLogprobsParams& call, int64_t r, int32_t i, RankKey key,
                             const Mass& mass) {
  const double logprob =
      static_cast<double>(score_of(key)) - (static_cast<double>(mass.largest) + log(mass.sum));
  const float rounded = static_cast<float>(logprob);
  store_global(call.logprobs + r * call.k + i, rounded == rounded ? rounded : -INFINITY);
  store_global(call.tokens + r * call.k + i, static_cast<int64_t>(token_of(key)));
}

__global__ void __launch_bounds__(kBlockThreads)
    topk_merge_kernel(const __grid_constant__ TopkParams params) {
  SPECDEC_SHARED(RankKey, keys, [kShortlist]);
  const int64_t r = blockIdx.x, first = r * params.segments;
  const int32_t thread = static_cast<int32_t>(threadIdx.x), k = params.call.k;
  Mass mass{-INFINITY, 0.0};
  for (int32_t i = thread; i < params.segments; i += kBlockThreads) {
    mass.add({load_global(params.largest + first + i), load_global(params.sums + first + i)});
  }
  mass = block_mass(mass);
  const int64_t num_keys = int64_t{params.segments} * k;
  int32_t kept = 0;  // at the front of `keys`; what is merged next comes behind them
  for (int64_t merged = 0; merged < num_keys;) {
    const int32_t num = static_cast<int32_t>(min(int64_t{kShortlist} - kept, num_keys - merged));
    int32_t padded = 2;
    while (padded < kept + num) padded *= 2;
    for (int32_t i = kept + thread; i < padded; i += kBlockThreads) {
      const int32_t source = i - kept;
      keys[i] = source < num ? load_global(params.keys + first * k + merged + source) : kNoKey;
    }
    sort_keys(keys, padded);
    merged += num;
    kept = k;
  }
  if (thread < k) store_result(params.call, r, thread, keys[thread], mass);
}

// The k-th largest key of the row: eight sweeps, each of which settles a digit.
template <class T>
__device__ RankKey kth_key(const Row<T>& row, int32_t k) {
  SPECDEC_SHARED(int32_t, counts, [kDigits]);
  SPECDEC_SHARED(int32_t, digit, [1]);
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  RankKey prefix = 0;
  for (int shift = 64 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int32_t i = thread; i < kDigits; i += kBlockThreads) counts[i] = 0;
    __syncthreads();
    for (int32_t token = thread; token < row.vocab; token += kBlockThreads) {
      const RankKey key = rank_key(row.score(token), token);
      const bool is_candidate =
          shift == 64 - kDigitBits || (key ^ prefix) >> (shift + kDigitBits) == 0;
      if (is_candidate) atomicAdd(&counts[key >> shift & (kDigits - 1)], 1);
    }
    __syncthreads();
    if (thread == 0) {
      int32_t above = 0, i = kDigits - 1;
      while (above + counts[i] < k) above += counts[i--];
      digit[0] = i;
      counts[0] = above;
    }
    __syncthreads();
    prefix |= static_cast<RankKey>(digit[0]) << shift;
    k -= counts[0];
    __syncthreads();
  }
  return prefix;
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 4)
    topk_large_kernel(const __grid_constant__ TopkParams params) {
  SPECDEC_SHARED(int32_t, length, [1]);
  const int64_t r = blockIdx.x;
  const Row<T> row(params.call, r);
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  Mass mass{-INFINITY, 0.0};
  for (int32_t token = thread; token < row.vocab; token += kBlockThreads) {
    mass.add({row.score(token), 1.0});
  }
  mass = block_mass(mass);
  if (thread == 0) length[0] = 0;
  const RankKey bound = kth_key(row, params.call.k);
  RankKey* keys = params.keys + r * params.sorted;
  for (int32_t token = thread; token < row.vocab; token += kBlockThreads) {
    const RankKey key = rank_key(row.score(token), token);
    if (key >= bound) store_global(keys + atomicAdd(length, 1), key);
  }
  for (int32_t i = params.call.k + thread; i < params.sorted; i += kBlockThreads) {
    store_global(keys + i, kNoKey);
  }
  sort_keys<true>(keys, params.sorted);
  for (int32_t i = thread; i < params.call.k; i += kBlockThreads) {
    store_result(params.call, r, i, load_global(keys + i), mass);
  }
}

// Without memory.
TopkParams plan(const TopkLogprobsParams& call) {
  TopkParams params{};
  params.call = call;
  if (call.k > kMaxSmallK) {
    params.sorted = kMaxSmallK;
    while (params.sorted < call.k) params.sorted *= 2;
    return params;
  }
  // A row that begins after a 16-byte boundary may reach into one more segment.
  const int64_t covered = int64_t{call.vocab} + 16 / element_bytes(call.dtype) - 1;
  params.segments = static_cast<int32_t>((covered + kSegment - 1) / kSegment);
  return params;
}

int64_t keys_per_row(const TopkParams& params) {
  return params.sorted > 0 ? params.sorted : int64_t{params.segments} * params.call.k;
}

}  // namespace

size_t topk_logprobs_scratch_bytes(const TopkLogprobsParams& call) {
  const TopkParams params = plan(call);
  const int64_t per_row = keys_per_row(params) * int64_t{sizeof(RankKey)} +
                          params.segments * int64_t{sizeof(double) + sizeof(float)};
  return static_cast<size_t>(call.rows * per_row);
}

void topk_logprobs(const TopkLogprobsParams& call, void* scratch, Stream stream) {
  if (call.rows == 0) return;
  TopkParams params = plan(call);
  params.keys = static_cast<RankKey*>(scratch);
  params.sums = reinterpret_cast<double*>(params.keys + call.rows * keys_per_row(params));
  params.largest = reinterpret_cast<float*>(params.sums + int64_t{call.rows} * params.segments);
  const unsigned rows = static_cast<unsigned>(call.rows);
  with_dtype(call.dtype, [&](auto element) {
    using T = decltype(element);
    if (call.k > kMaxSmallK) {
      launch("topk_logprobs", topk_large_kernel<T>, dim3(rows), kBlockThreads, 0, stream, params);
      return;
    }
    launch("topk_logprobs", topk_segment_kernel<T>,
           dim3(rows, static_cast<unsigned>(params.segments)), kBlockThreads, 0, stream, params);
    launch("topk_logprobs", topk_merge_kernel, dim3(rows), kBlockThreads, 0, stream, params);
  });
}

}  // namespace specdec::cuda
