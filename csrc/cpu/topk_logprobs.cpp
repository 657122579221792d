// Top-k and the normaliser of each row in two sweeps that stay in cache: block maxima and a running
// log-sum-exp, then only the blocks whose maximum can still enter the heap. One thread owns a row.
// Bytes moved: the row once from memory.
#include "../core/topk_logprobs.hpp"

#include <cmath>
#include <limits>

#include "parallel.hpp"
#include "scratch.hpp"
#include "simd.hpp"

namespace specdec::SPECDEC_ISA {
namespace {

constexpr int32_t kBlock = 256;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// exp for x <= 0, relative error about 2e-7: 2^n times a polynomial of the remainder; 0 below -87.
Float exponential(Float x) {
  constexpr float kRound =
      12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Float shifted = x * 1.44269504f + kRound;
  const Float n = shifted - kRound;
  const Float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Float p = splat(1.0f / 720);
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  const Int scale = (reinterpret_cast<Int>(shifted) + 127) << 23;
  return x < -87.0f ? Float{} : p * reinterpret_cast<Float>(scale);
}

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

  bool admits(float score) const { return size_ < capacity_ || score > entries_[0].score; }

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

template <class T>
float score_at(const T* row, int64_t stride, int32_t token) {
  const float score = to_float(row[token * stride]);
  return score == score ? score : -kInfinity;
}

template <class T>
void widen_block(const T* row, int64_t stride, int32_t begin, int32_t num, float* scores) {
  int32_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= num; i += kLanes) {
      const Float lanes = load(row + begin + i);
      store(scores + i, lanes == lanes ? lanes : splat(-kInfinity));
    }
  }
  for (; i < num; ++i) scores[i] = score_at(row, stride, begin + i);
  for (; i < kBlock; ++i) scores[i] = -kInfinity;
}

float block_maximum(const float* scores) {
  Float best = load(scores);
  for (int32_t i = kLanes; i < kBlock; i += kLanes) best = larger(best, load(scores + i));
  return largest(best);
}

// Sum of exp(score - shift), in double across blocks.
double block_mass(const float* scores, float shift) {
  Float mass{};
  for (int32_t i = 0; i < kBlock; i += kLanes) mass += exponential(load(scores + i) - shift);
  return static_cast<double>(sum(mass));
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
    widen_block(row, params.stride_vocab, begin, num, scores);
    const float best = block_maximum(scores);
    if (best > shift) {
      mass = shift == -kInfinity
                 ? 0.0
                 : mass * std::exp(static_cast<double>(shift) - static_cast<double>(best));
      shift = best;
    }
    if (shift > -kInfinity && shift < kInfinity) mass += block_mass(scores, shift);
    if (!heap.admits(best)) continue;
    for (int32_t i = 0; i < num; ++i) {
      if (heap.admits(scores[i])) heap.offer({scores[i], begin + i});
    }
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
