// Attention of tree nodes over the committed prefix and their ancestors.
//
// One work item is a request, a key/value head, a tile of query rows (nodes x the query heads that
// share the head, so K/V are read once for all of them) and a range of slots. It walks its range in
// tiles of kTileKeys keys with an online softmax in float. Where items would be too few for the
// threads, ranges are split, and the split that finishes last merges them by log-sum-exp. Bytes
// moved: K and V of the visible slots, once per row tile. Many rows multiply a packed copy of the
// tile, few read it where it lies; either way the next tile is asked for meanwhile. Delicate: keys
// that nobody in the row tile sees are read as zeros, because the cache may hold NaN there and
// 0 * NaN would reach the output; a range in which a row sees nothing keeps maximum -inf and weight
// 0.
#include "../core/tree_attention.hpp"

#include <atomic>
#include <cmath>

#include "attention_plan.hpp"
#include "head_cache.hpp"
#include "parallel.hpp"
#include "scratch.hpp"
#include "tile.hpp"
#include "vector_math.hpp"

namespace specdec::SPECDEC_ISA {
namespace {

constexpr float kLog2E = 1.44269504f;
// Query rows for which a tile is not worth packing. Pairs of values lie in two rows, which have to
// be put together for every block of rows.
template <class Quanta>
constexpr int32_t kFewRows = Quanta::kElements == 1 ? 16 : 5;

// Buffers of one thread.
struct TileScratch {
  Scratch<float> q;       // [rows, quanta of D]
  Scratch<float> keys;    // [quanta of D, kTileKeys]
  Scratch<float> values;  // [quanta of kTileKeys, columns]
  Scratch<float> states;  // [rows, columns + 2]
  Scratch<float> lanes;   // [rows, kLanes], weights of the states before they are summed
  Scratch<float> rows;    // of keys and values, where they are not contiguous
};

// Runs the items of one call; Quanta fixes the element type and the arithmetic.
template <class Quanta>
class TreeAttention {
 public:
  using T = typename Quanta::T;

  TreeAttention(const TreeAttentionParams& params, Plan& plan)
      : params_(params),
        plan_(plan),
        group_(query_group(params)),
        depth_(round_up(params.q.head_dim, Quanta::kElements) / Quanta::kElements),
        columns_(round_up(params.v_cache.head_dim, Quanta::kWidth)) {}

  void run() {
    make_plan(params_, columns_, plan_);
    std::atomic<int32_t> next{0};
    parallel_for(num_threads(), 1, [&](int64_t, int64_t) {
      thread_local TileScratch scratch;
      for (int32_t i = next++; i < plan_.num_items; i = next++)
        attend(plan_.items.get()[i], scratch);
    });
  }

 private:
  // Keys and values of a tile.
  struct Tile {
    TileRows<T> k, v;
    const float* keys;  // packed; null where that does not pay
    const float* values;
    TilePrefetch<T> next;
  };

  void attend(const Item& item, TileScratch& scratch);
  void pack_queries(const Item& item, T* buffer, float* target) const;
  void attend_rows(const float* q, Tile& tile, const uint64_t* seen, int32_t first_row,
                   int32_t rows, const RowStates& states, float* weights) const;
  float mask_logits(float* row, int32_t keys, uint64_t seen, float largest_before) const;
  void merge_splits(const Item& item, const RowStates& states) const;
  void write(const Item& item, const RowStates& states) const;

  const TreeAttentionParams& params_;
  Plan& plan_;
  int32_t group_;    // query heads per key/value head
  int32_t depth_;    // quanta of D
  int32_t columns_;  // E, padded
};

template <class Quanta>
void TreeAttention<Quanta>::attend(const Item& item, TileScratch& scratch) {
  const RequestTree tree = request_tree(params_, item.b);
  const int32_t rows = item.num_nodes * group_;
  float* q = scratch.q.reserve(int64_t{rows} * depth_);
  float* keys = scratch.keys.reserve(int64_t{depth_} * kTileKeys);
  float* values = scratch.values.reserve(int64_t{kTileKeys} * columns_);
  float* memory = scratch.states.reserve(int64_t{rows} * (columns_ + 2));
  RowStates states{memory, memory + int64_t{rows} * columns_,
                   memory + int64_t{rows} * (columns_ + 1)};
  if (item.num_splits > 1)
    states = plan_.partials.from(item.first_partial + int64_t{item.split} * rows, columns_);
  float* weights = scratch.lanes.reserve(int64_t{rows} * kLanes);
  std::memset(states.total, 0, sizeof(float) * static_cast<size_t>(rows) * columns_);
  std::memset(weights, 0, sizeof(float) * static_cast<size_t>(rows) * kLanes);
  for (int32_t r = 0; r < rows; ++r) states.largest[r] = -kInfinity;

  const HeadCache<T> k{params_.k_cache, params_.slots, item.b, item.g};
  const HeadCache<T> v{params_.v_cache, params_.slots, item.b, item.g};
  T* k_buffer = reinterpret_cast<T*>(scratch.rows.reserve(k.buffer_size() + v.buffer_size()));
  T* v_buffer = k_buffer + k.buffer_size();
  const bool fills_registers =
      params_.q.head_dim % Quanta::kWidth == 0 && params_.v_cache.head_dim % Quanta::kWidth == 0;
  const bool is_packed = rows > kFewRows<Quanta> || !fills_registers;
  const int32_t row_blocks = (rows + kMaxRows - 1) / kMaxRows;
  Tile tile{
      {}, {}, is_packed ? keys : nullptr, is_packed ? values : nullptr, {k, v, k_buffer, v_buffer}};
  tile.next.aim(item.first_slot, item.end_slot);
  tile.next(kTileKeys);
  pack_queries(item, k_buffer, q);
  for (int32_t slot = item.first_slot; slot < item.end_slot; slot += kTileKeys) {
    const bool sees_all = tree.sees_all(slot);
    uint64_t seen[kMaxTileRows];
    uint64_t used = sees_all ? ~uint64_t{0} : 0;
    for (int32_t i = 0; i < item.num_nodes && !sees_all; ++i) {
      seen[i] = tree.seen(item.first_node + i, slot);
      used |= seen[i];
    }
    if (used == 0) continue;
    k.rows(slot, used, k_buffer, tile.k);
    v.rows(slot, used, v_buffer, tile.v);
    tile.next.aim(slot + kTileKeys, item.end_slot);
    if (is_packed) {
      pack_keys<Quanta>(tile.k, params_.q.head_dim, keys);
      pack_values<Quanta>(tile.v, params_.v_cache.head_dim, columns_, values);
    }
    for (int32_t r = 0; r < rows; r += kMaxRows) {
      const int32_t num = rows - r < kMaxRows ? rows - r : kMaxRows;
      if (is_packed) tile.next((kTileKeys + row_blocks - 1) / row_blocks);
      attend_rows(q, tile, sees_all ? nullptr : seen, r, num, states, weights);
    }
  }
  for (int32_t r = 0; r < rows; ++r) states.weight[r] = sum(load(weights + r * kLanes));
  if (item.num_splits > 1) {
    if (item.left->fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    states = plan_.partials.from(item.first_partial, columns_);
    merge_splits(item, states);
  }
  write(item, states);
}

template <class Quanta>
void TreeAttention<Quanta>::pack_queries(const Item& item, T* buffer, float* target) const {
  const CacheView& q = params_.q;
  for (int32_t row = 0; row < item.num_nodes * group_; ++row, target += depth_) {
    const int64_t node = item.first_node + row / group_,
                  head = int64_t{item.g} * group_ + row % group_;
    const T* source =
        static_cast<const T*>(q.data) + item.b * q.stride_c + head * q.stride_g + node * q.stride_s;
    if (q.stride_d != 1) {
      for (int32_t d = 0; d < q.head_dim; ++d) buffer[d] = source[d * q.stride_d];
      source = buffer;
    }
    Quanta::pack(source, q.head_dim, target);
  }
}

// Adds one tile of keys, up to the last that anybody sees, to the states of up to kMaxRows rows.
// `seen`: bits of each node, or null if all see all. `weights`: those of the states, by lanes.
template <class Quanta>
void TreeAttention<Quanta>::attend_rows(const float* q, Tile& tile, const uint64_t* seen,
                                        int32_t first_row, int32_t rows, const RowStates& states,
                                        float* weights) const {
  alignas(64) float logits[kMaxRows * kTileKeys];
  alignas(64) float probs[kMaxRows * kTileKeys];
  constexpr int32_t kProbs = kTileKeys / Quanta::kElements;  // quanta
  constexpr int32_t kPaddedRows = round_up(kMaxRows, kLanes);
  alignas(64) float before[kPaddedRows] = {}, bases[kPaddedRows] = {}, scales[kPaddedRows];
  uint64_t used = seen == nullptr ? ~uint64_t{0} : 0;
  for (int32_t i = first_row / group_; seen != nullptr && i <= (first_row + rows - 1) / group_; ++i)
    used |= seen[i];
  if (used == 0) return;
  const int32_t keys = round_up(kTileKeys - __builtin_clzll(used), kLanes);
  q += int64_t{first_row} * depth_;
  if (tile.keys == nullptr) {
    constexpr auto kProducts = std::make_integer_sequence<int, kMaxRows>();
    choose_keys<Quanta, TilePrefetch<T>>(rows, kProducts)(q, depth_, tile.k, keys, depth_, logits,
                                                          tile.next);
  } else {
    multiply<Quanta>(q, depth_, PackedColumns{tile.keys, kTileKeys}, depth_, nullptr, logits, rows,
                     keys);
  }
  for (int32_t r = 0; r < rows; ++r) {
    float& largest = states.largest[first_row + r];
    const uint64_t bits = seen == nullptr ? ~uint64_t{0} : seen[(first_row + r) / group_];
    before[r] = largest;
    largest = mask_logits(logits + r * keys, keys, bits, largest);
    bases[r] = largest == -kInfinity ? 0.0f : largest;
  }
  for (int32_t r = 0; r < kPaddedRows; r += kLanes)
    store(scales + r, exp2_negative(load(before + r) - load(bases + r)));
  for (int32_t r = 0; r < rows; ++r) {
    float* row = logits + r * keys;
    float* lane_weights = weights + (first_row + r) * kLanes;
    Float weight = load(lane_weights) * scales[r];
    for (int32_t j = 0; j < keys; j += kLanes) {
      const Float lanes = exp2_negative(load(row + j) - bases[r]);
      weight += lanes;
      store(row + j, lanes);
    }
    store(lane_weights, weight);
    Quanta::pack_probs(row, keys, probs + r * kProbs);
  }
  const int32_t depth = keys / Quanta::kElements;
  float* total = states.total + int64_t{first_row} * columns_;
  if (tile.values == nullptr) {
    multiply<Quanta>(probs, kProbs, ValueColumns<Quanta>{tile.v}, depth, scales, total, rows,
                     columns_);
  } else {
    multiply<Quanta>(probs, kProbs, PackedColumns{tile.values, columns_}, depth, scales, total,
                     rows, columns_);
  }
}

// Turns q.k of a tile into masked logits. Returns the largest of them and `largest`.
template <class Quanta>
float TreeAttention<Quanta>::mask_logits(float* row, int32_t keys, uint64_t seen,
                                         float largest_before) const {
  const bool has_softcap = params_.softcap > 0.0f;
  const float inner = has_softcap ? params_.scale / params_.softcap : params_.scale * kLog2E;
  const float outer = params_.softcap * kLog2E;
  Uint lane_bit{};
  for (int32_t i = 0; i < kLanes; ++i) lane_bit[i] = 1u << i;
  Float best = splat(largest_before);
  for (int32_t j = 0; j < keys; j += kLanes) {
    Float lanes = load(row + j) * inner;
    if (has_softcap) lanes = tanh(lanes) * outer;
    if (seen != ~uint64_t{0}) {
      lanes = (lane_bit & static_cast<uint32_t>(seen >> j)) != 0 ? lanes : splat(-kInfinity);
    }
    store(row + j, lanes);
    best = larger(best, lanes);
  }
  return largest(best);
}

// Adds the other splits of a row tile to `states`, those of split 0, in order.
template <class Quanta>
void TreeAttention<Quanta>::merge_splits(const Item& item, const RowStates& states) const {
  const int32_t rows = item.num_nodes * group_;
  for (int32_t split = 1; split < item.num_splits; ++split) {
    const RowStates other =
        plan_.partials.from(item.first_partial + int64_t{split} * rows, columns_);
    for (int32_t r = 0; r < rows; ++r) {
      if (other.largest[r] == -kInfinity) continue;
      const float largest = std::fmaxf(states.largest[r], other.largest[r]);
      const float keep = std::exp2(states.largest[r] - largest),
                  add = std::exp2(other.largest[r] - largest);
      float* total = states.total + int64_t{r} * columns_;
      const float* added = other.total + int64_t{r} * columns_;
      for (int32_t e = 0; e < columns_; ++e) total[e] = total[e] * keep + added[e] * add;
      states.weight[r] = states.weight[r] * keep + other.weight[r] * add;
      states.largest[r] = largest;
    }
  }
}

template <class Quanta>
void TreeAttention<Quanta>::write(const Item& item, const RowStates& states) const {
  for (int32_t r = 0; r < item.num_nodes * group_; ++r) {
    const int64_t node = item.first_node + r / group_, head = int64_t{item.g} * group_ + r % group_;
    float largest = states.largest[r], weight = states.weight[r], factor = 1.0f;
    if (params_.sinks != nullptr && params_.sinks[head] > -kInfinity) {
      const float sink = params_.sinks[head] * kLog2E, top = std::fmaxf(largest, sink);
      factor = std::exp2(largest - top);
      weight = weight * factor + std::exp2(sink - top);
      largest = top;
    }
    factor = weight == 0.0f ? 0.0f : factor / weight;
    float* total = states.total + int64_t{r} * columns_;
    Quanta::put_in_order(total, columns_);
    T* out = static_cast<T*>(params_.out) +
             ((int64_t{item.b} * params_.nodes + node) * params_.q.heads + head) *
                 params_.v_cache.head_dim;
    for (int32_t e = 0; e < params_.v_cache.head_dim; ++e)
      out[e] = from_float<T>(total[e] * factor);
    if (params_.lse != nullptr) {
      constexpr double kLn2 = 0.6931471805599453;
      const double lse =
          weight == 0.0f ? -kInfinity : kLn2 * (largest + std::log2(static_cast<double>(weight)));
      params_.lse[(int64_t{item.b} * params_.q.heads + head) * params_.nodes + node] =
          static_cast<float>(lse);
    }
  }
}

// Padding nodes: out 0, lse -inf.
void write_padding(const TreeAttentionParams& params) {
  const int64_t node_bytes =
      int64_t{params.q.heads} * params.v_cache.head_dim * element_bytes(params.dtype);
  for (int64_t b = 0; b < params.batch; ++b) {
    const int32_t size = request_tree(params, b).size;
    std::memset(static_cast<char*>(params.out) + (b * params.nodes + size) * node_bytes, 0,
                static_cast<size_t>((params.nodes - size) * node_bytes));
    for (int64_t h = 0; h < params.q.heads && params.lse != nullptr; ++h) {
      float* lse = params.lse + (b * params.q.heads + h) * params.nodes;
      for (int32_t i = size; i < params.nodes; ++i) lse[i] = -kInfinity;
    }
  }
}

}  // namespace

void tree_attention(const TreeAttentionParams& params) {
  thread_local Plan plan;
  write_padding(params);
  if (params.batch == 0 || params.nodes == 0 || params.q.heads == 0) return;
  switch (params.dtype) {
    case DType::kFloat32:
      return TreeAttention<FloatQuanta<float>>(params, plan).run();
    case DType::kFloat16:
      return TreeAttention<FloatQuanta<Half>>(params, plan).run();
    case DType::kBfloat16:
#if defined(__AVX512BF16__)
      return TreeAttention<Bfloat16Pairs>(params, plan).run();
#else
      return TreeAttention<FloatQuanta<Bfloat16>>(params, plan).run();
#endif
  }
}

}  // namespace specdec::SPECDEC_ISA
