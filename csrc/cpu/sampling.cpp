// Rows of the target's law. Compiled without contraction into FMA: scores and noise have the
// reference's bits.
//
// The three filters together keep exactly the tokens whose score reaches one edge, so no row is
// sorted and no probability is stored: scores and the largest score of each block of kBlock tokens
// are written once, and later steps touch only blocks that reach the edge. Delicate: masses are
// summed in double, in another order than the reference's, so a token may fall on the other side of
// top-p only where the cumulative mass is within about 1e-12 of the edge.
#include "sampling.hpp"

#include <cfloat>
#include <cmath>

#include "../core/philox.hpp"
#include "edge.hpp"
#include "parallel.hpp"
#include "simd.hpp"

namespace specdec::SPECDEC_ISA {
namespace {

constexpr int32_t kBlock = 256;
constexpr int32_t kGroup = 4 * kLanes;  // tokens whose noise is drawn together
constexpr int32_t kMaxChunks = 64;      // of a row shared among threads
constexpr int64_t kBlocksPerThread = 32;

template <class T>
void widen(const T* source, int64_t stride, int32_t num, float* target) {
  int32_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= num; i += kLanes) store(target + i, load(source + i));
  }
  for (; i < num; ++i) target[i] = to_float(source[i * stride]);
}

// Scores of one block: biased logits over temperature, NaN as -inf, padded with -inf. Returns the
// largest.
float score_block(const RowLogits& row, float temperature, int32_t block, float* scores) {
  const int64_t first = static_cast<int64_t>(block) * kBlock;
  const int32_t num = row.vocab - first < kBlock ? static_cast<int32_t>(row.vocab - first) : kBlock;
  for (int32_t i = num; i < kBlock; ++i) scores[i] = -kInfinity;
  with_dtype(row.dtype, [&](auto tag) {
    using T = decltype(tag);
    widen(static_cast<const T*>(row.logits) + first * row.stride, row.stride, num, scores);
  });
  if (row.bias != nullptr && row.bias_stride == 1) {
    for (int32_t i = 0; i < num; ++i) scores[i] += row.bias[first + i];
  } else if (row.bias != nullptr) {
    for (int32_t i = 0; i < num; ++i) scores[i] += row.bias[(first + i) * row.bias_stride];
  }
  Float best = splat(-kInfinity);
  for (int32_t i = 0; i < kBlock; i += kLanes) {
    Float lanes = load(scores + i);
    if (temperature != 1.0f) lanes /= splat(temperature);
    lanes = lanes == lanes ? lanes : splat(-kInfinity);
    store(scores + i, lanes);
    best = larger(best, lanes);
  }
  return largest(best);
}

template <int... kIndex>
Uint zip(Uint a, Uint b, std::integer_sequence<int, kIndex...>, bool is_high) {
  return is_high
             ? __builtin_shufflevector(a, b, ((kIndex % 2) * kLanes + kIndex / 2 + kLanes / 2)...)
             : __builtin_shufflevector(a, b, ((kIndex % 2) * kLanes + kIndex / 2)...);
}

// Random bits of kGroup tokens from `first` on, in token order.
void group_bits(const RowLaw& law, int32_t first, Uint (&ordered)[4]) {
  constexpr auto kIndices = std::make_integer_sequence<int, kLanes>();
  Uint block{};
  for (int i = 0; i < kLanes; ++i) block[i] = static_cast<uint32_t>(first / 4 + i);
  Uint bits[4];
  philox<VectorLanes>(block, law.seed, law.position, law.domain, bits);
  for (int half = 0; half < 2; ++half) {
    const Uint even = zip(bits[0], bits[2], kIndices, half);
    const Uint odd = zip(bits[1], bits[3], kIndices, half);
    ordered[2 * half] = zip(even, odd, kIndices, false);
    ordered[2 * half + 1] = zip(even, odd, kIndices, true);
  }
}

// A bound on gumbel(bits) from the exponent of bits alone: noise <= -log(v), with a margin above
// its rounding.
Float noise_bound(Uint bits) {
  const Int exponent = (VectorLanes::to_bits(VectorLanes::to_float(bits) + 0.5f) >> 23) - 127;
  return VectorLanes::to_float(32 - exponent) * 0.6931472f + 1e-3f;
}

}  // namespace

RowLogits row_logits(const SamplingParams& params, int64_t b, int64_t node) {
  const int64_t first = b * params.stride_logits_b + node * params.stride_logits_n;
  const void* logits = nullptr;
  with_dtype(params.dtype,
             [&](auto tag) { logits = static_cast<const decltype(tag)*>(params.logits) + first; });
  const float* bias = params.bias == nullptr ? nullptr : params.bias + b * params.stride_bias_b;
  return {logits, bias, params.stride_logits_v, params.stride_bias_v, params.vocab, params.dtype};
}

RowLaw row_law(const SamplingParams& params, int64_t b, int64_t offset) {
  RowLaw law;
  if (params.temperature == nullptr) return law;
  law.temperature = params.temperature[b];
  law.seed = params.seeds[b];
  law.position = static_cast<int64_t>(static_cast<uint64_t>(params.positions[b]) +
                                      static_cast<uint64_t>(offset));
  law.domain = params.domain;
  if (params.top_k != nullptr) law.top_k = params.top_k[b];
  if (params.top_p != nullptr) law.top_p = params.top_p[b];
  if (params.min_p != nullptr) law.min_p = params.min_p[b];
  return law;
}

Drawn RowSampler::draw(const RowLogits& row, const RowLaw& law, bool is_parallel) {
  num_blocks_ = (row.vocab + kBlock - 1) / kBlock;
  block_max_.reserve(num_blocks_);
  if (!law.is_greedy()) {
    scores_.reserve(static_cast<int64_t>(num_blocks_) * kBlock);
    candidates_.reserve(static_cast<int64_t>(num_blocks_) * kBlock);
  }
  float largest = scan(row, law, is_parallel);
  if (largest == -kInfinity) return {0, 1};
  if (law.is_greedy()) return {first_token(row, largest), 0};
  if (largest == kInfinity) {
    keep_infinite();
    largest = 0.0f;
  }
  const Best best = draw_kept(law, filter_edge(law, largest), is_parallel);
  return {best.token, best.score == -kInfinity};
}

// Fills block_max_, and scores_ unless greedy. Returns the largest score.
float RowSampler::scan(const RowLogits& row, const RowLaw& law, bool is_parallel) {
  float* block_max = block_max_.get();
  float* scores = scores_.get();
  const auto scan_blocks = [&](int64_t begin, int64_t end) {
    alignas(64) float unused[kBlock];
    for (int64_t block = begin; block < end; ++block) {
      float* target = law.is_greedy() ? unused : scores + block * kBlock;
      const float temperature = law.is_greedy() ? 1.0f : law.temperature;
      block_max[block] = score_block(row, temperature, static_cast<int32_t>(block), target);
    }
  };
  if (is_parallel) {
    parallel_for(num_blocks_, kBlocksPerThread, scan_blocks);
  } else {
    scan_blocks(0, num_blocks_);
  }
  float largest = -kInfinity;
  for (int32_t block = 0; block < num_blocks_; ++block) {
    if (block_max[block] > largest) largest = block_max[block];
  }
  return largest;
}

// The lowest token whose biased logit is `score`, the largest of the row.
int32_t RowSampler::first_token(const RowLogits& row, float score) const {
  int32_t block = 0;
  while (block_max_.get()[block] != score) ++block;
  alignas(64) float scores[kBlock];
  score_block(row, 1.0f, block, scores);
  int32_t i = 0;
  while (scores[i] != score) ++i;
  return block * kBlock + i;
}

// A row with +inf scores is uniform over those tokens.
void RowSampler::keep_infinite() {
  for (int32_t block = 0; block < num_blocks_; ++block) {
    float* scores = scores_.get() + static_cast<int64_t>(block) * kBlock;
    for (int32_t i = 0; i < kBlock; ++i) scores[i] = scores[i] == kInfinity ? 0.0f : -kInfinity;
    block_max_.get()[block] = block_max_.get()[block] == kInfinity ? 0.0f : -kInfinity;
  }
}

// The score that a token must reach to pass top-k, top-p and min-p.
float RowSampler::filter_edge(const RowLaw& law, float largest) {
  float edge = -FLT_MAX;
  const Mass mass{largest};
  if (law.top_k > 0) {
    collect_heaviest(largest, law.top_k, Count{});
    edge = edge_of(candidates_.get(), num_candidates_, law.top_k, Count{});
  }
  if (law.top_p < 1.0f) {
    double total;
    if (edge > -FLT_MAX) {
      collect(edge);
      total = mass(candidates_.get(), num_candidates_);
    } else {
      total = total_mass(largest);
    }
    // the tokens at most as likely hold more than 1 - top_p <=> those more likely hold less than
    // top_p
    const double target = std::fmax(law.top_p * total, DBL_MIN);
    if (edge == -FLT_MAX) collect_heaviest(largest, target, mass);
    edge = edge_of(candidates_.get(), num_candidates_, target, mass);
  }
  if (law.min_p > 0.0f) {
    const double least = std::log(static_cast<double>(law.min_p));  // of score - largest
    float rounded = static_cast<float>(largest + least);
    if (static_cast<double>(rounded) - largest < least)
      rounded = std::nextafterf(rounded, kInfinity);
    if (rounded > edge) edge = rounded;
  }
  return edge;
}

// Mass of the whole row. Blocks below e^-60 of the likeliest token do not reach the precision of
// the sum.
double RowSampler::total_mass(float largest) const {
  const Mass mass{largest};
  double total = 0.0;
  for (int32_t block = 0; block < num_blocks_; ++block) {
    if (block_max_.get()[block] < largest - 60.0f) continue;
    total += mass(scores_.get() + static_cast<int64_t>(block) * kBlock, kBlock);
  }
  return total;
}

// Gathers the scores >= `least`.
void RowSampler::collect(float least) {
  float* target = candidates_.get();
  int32_t num = 0;
  for (int32_t block = 0; block < num_blocks_; ++block) {
    if (block_max_.get()[block] < least) continue;
    const float* scores = scores_.get() + static_cast<int64_t>(block) * kBlock;
    for (int32_t i = 0; i < kBlock; i += kLanes) {
      if (!any(load(scores + i) >= least)) continue;
      for (int32_t lane = 0; lane < kLanes; ++lane) {
        target[num] = scores[i + lane];
        num += scores[i + lane] >= least;
      }
    }
  }
  num_candidates_ = num;
}

// Gathers the largest scores, enough of them to weigh `target`, or all that are finite.
template <class Weight>
void RowSampler::collect_heaviest(float largest, double target, Weight weight) {
  for (float depth = 1.0f;; depth *= 2.0f) {
    const float least = std::fmaxf(largest - depth, -FLT_MAX);
    collect(least);
    if (least == -FLT_MAX || weight(candidates_.get(), num_candidates_) >= target) return;
  }
}

RowSampler::Best RowSampler::draw_kept(const RowLaw& law, float edge, bool is_parallel) const {
  if (!is_parallel) return draw_blocks(law, edge, 0, num_blocks_);
  Best bests[kMaxChunks];
  const int32_t per_chunk = (num_blocks_ + kMaxChunks - 1) / kMaxChunks;
  const int32_t num_chunks = (num_blocks_ + per_chunk - 1) / per_chunk;
  parallel_for(
      num_chunks, (kBlocksPerThread + per_chunk - 1) / per_chunk, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          const int32_t first = static_cast<int32_t>(chunk) * per_chunk;
          const int32_t last = first + per_chunk < num_blocks_ ? first + per_chunk : num_blocks_;
          bests[chunk] = draw_blocks(law, edge, first, last);
        }
      });
  Best best;
  for (int32_t chunk = 0; chunk < num_chunks; ++chunk) {
    if (bests[chunk].score > best.score) best = bests[chunk];
  }
  return best;
}

// The lowest argmax of score + noise among the scores >= `edge` of some blocks. Noise is computed
// only where its bound could beat the best so far: a few tokens per row.
RowSampler::Best RowSampler::draw_blocks(const RowLaw& law, float edge, int32_t begin,
                                         int32_t end) const {
  Best best;
  for (int32_t block = begin; block < end; ++block) {
    if (block_max_.get()[block] < edge) continue;
    const int32_t block_end = (block + 1) * kBlock;
    for (int32_t first = block * kBlock; first < block_end; first += kGroup) {
      const float* scores = scores_.get() + first;
      Int kept{};
      for (int32_t i = 0; i < kGroup; i += kLanes) kept |= load(scores + i) >= edge;
      if (!any(kept)) continue;
      Uint bits[4];
      group_bits(law, first, bits);
      for (int32_t part = 0; part < 4; ++part) {
        Float lanes = load(scores + part * kLanes);
        lanes = lanes >= edge ? lanes : splat(-kInfinity);
        if (!any(lanes + noise_bound(bits[part]) > best.score)) continue;
        const Float noisy = lanes + gumbel<VectorLanes>(bits[part]);
        if (!any(noisy > best.score)) continue;
        for (int32_t lane = 0; lane < kLanes; ++lane) {
          if (noisy[lane] > best.score) best = {noisy[lane], first + part * kLanes + lane};
        }
      }
    }
  }
  return best;
}

}  // namespace specdec::SPECDEC_ISA
