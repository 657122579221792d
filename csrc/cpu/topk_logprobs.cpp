// Top-k and the normaliser of each row in two sweeps that stay in cache: block maxima and a running
// log-sum-exp, then only the blocks whose maximum can still enter the heap. One thread owns a row.
// Bytes moved: the row once from memory.
#include "../core/topk_logprobs.hpp"

#include <cmath>
#include <limits>

#include "parallel.hpp"
#include "scratch.hpp"
#include "simd.hpp"
#include "vector_math.hpp"

namespace specdec::SPECDEC_ISA {
namespace {

constexpr int32_t kBlock = 256;

struct Entry {
  float score;
  int32_t token;
};

// The order of the result: larger scores first, then lower tokens.
bool is_before(const Entry& a, const Entry& b) {
  return a.score > b.score || (a.score == b.score && a.token < b.token);
}

// The best k entries seen, the last of them on top.
class Heap {
 public:
  Heap(Entry* entries, int32_t capacity) : entries_(entries), capacity_(capacity) {}

  bool has_room() const { return size_ < capacity_; }

  // The lowest score in it, which a larger one displaces; not where there is room.
  float worst() const { return entries_[0].score; }

  // Tokens arrive in ascending order, so an equal score never displaces an earlier one.
  void offer(Entry entry) {
    if (size_ < capacity_) {
      int32_t i = size_++;
      for (; i > 0 && is_before(entries_[(i - 1) / 2], entry); i = (i - 1) / 2)
        entries_[i] = entries_[(i - 1) / 2];
      entries_[i] = entry;
    } else if (is_before(entry, entries_[0])) {
      sink(entry, size_);
    }
  }

  // Leaves the entries in order.
  void sort() {
    for (int32_t size = size_; size > 1; --size) {
      const Entry last = entries_[size - 1];
      entries_[size - 1] = entries_[0];
      sink(last, size - 1);
    }
  }

 private:
  void sink(Entry entry, int32_t size) {
    int32_t i = 0;
    for (int32_t child = 1; child < size; child = 2 * i + 1) {
      if (child + 1 < size && is_before(entries_[child], entries_[child + 1])) ++child;
      if (!is_before(entry, entries_[child])) break;
      entries_[i] = entries_[child];
      i = child;
    }
    entries_[i] = entry;
  }

  Entry* entries_;
  int32_t capacity_;
  int32_t size_ = 0;
};

// One block as floats: in place where it is whole and has unit stride, else copied to `scores` and
// padded with -inf.
template <class T, class Function>
void with_block(const T* row, int64_t stride, int32_t begin, int32_t num, float* scores,
                Function function) {
  if (stride == 1 && num == kBlock) return function(row + begin);
  for (int32_t i = 0; i < num; ++i) scores[i] = to_float(row[(begin + i) * stride]);
  for (int32_t i = num; i < kBlock; ++i) scores[i] = -kInfinity;
  function(scores);
}

// Sum of exp(score - shift), in double across blocks; NaN counts as -inf.
template <class T>
double block_mass(const T* scores, float shift) {
  Float mass{};
  for (int32_t i = 0; i < kBlock; i += kLanes) {
    const Float distance = (load(scores + i) - shift) * 1.44269504f;
    mass += exp2_normal(larger(splat(-126.0f), distance));
  }
  return static_cast<double>(sum(mass));
}

template <class T>
void offer_block(const T* scores, int32_t begin, int32_t num, Heap& heap) {
  for (int32_t i = 0; i < num; i += kLanes) {
    const Float lanes = load(scores + i);
    if (!heap.has_room() && !any(lanes > heap.worst())) continue;
    for (int32_t lane = 0; lane < kLanes && i + lane < num; ++lane) {
      const float score = lanes[lane] == lanes[lane] ? lanes[lane] : -kInfinity;
      if (heap.has_room() || score > heap.worst()) heap.offer({score, begin + i + lane});
    }
  }
}

struct Buffers {
  Scratch<float> scores;
  Scratch<Entry> heap;
};

template <class T>
void top_row(const TopkLogprobsParams& params, int64_t r, Buffers& buffers) {
  const T* row = static_cast<const T*>(params.logits) + r * params.stride_row;
  float* scores = buffers.scores.reserve(kBlock);
  Heap heap(buffers.heap.reserve(params.k), params.k);
  float shift = -kInfinity;
  double mass = 0.0;
  for (int32_t begin = 0; begin < params.vocab; begin += kBlock) {
    const int32_t num = params.vocab - begin < kBlock ? params.vocab - begin : kBlock;
    if (params.stride_vocab == 1) prefetch(row + begin + kAhead<T>, kBlock);
    with_block(row, params.stride_vocab, begin, num, scores, [&](const auto* block) {
      const float best = largest_of(block, kBlock);
      if (best > shift) {
        mass = shift == -kInfinity
                   ? 0.0
                   : mass * std::exp(static_cast<double>(shift) - static_cast<double>(best));
        shift = best;
      }
      if (shift > -kInfinity && shift < kInfinity) mass += block_mass(block, shift);
      if (heap.has_room() || best > heap.worst()) offer_block(block, begin, num, heap);
    });
  }
  heap.sort();
  const Entry* entries = buffers.heap.get();
  const double total = static_cast<double>(shift) + std::log(mass);
  for (int32_t j = 0; j < params.k; ++j) {
    const double logprob = static_cast<double>(entries[j].score) - total;
    params.logprobs[r * params.k + j] =
        logprob == logprob ? static_cast<float>(logprob) : -kInfinity;
    params.tokens[r * params.k + j] = entries[j].token;
  }
}

}  // namespace

void topk_logprobs(const TopkLogprobsParams& params) {
  parallel_for(params.rows, rows_per_thread(params.vocab), [&](int64_t begin, int64_t end) {
    thread_local Buffers buffers;
    with_dtype(params.dtype, [&](auto element) {
      for (int64_t r = begin; r < end; ++r) top_row<decltype(element)>(params, r, buffers);
    });
  });
}

}  // namespace specdec::SPECDEC_ISA
