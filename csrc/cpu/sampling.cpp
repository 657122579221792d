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

constexpr int32_t kGroup = 4 * kLanes;  // tokens whose noise is drawn together
constexpr int32_t kMaxChunks = 64;      // of a row shared among threads
constexpr int64_t kBlocksPerThread = 65536 / kBlock;
constexpr int64_t kRoughly = 1 << 16;   // ranks: 2^-7 of a value
constexpr float kLargestNoise = 22.9f;  // gumbel(0) = 22.87

// The first place of `wanted`, which is there.
int32_t find(const float* values, float wanted) {
  int32_t i = 0;
  while (!any(load(values + i) == wanted)) i += kLanes;
  while (values[i] != wanted) ++i;
  return i;
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
    if (!law.is_greedy()) scores += noise(load(tokens_.get() + i));
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
  float* maxima = block_max_.reserve(num_blocks_ + kLanes);
  const auto sweep = [&](int64_t begin, int64_t end) {
    block_maxima(row, static_cast<int32_t>(begin), static_cast<int32_t>(end), maxima);
  };
  if (is_shared) {
    parallel_for(num_blocks_, kBlocksPerThread, sweep);
  } else {
    sweep(0, num_blocks_);
  }
  store(maxima + num_blocks_, splat(NAN));
  largest_logit_ = largest_of(maxima, num_blocks_);
  is_infinite_ = false;
  largest_ = score(largest_logit_);
  is_infinite_ = largest_ == kInfinity && !law.is_greedy();
  if (is_infinite_) largest_ = 0.0f;
  return largest_logit_ > -kInfinity;
}

// Division rounds monotonically, so larger logits never have smaller scores.
float RowSampler::score(float logit) const {
  if (law_.is_greedy()) return logit;
  const float quotient = logit / law_.temperature;
  if (is_infinite_) return quotient == kInfinity ? 0.0f : -kInfinity;
  return quotient;
}

// A logit below all whose score reaches `least`: its rounding is far below 1e-5.
float RowSampler::logit_below(float least) const {
  if (law_.is_greedy()) return least;
  const float product = least * law_.temperature;
  const float below = product - (std::fabs(product) * 1e-5f + FLT_MIN);
  return is_infinite_ || !(below == below) ? -kInfinity : below;
}

Float RowSampler::score(Float logits) const {
  if (law_.is_greedy()) return logits;
  const Float quotients = law_.temperature == 1.0f ? logits : logits / splat(law_.temperature);
  if (is_infinite_) return quotients == kInfinity ? Float{} : splat(-kInfinity);
  return quotients;
}

// Scores of a block: biased logits over temperature, NaN as -inf, padded with -inf.
void RowSampler::score_block(int32_t block, float* scores) const {
  read_block(row_, block, scores);
  for (int32_t i = 0; i < kBlock; i += kLanes) {
    const Float lanes = score(load(scores + i));
    store(scores + i, lanes == lanes ? lanes : splat(-kInfinity));
  }
}

// The lowest token with the largest score.
int32_t RowSampler::first_token() const {
  const int32_t block = find(block_max_.get(), largest_logit_);
  alignas(64) float scores[kBlock];
  score_block(block, scores);
  return block * kBlock + find(scores, largest_);
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
    // top_k blocks hold a logit that reaches the edge of their maxima, so as many tokens do
    const Count blocks{block_max_.get(), num_blocks_};
    const float edge = edge_of(blocks, -kInfinity, largest_logit_, law_.top_k, kRoughly);
    gather(std::fmaxf(score(edge), -FLT_MAX));
  } else {
    gather_heaviest(law_.top_k, [this] { return count(); });
  }
  drop_below(edge_of(count(), least_, largest_, law_.top_k));
}

void RowSampler::filter_top_p(bool is_gathered) {
  // the tokens at most as likely hold more than 1 - top_p <=> those more likely hold less than
  // top_p
  const auto share_of = [this](double total) { return std::fmax(law_.top_p * total, DBL_MIN); };
  const double target = is_gathered ? 0.0 : share_of(total_mass());
  if (!is_gathered) gather_heaviest(target, [this] { return mass(); });
  const Mass gathered = mass();
  drop_below(
      edge_of(gathered, least_, largest_, is_gathered ? share_of(gathered.total()) : target));
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
  alignas(64) float scores[kBlock];
  alignas(64) double weights[kBlock];
  double total = 0.0;
  for (int32_t block = 0; block < num_blocks_; ++block) {
    if (score(block_max_.get()[block]) < largest_ - 60.0f) continue;
    score_block(block, scores);
    total += weigh(scores, kBlock, largest_, weights).total();
  }
  return total;
}

Count RowSampler::count() const { return {candidates_.get(), num_candidates_}; }

Mass RowSampler::mass() {
  double* weights = weights_.reserve(num_candidates_ + kLanes);
  return weigh(candidates_.get(), num_candidates_, largest_, weights);
}

// Makes the tokens with a score >= `least` the candidates. Blocks and tokens are first chosen by
// their logits, without a branch for each, and only what is left is divided.
void RowSampler::gather(float least) {
  const float below = logit_below(least);
  const float* maxima = block_max_.get();
  int32_t* blocks = blocks_.reserve(num_blocks_ + kLanes);
  int32_t num_kept_blocks = 0;
  for (int32_t block = 0; block < num_blocks_; block += kLanes) {
    const Int is_kept = load(maxima + block) >= below;
    num_kept_blocks += compress(is_kept, block + count_up(), blocks + num_kept_blocks);
  }
  candidates_.reserve(static_cast<int64_t>(num_kept_blocks) * kBlock + kLanes);
  tokens_.reserve(static_cast<int64_t>(num_kept_blocks) * kBlock + kLanes);
  num_candidates_ = 0;
  for (int32_t i = 0; i < num_kept_blocks; ++i) gather_block(blocks[i], below);
  float* kept = candidates_.get();
  store(kept + num_candidates_, splat(NAN));
  for (int32_t i = 0; i < num_candidates_; i += kLanes) store(kept + i, score(load(kept + i)));
  drop_below(least);
}

// Appends the tokens with a logit >= `below`.
void RowSampler::gather_block(int32_t block, float below) {
  const auto append = [&](const auto* logits) {
    float* kept = candidates_.get() + num_candidates_;
    int32_t* tokens = tokens_.get() + num_candidates_;
    int32_t num = 0;
    for (int32_t i = 0; i < kBlock; i += kLanes) {
      const Float lanes = load(logits + i);
      const Int is_kept = lanes >= below;
      if (!any(is_kept)) continue;
      compress(is_kept, lanes, kept + num);
      num += compress(is_kept, block * kBlock + i + count_up(), tokens + num);
    }
    num_candidates_ += num;
  };
  if (is_plain(row_) && block_size(row_, block) == kBlock) {
    with_dtype(row_.dtype, [&](auto tag) {
      append(static_cast<const decltype(tag)*>(row_.logits) + static_cast<int64_t>(block) * kBlock);
    });
  } else {
    alignas(64) float logits[kBlock];
    read_block(row_, block, logits);
    append(logits);
  }
}

// Gathers the largest scores, enough of them to weigh `target`, or all that are finite.
template <class Weigh>
void RowSampler::gather_heaviest(double target, Weigh weigh_candidates) {
  for (float depth = 1.0f;; depth *= 2.0f) {
    gather(std::fmaxf(largest_ - depth, -FLT_MAX));
    if (least_ == -FLT_MAX || weigh_candidates().total() >= target) return;
  }
}

void RowSampler::drop_below(float edge) {
  float* kept = candidates_.get();
  int32_t* tokens = tokens_.get();
  int32_t num = 0;
  for (int32_t i = 0; i < num_candidates_; i += kLanes) {
    const Float lanes = load(kept + i);
    const Int is_kept = lanes >= edge, ids = load(tokens + i);
    compress(is_kept, lanes, kept + num);
    num += compress(is_kept, ids, tokens + num);
  }
  num_candidates_ = num;
  least_ = edge;
  store(kept + num, splat(-kInfinity));
}

Float RowSampler::noise(Int tokens) const {
  const Uint block = reinterpret_cast<Uint>(tokens >> 2) + stream_block(row_, law_);
  const Int word = tokens & 3;
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
    const Float noisy = load(candidates_.get() + i) + noise(load(tokens_.get() + i));
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
    if (!(score(block_max_.get()[block]) + kLargestNoise > best.score)) continue;
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
