// Tiles of attention: which keys, where they lie, who sees them, and how rows end.
//
// A row is a node and one of the `group` query heads that share a key/value head: row = node *
// group + head of the group. Logits are in base 2. Exponents are taken from a finite base, so that
// no inf - inf arises: a row that sees no key keeps maximum -inf and weight 0, and a logit of +inf
// or NaN ends as in the reference, output 0 and log-sum-exp inf or NaN.
#pragma once

#include "../core/tree_attention.hpp"
#include "portability.cuh"

namespace specdec::cuda {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr int32_t kMaxHeadDim = 256;
constexpr int32_t kMaxShared = 99 << 10;  // bytes; what the smallest device gives to a block

struct AttentionParams {
  TreeAttentionParams call;
  float* sums;     // [B, G, splits, N * group, E]
  float* largest;  // [B, G, splits, N * group]
  float* weights;  // [B, G, splits, N * group]
  int32_t group, row_tiles, num_splits;
  int32_t tile_keys;
  int32_t min_tiles;   // that are worth a partial result
  int32_t page_shift;  // log2 of the page size; -1: no power of two
  bool has_wide_q;     // its rows may be read 16 bytes at a time
  bool has_wide_kv;

  SPECDEC_HD int32_t rows() const { return call.nodes * group; }
  __device__ int64_t partial(int64_t b, int32_t g, int32_t split) const {
    return ((b * call.k_cache.heads + g) * num_splits + split) * rows();
  }
};

// What a block owns.
struct Work {
  int64_t b;
  int32_t g, split, row_tile;
};

__device__ inline Work work_of_block(const AttentionParams& params, uint32_t block) {
  const uint32_t tiles = static_cast<uint32_t>(params.row_tiles),
                 splits = static_cast<uint32_t>(params.num_splits),
                 heads = static_cast<uint32_t>(params.call.k_cache.heads);
  const uint32_t head = block / tiles / splits;  // of all requests
  return {head / heads, static_cast<int32_t>(head % heads),
          static_cast<int32_t>(block / tiles % splits),
          static_cast<int32_t>(block % tiles)};  // fastest: tiles of the same keys together
}

// The slots that the nodes of a request see, as tiles of keys dealt to its splits. Settled on the
// device: surplus splits have no work, and a request with one split needs no merge.
struct KeyRange {
  int32_t length, count;  // committed slots, nodes
  int32_t first, end;     // slots: from the root's window, as the root looks back furthest
  int32_t full, tiles;    // tiles: in the prefix as a whole, all
  int32_t each, num_active;
};

__device__ inline KeyRange key_range(const AttentionParams& params, int64_t b, int32_t tile_keys) {
  const TreeAttentionParams& call = params.call;
  const int64_t length = call.lengths[b], window = call.window;
  const int32_t count = min(max(call.num_nodes[b], 0), call.nodes);
  const int64_t first = window > 0 ? max(length - window + 1, int64_t{0}) : 0;
  const int64_t end = max(min(length + count, call.capacity), first);
  const int64_t prefix = max(min(length, call.capacity) - first, int64_t{0});
  KeyRange range{static_cast<int32_t>(length),
                 count,
                 static_cast<int32_t>(first),
                 static_cast<int32_t>(end),
                 static_cast<int32_t>(prefix),
                 0,
                 0,
                 0};
  range.full = range.full / tile_keys;
  range.tiles = count > 0 ? (range.end - range.first + tile_keys - 1) / tile_keys : 0;
  range.full = min(range.full, range.tiles);
  range.each = max((range.tiles + params.num_splits - 1) / params.num_splits, params.min_tiles);
  range.num_active = max((range.tiles + range.each - 1) / range.each, 1);
  return range;
}

// Pages that are not count as the first or last one.
struct SlotPlace {
  int64_t page;
  int32_t offset;
};

__device__ inline SlotPlace page_of(const AttentionParams& params, int64_t b, int32_t slot) {
  const SlotMap& slots = params.call.slots;
  const int32_t index = params.page_shift >= 0 ? slot >> params.page_shift : slot / slots.page_size;
  const int32_t page = slots.page_table[b * slots.stride_b + index * slots.stride_m];
  return {min(max(page, 0), slots.pages - 1), slot - index * slots.page_size};
}

__device__ inline SlotPlace place_of(const AttentionParams& params, int64_t b, int32_t slot) {
  if (params.call.slots.page_table == nullptr) return {b, slot};
  return page_of(params, b, slot);
}

// The `num` lowest bits; none if num <= 0, all if num >= 64.
__device__ inline uint64_t low_bits(int64_t num) {
  return num <= 0 ? 0 : num >= 64 ? ~uint64_t{0} : (uint64_t{1} << num) - 1;
}

// Bit j: `node` sees slot + j, which lies before range.end. Windows are in positions: siblings
// share one.
__device__ inline uint64_t seen_slots(const TreeAttentionParams& call, int64_t b,
                                      const KeyRange& range, int32_t node, int32_t depth,
                                      int32_t slot) {
  const int64_t prefix = int64_t{range.length} - slot;  // slots of it from here on
  const int64_t hidden = call.window > 0 ? prefix + depth - call.window + 1 : 0;
  const uint64_t seen = low_bits(prefix) & ~low_bits(hidden);
  if (prefix >= 64) return seen;
  const int32_t num_words = (call.nodes + 63) / 64;
  const int64_t* words = call.ancestors + (b * call.nodes + node) * num_words;
  const int32_t first = static_cast<int32_t>(max(-prefix, int64_t{0}));  // node
  const int32_t word = first / 64, shift = first % 64;
  uint64_t bits = word < num_words ? static_cast<uint64_t>(words[word]) >> shift : 0;
  if (shift > 0 && word + 1 < num_words) {
    bits |= static_cast<uint64_t>(words[word + 1]) << (64 - shift);
  }
  bits = bits << max(prefix, int64_t{0}) & low_bits(int64_t{range.end} - slot);
  if (call.window > 0 && depth >= call.window) {  // else no ancestor is that far away
    const int32_t* depths = call.depths + b * call.nodes;
    for (uint64_t left = bits; left != 0; left &= left - 1) {
      const int32_t j = __ffsll(static_cast<long long>(left)) - 1;
      if (depth - depths[j - prefix] >= call.window) bits &= ~(uint64_t{1} << j);
    }
  }
  return seen | bits;
}

// tanh, with an error of about 2^-23 of it if kIsAccurate, else of 1.
template <bool kIsAccurate>
__device__ inline float soft_tanh(float x) {
  const float result = 1.0f - __fdividef(2.0f, power_of_2(x * (2.0f * kLog2E)) + 1.0f);
  if (!kIsAccurate) return result;
  const float square = x * x;
  float series = -0.005905857f * square + 0.020805374f;
  series = series * square - 0.05378668f;
  series = series * square + 0.13331959f;
  series = series * square - 0.333333f;
  return square < 0.36f ? series * square * x + x : result;
}

// q.k to logits.
struct LogitScale {
  float inner, outer;  // outer 0: no softcap

  __device__ explicit LogitScale(const TreeAttentionParams& call)
      : inner(call.softcap > 0.0f ? call.scale / call.softcap : call.scale * kLog2E),
        outer(call.softcap * kLog2E) {}

  template <bool kIsAccurate, int kBlocks, int kNum>
  __device__ void apply(float (&dots)[kBlocks][kNum]) const {
#pragma unroll
    for (int32_t i = 0; i < kBlocks * kNum; ++i) dots[i / kNum][i % kNum] *= inner;
    if (outer <= 0.0f) return;
#pragma unroll
    for (int32_t i = 0; i < kBlocks * kNum; ++i) {
      float& dot = dots[i / kNum][i % kNum];
      dot = soft_tanh<kIsAccurate>(dot) * outer;
    }
  }
};

// What exponents are taken from.
__device__ inline float base_of(float largest) {
  return largest == INFINITY || largest == -INFINITY ? 0.0f : largest;
}

// What the sum of a row is multiplied by, and its log-sum-exp.
struct RowEnd {
  float factor, lse;
};

// A sink joins the weight and has no value. Padding nodes: output 0, lse -inf.
__device__ inline RowEnd end_of_row(const TreeAttentionParams& call, int32_t head, bool is_node,
                                    float largest, float weight) {
  if (!is_node) return {0.0f, -INFINITY};
  float factor = 1.0f;
  if (call.sinks != nullptr) {
    const float sink = call.sinks[head] * kLog2E, top = fmaxf(largest, sink), base = base_of(top);
    factor = power_of_2(largest - base);
    weight = weight * factor + power_of_2(sink - base);
    largest = top;
  }
  const bool has_law = weight > 0.0f && weight < INFINITY;
  const float lse = weight == 0.0f ? -INFINITY : (largest + log2f(weight)) * kLn2;
  return {has_law ? __fdividef(factor, weight) : 0.0f, lse};
}

// 0 times a sum that is not finite is still 0.
__device__ inline float scaled(float sum, float factor) {
  return factor == 0.0f ? 0.0f : sum * factor;
}

// First element of a row of the output, [B, N, H, E], and its log-sum-exp, [B, H, N].
__device__ inline int64_t out_offset(const TreeAttentionParams& call, int64_t b, int32_t node,
                                     int32_t head) {
  return ((b * call.nodes + node) * call.q.heads + head) * call.v_cache.head_dim;
}

__device__ inline void store_lse(const TreeAttentionParams& call, int64_t b, int32_t node,
                                 int32_t head, float lse) {
  if (call.lse != nullptr) {
    store_global(call.lse + (b * call.q.heads + head) * call.nodes + node, lse);
  }
}

}  // namespace specdec::cuda
