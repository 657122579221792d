// Rows of the target's law. Compiled without contraction into FMA: scores and noise have the
// reference's bits.
//
// One sweep leaves the largest logit of each block of kBlock tokens; later steps score again only
// the blocks that can hold what they look for, so no row is sorted and no score or probability of a
// whole row is stored. The three filters together keep exactly the tokens whose score reaches one
// edge. Delicate: masses are summed in double, in another order than the reference's, so a token
// may fall on the other side of top-p only where the cumulative mass is within about 1e-12 of the
// edge.
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
constexpr int64_t kBlocksPerThread = 256;
constexpr float kLargestNoise = 22.9f;  // gumbel(0) = 22.87

int32_t block_size(const RowLogits& row, int32_t block) {
  const int64_t left = row.vocab - static_cast<int64_t>(block) * kBlock;
  return left < kBlock ? static_cast<int32_t>(left) : kBlock;
}

template <class T>
void widen(const T* source, int64_t stride, int32_t num, float* target) {
  int32_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= num; i += kLanes) store(target + i, load(source + i));
  }
  for (; i < num; ++i) target[i] = to_float(source[i * stride]);
}

// Biased logits of one block, padded with -inf; NaN where the logits are.
void read_block(const RowLogits& row, int32_t block, float* logits) {
  const int64_t first = static_cast<int64_t>(block) * kBlock;
  const int32_t num = block_size(row, block);
  with_dtype(row.dtype, [&](auto tag) {
    using T = decltype(tag);
    widen(static_cast<const T*>(row.logits) + first * row.stride, row.stride, num, logits);
  });
  for (int32_t i = num; i < kBlock; ++i) logits[i] = -kInfinity;
  if (row.bias != nullptr) {
    for (int32_t i = 0; i < num; ++i) logits[i] += row.bias[(first + i) * row.bias_stride];
  }
  if (row.mask != nullptr) {
    for (int32_t i = 0; i < num; ++i) {
      if (!row.mask[(first + i) * row.mask_stride]) logits[i] = -kInfinity;
    }
  }
}

// The largest of `num` values, a multiple of kLanes; NaN counts as -inf.
template <class T>
float largest_of(const T* values, int32_t num) {
  Float best = splat(-kInfinity);
  for (int32_t i = 0; i < num; i += kLanes) best = larger(best, load(values + i));
  return largest(best);
}

float largest_of_block(const RowLogits& row, int32_t block) {
  if (row.stride != 1 || row.bias != nullptr || row.mask != nullptr ||
      block_size(row, block) < kBlock) {
    alignas(64) float logits[kBlock];
    read_block(row, block, logits);
    return largest_of(logits, kBlock);
  }
  float best = 0.0f;
  with_dtype(row.dtype, [&](auto tag) {
    using T = decltype(tag);
    best = largest_of(static_cast<const T*>(row.logits) + static_cast<int64_t>(block) * kBlock,
                      kBlock);
  });
  return best;
}

// The first counter block of the noise of a row.
uint32_t stream_block(const RowLogits& row, const RowLaw& law) {
  return static_cast<uint32_t>(law.stream * ((static_cast<int64_t>(row.vocab) + 3) / 4));
}

template <int... kIndex>
Uint zip(Uint a, Uint b, std::integer_sequence<int, kIndex...>, bool is_high) {
  return is_high
             ? __builtin_shufflevector(a, b, ((kIndex % 2) * kLanes + kIndex / 2 + kLanes / 2)...)
             : __builtin_shufflevector(a, b, ((kIndex % 2) * kLanes + kIndex / 2)...);
}

// Random bits of kGroup tokens whose first counter block is `first_block`, in token order.
void group_bits(const RowLaw& law, uint32_t first_block, Uint (&ordered)[4]) {
  constexpr auto kIndices = std::make_integer_sequence<int, kLanes>();
  Uint block{};
  for (int i = 0; i < kLanes; ++i) block[i] = first_block + static_cast<uint32_t>(i);
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
  return {
      .logits = logits,
      .bias = params.bias == nullptr ? nullptr : params.bias + b * params.stride_bias_b,
      .mask = params.mask == nullptr ? nullptr : params.mask + b * params.stride_mask_b,
      .stride = params.stride_logits_v,
      .bias_stride = params.stride_bias_v,
      .mask_stride = params.stride_mask_v,
      .vocab = params.vocab,
      .dtype = params.dtype,
  };
}

RowLaw row_law(const SamplingParams& params, int64_t b, int64_t offset) {
  RowLaw law;
  if (params.temperature == nullptr) return law;
  law.temperature = params.temperature[b];
  if (params.seeds != nullptr && params.positions != nullptr) {
    law.seed = params.seeds[b];
    law.position = static_cast<int64_t>(static_cast<uint64_t>(params.positions[b]) +
                                        static_cast<uint64_t>(offset));
  }
  if (params.streams != nullptr) law.stream = params.streams[b];
  law.domain = params.domain;
  if (params.top_k != nullptr) law.top_k = params.top_k[b];
  if (params.top_p != nullptr) law.top_p = params.top_p[b];
  if (params.min_p != nullptr) law.min_p = params.min_p[b];
  return law;
}

Drawn RowSampler::draw(const RowLogits& row, const RowLaw& law, bool is_shared) {
  if (!scan(row, law, is_shared)) return {0, kNoFiniteLogit};
  if (law.is_greedy()) return {first_token(), kOk};
  Best best;
  if (law.has_filters()) {
    filter();
    best = draw_candidates();
  } else {
    best = draw_dense(is_shared);
  }
  return {best.token, best.score == -kInfinity ? kNoFiniteLogit : kOk};
}

int32_t RowSampler::draw_many(const RowLogits& row, const RowLaw& law, int32_t num,
                              int64_t* tokens) {
  Scratch<float> largest;
  float* best = largest.reserve(num);
  for (int32_t k = 0; k < num; ++k) {
    tokens[k] = -1;
    best[k] = -kInfinity;
  }
  num_candidates_ = 0;
  if (scan(row, law, false)) filter();
  for (int32_t i = 0; i < num_candidates_; i += kLanes) {
    const int32_t count = num_candidates_ - i < kLanes ? num_candidates_ - i : kLanes;
    Float scores = load(candidates_.get() + i);
    if (!law.is_greedy()) scores += noise(tokens_.get() + i, count);
    for (int32_t lane = 0; lane < count; ++lane) {
      // Keeps the num largest in falling order, of equals the lower token first.
      int32_t place = num;
      while (place > 0 && scores[lane] > best[place - 1]) --place;
      for (int32_t k = num - 1; k > place; --k) {
        best[k] = best[k - 1];
        tokens[k] = tokens[k - 1];
      }
      if (place < num) {
        best[place] = scores[lane];
        tokens[place] = tokens_.get()[i + lane];
      }
    }
  }
  if (tokens[0] >= 0) return kOk;
  tokens[0] = 0;
  return kNoFiniteLogit;
}

void RowSampler::keep(const RowLogits& row, const RowLaw& law, bool is_shared, KeptLaw& kept) {
  kept.resize(0);
  if (!scan(row, law, is_shared)) return;
  if (law.is_greedy()) {
    kept.resize(1);
    kept.tokens()[0] = first_token();
    kept.probs()[0] = 1.0;
    return;
  }
  filter();
  const int32_t num = num_candidates_;
  kept.resize(num + kLanes);  // whole lanes are stored
  Double total{}, moment{};   // sums of w and of w log w
  for (int32_t i = 0; i < num; i += kLanes / 2) {
    HalfFloat lanes;
    std::memcpy(&lanes, candidates_.get() + i, sizeof lanes);
    const Double distance = __builtin_convertvector(lanes, Double) - static_cast<double>(largest_);
    const Double weight = exp(distance);
    std::memcpy(kept.probs() + i, &weight, sizeof weight);
    total += weight;
    moment += weight > 0.0 ? weight * distance : Double{};
  }
  kept.resize(num);
  std::memcpy(kept.tokens(), tokens_.get(), sizeof(int32_t) * static_cast<size_t>(num));
  if (num > 0) kept.scale(1.0 / sum(total));
  entropy_ = std::log(sum(total)) - sum(moment) / sum(total);
}

TopTwo RowSampler::top_two(const RowLogits& row, bool is_shared) {
  scan(row, RowLaw{}, is_shared);
  TopTwo best{-kInfinity, -kInfinity};
  alignas(64) float scores[kBlock];
  for (int32_t block = 0; block < num_blocks_; ++block) {
    if (!(block_max_.get()[block] > best.second)) continue;
    score_block(block, scores);
    for (int32_t i = 0; i < kBlock; ++i) {
      if (scores[i] > best.first) {
        best = {scores[i], best.first};
      } else if (scores[i] > best.second) {
        best.second = scores[i];
      }
    }
  }
  return best;
}

// Fills block_max_ and takes the row in hand. False if no logit is finite.
bool RowSampler::scan(const RowLogits& row, const RowLaw& law, bool is_shared) {
  row_ = row;
  law_ = law;
  num_blocks_ = (row.vocab + kBlock - 1) / kBlock;
  float* block_max = block_max_.reserve(num_blocks_);
  const auto scan_blocks = [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      block_max[block] = largest_of_block(row, static_cast<int32_t>(block));
    }
  };
  if (is_shared) {
    parallel_for(num_blocks_, kBlocksPerThread, scan_blocks);
  } else {
    scan_blocks(0, num_blocks_);
  }
  float best = -kInfinity;
  for (int32_t block = 0; block < num_blocks_; ++block) {
    if (block_max[block] > best) best = block_max[block];
  }
  largest_ = law.is_greedy() ? best : best / law.temperature;
  is_infinite_ = largest_ == kInfinity && !law.is_greedy();
  if (is_infinite_) largest_ = 0.0f;
  return best > -kInfinity;
}

// The largest score of a block. Division rounds monotonically, so it is that of the largest logit.
float RowSampler::block_score(int32_t block) const {
  if (law_.is_greedy()) return block_max_.get()[block];
  const float best = block_max_.get()[block] / law_.temperature;
  if (is_infinite_) return best == kInfinity ? 0.0f : -kInfinity;
  return best;
}

// Scores of a block: biased logits over temperature, NaN as -inf, padded with -inf.
void RowSampler::score_block(int32_t block, float* scores) const {
  read_block(row_, block, scores);
  for (int32_t i = 0; i < kBlock; i += kLanes) {
    Float lanes = load(scores + i);
    if (!law_.is_greedy() && law_.temperature != 1.0f) lanes /= splat(law_.temperature);
    if (is_infinite_) lanes = lanes == kInfinity ? Float{} : splat(-kInfinity);
    store(scores + i, lanes == lanes ? lanes : splat(-kInfinity));
  }
}

// The lowest token with the largest score.
int32_t RowSampler::first_token() const {
  int32_t block = 0;
  while (block_score(block) != largest_) ++block;
  alignas(64) float scores[kBlock];
  score_block(block, scores);
  int32_t i = 0;
  while (scores[i] != largest_) ++i;
  return block * kBlock + i;
}

// Gathers exactly the tokens that pass top-k, top-p and min-p; all finite ones of a greedy row.
void RowSampler::filter() {
  const bool is_top_k = law_.top_k > 0, is_top_p = law_.top_p < 1.0f;
  if (law_.is_greedy() || !law_.has_filters()) return gather(-FLT_MAX);
  if (is_top_k) filter_top_k();
  if (is_top_p) filter_top_p(is_top_k);
  if (law_.min_p > 0.0f) {
    if (is_top_k || is_top_p) {
      drop_below(min_p_edge());
    } else {
      gather(min_p_edge());
    }
  }
}

void RowSampler::filter_top_k() {
  if (law_.top_k <= num_blocks_ / 2) {
    // top_k blocks hold a score that reaches the edge of their maxima, so as many tokens do.
    float* maxima = ordered_.reserve(num_blocks_);
    for (int32_t block = 0; block < num_blocks_; ++block) maxima[block] = block_score(block);
    gather(std::fmaxf(edge_of(maxima, num_blocks_, law_.top_k, Count{}), -FLT_MAX));
  } else {
    gather_heaviest(law_.top_k, Count{});
  }
  drop_below(candidates_edge(law_.top_k, Count{}));
}

void RowSampler::filter_top_p(bool is_gathered) {
  const Mass mass{largest_};
  const double total = is_gathered ? mass(candidates_.get(), num_candidates_) : total_mass();
  // the tokens at most as likely hold more than 1 - top_p <=> those more likely hold less than
  // top_p
  const double target = std::fmax(law_.top_p * total, DBL_MIN);
  if (!is_gathered) gather_heaviest(target, mass);
  drop_below(candidates_edge(target, mass));
}

// The least score of a token with at least min_p times the probability of the likeliest.
float RowSampler::min_p_edge() const {
  const double least = std::log(static_cast<double>(law_.min_p));  // of score - largest
  const float rounded = static_cast<float>(largest_ + least);
  const bool is_below = static_cast<double>(rounded) - largest_ < least;
  return is_below ? std::nextafterf(rounded, kInfinity) : rounded;
}

// Mass of the whole row. Blocks below e^-60 of the likeliest token do not reach the precision of
// the sum.
double RowSampler::total_mass() const {
  const Mass mass{largest_};
  alignas(64) float scores[kBlock];
  double total = 0.0;
  for (int32_t block = 0; block < num_blocks_; ++block) {
    if (block_score(block) < largest_ - 60.0f) continue;
    score_block(block, scores);
    total += mass(scores, kBlock);
  }
  return total;
}

// Makes the tokens with a score >= `least` the candidates.
void RowSampler::gather(float least) {
  float* kept = candidates_.reserve(static_cast<int64_t>(num_blocks_) * kBlock);
  int32_t* tokens = tokens_.reserve(static_cast<int64_t>(num_blocks_) * kBlock);
  alignas(64) float scores[kBlock];
  int32_t num = 0;
  for (int32_t block = 0; block < num_blocks_; ++block) {
    if (block_score(block) < least) continue;
    score_block(block, scores);
    for (int32_t i = 0; i < kBlock; i += kLanes) {
      if (!any(load(scores + i) >= least)) continue;
      for (int32_t lane = i; lane < i + kLanes; ++lane) {
        kept[num] = scores[lane];
        tokens[num] = block * kBlock + lane;
        num += scores[lane] >= least;
      }
    }
  }
  num_candidates_ = num;
  for (; num % kLanes != 0; ++num) kept[num] = -kInfinity;
}

// Gathers the largest scores, enough of them to weigh `target`, or all that are finite.
template <class Weight>
void RowSampler::gather_heaviest(double target, Weight weight) {
  for (float depth = 1.0f;; depth *= 2.0f) {
    const float least = std::fmaxf(largest_ - depth, -FLT_MAX);
    gather(least);
    if (least == -FLT_MAX || weight(candidates_.get(), num_candidates_) >= target) return;
  }
}

template <class Weight>
float RowSampler::candidates_edge(double target, Weight weight) {
  float* ordered = ordered_.reserve(num_candidates_);
  std::memcpy(ordered, candidates_.get(), sizeof(float) * static_cast<size_t>(num_candidates_));
  return edge_of(ordered, num_candidates_, target, weight);
}

void RowSampler::drop_below(float edge) {
  float* kept = candidates_.get();
  int32_t* tokens = tokens_.get();
  int32_t num = 0;
  for (int32_t i = 0; i < num_candidates_; ++i) {
    kept[num] = kept[i];
    tokens[num] = tokens[i];
    num += kept[i] >= edge;
  }
  num_candidates_ = num;
  for (; num % kLanes != 0; ++num) kept[num] = -kInfinity;
}

// Noise of up to kLanes tokens.
Float RowSampler::noise(const int32_t* tokens, int32_t num) const {
  Uint block{}, word{};
  for (int32_t lane = 0; lane < num; ++lane) {
    block[lane] = stream_block(row_, law_) + static_cast<uint32_t>(tokens[lane] / 4);
    word[lane] = static_cast<uint32_t>(tokens[lane] % 4);
  }
  Uint bits[4];
  philox<VectorLanes>(block, law_.seed, law_.position, law_.domain, bits);
  const Uint low = word == 0 ? bits[0] : bits[1], high = word == 2 ? bits[2] : bits[3];
  return gumbel<VectorLanes>(word < 2 ? low : high);
}

// The lowest argmax of score + noise among the candidates.
RowSampler::Best RowSampler::draw_candidates() const {
  Best best;
  for (int32_t i = 0; i < num_candidates_; i += kLanes) {
    const int32_t count = num_candidates_ - i < kLanes ? num_candidates_ - i : kLanes;
    const Float noisy = load(candidates_.get() + i) + noise(tokens_.get() + i, count);
    for (int32_t lane = 0; lane < count; ++lane) {
      if (noisy[lane] > best.score) best = {noisy[lane], tokens_.get()[i + lane]};
    }
  }
  return best;
}

// The same over the whole row.
RowSampler::Best RowSampler::draw_dense(bool is_shared) const {
  if (!is_shared) return draw_blocks(0, num_blocks_);
  Best bests[kMaxChunks];
  const int32_t per_chunk = (num_blocks_ + kMaxChunks - 1) / kMaxChunks;
  const int32_t num_chunks = (num_blocks_ + per_chunk - 1) / per_chunk;
  parallel_for(num_chunks, (kBlocksPerThread + per_chunk - 1) / per_chunk,
               [&](int64_t begin, int64_t end) {
                 for (int64_t chunk = begin; chunk < end; ++chunk) {
                   const int32_t first = static_cast<int32_t>(chunk) * per_chunk;
                   const int32_t last = first + per_chunk;
                   bests[chunk] = draw_blocks(first, last < num_blocks_ ? last : num_blocks_);
                 }
               });
  Best best;
  for (int32_t chunk = 0; chunk < num_chunks; ++chunk) {
    if (bests[chunk].score > best.score) best = bests[chunk];
  }
  return best;
}

// Noise is computed only where its bound could beat the best so far: a few tokens per row.
RowSampler::Best RowSampler::draw_blocks(int32_t begin, int32_t end) const {
  const uint32_t first_block = stream_block(row_, law_);
  alignas(64) float scores[kBlock];
  Best best;
  for (int32_t block = begin; block < end; ++block) {
    if (!(block_score(block) + kLargestNoise > best.score)) continue;
    score_block(block, scores);
    for (int32_t i = 0; i < kBlock; i += kGroup) {
      Uint bits[4];
      group_bits(law_, first_block + static_cast<uint32_t>((block * kBlock + i) / 4), bits);
      for (int32_t part = 0; part < 4; ++part) {
        const Float lanes = load(scores + i + part * kLanes);
        if (!any(lanes + noise_bound(bits[part]) > best.score)) continue;
        const Float noisy = lanes + gumbel<VectorLanes>(bits[part]);
        if (!any(noisy > best.score)) continue;
        for (int32_t lane = 0; lane < kLanes; ++lane) {
          if (noisy[lane] > best.score) {
            best = {noisy[lane], block * kBlock + i + part * kLanes + lane};
          }
        }
      }
    }
  }
  return best;
}

}  // namespace specdec::SPECDEC_ISA
