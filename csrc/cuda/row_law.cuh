// The target's law on one row, by the threads of a group: what specdec_kernels/sampling.py defines.
//
// A row is summarised first, tile by tile; later steps read again only the tiles that can hold what
// they look for. The three filters keep exactly the tokens whose score reaches one edge, found by
// search on the order of floats: nothing is sorted, nothing of a row's width is written.
//
// Delicate: scores and noise have the reference's bits, so these sources are compiled without
// contraction into FMA. Masses are sums in double in another order than the reference's: a token
// may fall on the other side of top-p only where the cumulative mass is within about 1e-13 of the
// edge.
#pragma once

#include "group.cuh"

namespace specdec::cuda {

// Of the tiles of one row. A tile's best is its key with the largest noisy score, or of a greedy
// request logit; its mass the sum of exp(score - its largest score).
struct Summaries {
  float* maxima;   // [tiles], biased logits
  RankKey* best;   // [tiles]; no key where it was not asked for
  double* masses;  // [tiles]; 0 where they were not asked for

  __device__ Summaries row(int64_t index, int64_t row_tiles) const {
    return {maxima + index * row_tiles, best + index * row_tiles, masses + index * row_tiles};
  }
};

// `noise` is null where none is added.
template <class T>
__device__ void summarize_tile(const LogitRow<T>& row, const Noise* noise, bool wants_mass,
                               int32_t tile, const Summaries& summaries) {
  constexpr int kLoads = LogitRow<T>::kLoads, kVector = LogitRow<T>::kVector;
  float values[kLoads][kVector];
  float most = -INFINITY;
#pragma unroll
  for (int j = 0; j < kLoads; ++j) row.load(row.first_token(tile, j), values[j]);
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) most = fmaxf(most, values[j][i]);
  }
  const uint32_t ordered = warp_largest(static_cast<uint32_t>(to_order(most)) ^ 0x80000000u);
  most = from_order(static_cast<int32_t>(ordered ^ 0x80000000u));
  const bool is_infinite = row.is_sampled && most / row.temperature == INFINITY;
  RankKey best = kNoKey;
  double mass = 0.0;
  if (noise != nullptr || wants_mass || !row.is_sampled) {
    const float largest = row.score(most, is_infinite);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int32_t first = row.first_token(tile, j);
      if (row.is_sampled) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[j][i] = row.score(values[j][i], is_infinite);
      }
      if (wants_mass) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          if (values[j][i] == -INFINITY) continue;
          mass += exp_of(static_cast<double>(values[j][i]) - static_cast<double>(largest));
        }
      }
      if (noise != nullptr) noise->add(first, values[j]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (values[j][i] == -INFINITY) continue;
        best = max(best, rank_key(values[j][i] + 0.0f, first + i));
      }
    }
    best = warp_largest(best);
    if (wants_mass) mass = warp_sum(mass);
  }
  if (this_lane() != 0) return;
  store_global(summaries.maxima + tile, most);
  store_global(summaries.best + tile, noise != nullptr || !row.is_sampled ? best : kNoKey);
  store_global(summaries.masses + tile, mass);
}

// A summarised row.
template <class T>
struct Scores {
  static constexpr int kLoads = LogitRow<T>::kLoads, kVector = LogitRow<T>::kVector;

  LogitRow<T> row;
  Summaries summaries;
  float largest;     // score
  bool is_infinite;  // the row has +inf scores, and is uniform over them

  // No token has a score that counts.
  __device__ bool is_empty() const { return !(largest > -INFINITY); }

  __device__ float score(float logit) const { return row.score(logit, is_infinite); }
  // One word for a whole warp, which decides whether the tile is read: no bulk traffic.
  __device__ float tile_largest(int32_t tile) const { return score(summaries.maxima[tile]); }

  // The scores of a load; -inf where they do not reach the edge.
  __device__ void load(int32_t first, float edge, float (&values)[kVector]) const {
    row.load(first, values);
    reach(edge, values);
  }

  // Those of a tile: all loads are under way before the first is used.
  __device__ void load_tile(int32_t tile, float edge, float (&values)[kLoads][kVector]) const {
#pragma unroll
    for (int j = 0; j < kLoads; ++j) row.load(row.first_token(tile, j), values[j]);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) reach(edge, values[j]);
  }

  // exp(score - largest), 0 for -inf.
  __device__ double weight(float value) const {
    if (value == -INFINITY) return 0.0;
    return exp_of(static_cast<double>(value) - static_cast<double>(largest));
  }

  // Logits to scores; -inf where they do not reach the edge.
  __device__ void reach(float edge, float (&values)[kVector]) const {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      values[i] = score(values[i]);
      if (!(values[i] >= edge)) values[i] = -INFINITY;
    }
  }

  // A tile's best, or no key if it is void: tiles without +inf, in a row with some.
  __device__ RankKey tile_best(int32_t tile) const {
    const bool is_void = is_infinite && tile_largest(tile) == -INFINITY;
    return is_void ? kNoKey : load_global(summaries.best + tile);
  }
};

template <class T>
__device__ Scores<T> open_row(Group& group, const LogitRow<T>& row, const Summaries& summaries) {
  RankKey key = kNoKey;
  for (int32_t tile = group.thread(); tile < row.tiles(); tile += kGroupThreads) {
    key = max(key, rank_key(load_global(summaries.maxima + tile) + 0.0f, 0));
  }
  key = group.block_largest(key);
  const float most = key == kNoKey ? -INFINITY : score_of(key);
  const bool is_infinite = row.is_sampled && most / row.temperature == INFINITY;
  return {row, summaries, row.score(most, is_infinite), is_infinite};
}

// Summarises a row, of whose tiles all threads may read then.
template <class T>
__device__ void summarize_row(Group& group, const LogitRow<T>& row, bool wants_mass,
                              const Summaries& summaries) {
  group.sync();  // all have read what is overwritten
  for (int32_t tile = group.first_tile(); tile < row.tiles(); tile += group.tile_step()) {
    summarize_tile<T>(row, nullptr, wants_mass, tile, summaries);
  }
  group.sync();
}

// The lowest token of the best key.
template <class T>
__device__ RankKey best_key(Group& group, const Scores<T>& scores) {
  RankKey key = kNoKey;
  for (int32_t tile = group.thread(); tile < scores.row.tiles(); tile += kGroupThreads) {
    key = max(key, scores.tile_best(tile));
  }
  return group.block_largest(key);
}

// The sum of exp(score - largest) over all finite scores, from the summaries, which hold masses.
template <class T>
__device__ double summed_weight(Group& group, const Scores<T>& scores) {
  double total = 0.0;
  for (int32_t tile = group.thread(); tile < scores.row.tiles(); tile += kGroupThreads) {
    const float largest = scores.tile_largest(tile);
    if (largest >= kLowest)
      total += load_global(scores.summaries.masses + tile) * scores.weight(largest);
  }
  return group.block_sum(total);
}

// The sum of what warps wrote, one number for each tile.
__device__ inline double sum_tiles(Group& group, const double* tile_masses, int32_t tiles) {
  group.sync();
  double total = 0.0;
  for (int32_t tile = group.thread(); tile < tiles; tile += kGroupThreads) {
    total += load_global(tile_masses + tile);
  }
  return group.block_sum(total);
}

// The law of a row: weights of the scores that reach an edge, times the inverse of their sum. What
// draws and sums below take has these two members.
template <class T>
struct RowLaw {
  Scores<T> scores;
  float edge;
  double inverse;

  __device__ void load(int32_t first, double (&masses)[LogitRow<T>::kVector]) const {
    float values[LogitRow<T>::kVector];
    scores.load(first, edge, values);
#pragma unroll
    for (int i = 0; i < LogitRow<T>::kVector; ++i) masses[i] = scores.weight(values[i]) * inverse;
  }

  __device__ bool has_mass(int32_t tile) const { return scores.tile_largest(tile) >= edge; }
};

// This lane's part of a tile's mass.
template <class T, class Law>
__device__ double lane_mass(const LogitRow<T>& row, const Law& law, int32_t tile) {
  double mass = 0.0;
  if (!law.has_mass(tile)) return mass;
#pragma unroll 1
  for (int j = 0; j < LogitRow<T>::kLoads; ++j) {
    double masses[LogitRow<T>::kVector];
    law.load(row.first_token(tile, j), masses);
#pragma unroll
    for (const double each : masses) mass += each;
  }
  return mass;
}

// Writes the mass of each tile, and returns their sum. Tile by tile, so that the sum does not
// depend on how many blocks share a row. `tile_masses`: [tiles], scratch.
template <class T, class Law>
__device__ double measure(Group& group, const LogitRow<T>& row, const Law& law,
                          double* tile_masses) {
  group.sync();  // all have read what is overwritten
  for (int32_t tile = group.first_tile(); tile < row.tiles(); tile += group.tile_step()) {
    const double mass = warp_sum(lane_mass(row, law, tile));
    if (this_lane() == 0) store_global(tile_masses + tile, mass);
  }
  return sum_tiles(group, tile_masses, row.tiles());
}

// The lowest x >= edge, in order, such that the scores above x weigh less than the target: tokens,
// or exp(score - largest) if `is_mass`. Each pass weighs the scores between kSums places, and draws
// the two ends of what is left in to scores that are there; 4 to 6 passes of 100,000 tokens, at
// most 12.
template <class T>
__device__ int32_t search(Group& group, const Scores<T>& scores, double target, bool is_mass,
                          int32_t edge) {
  int64_t low = int64_t{edge} - 1, high = to_order(scores.largest);
  double beyond = 0.0;  // the weight of scores above `high`
  for (bool is_first = true; high - low > 1; is_first = false) {
    int32_t places[kSums];
    const int64_t step = (high - low + kSums) / (kSums + 1);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      int64_t place = low + (i + 1) * step;
      if (is_first) place = to_order(scores.largest - static_cast<float>(128 >> i) * 0.25f);
      places[i] = static_cast<int32_t>(min(max(place, low + 1), high));
    }
    double above[kSums] = {};
    uint32_t most = 0, least = 0;  // distances: of the largest from `low`, of the least from `high`
    for (int32_t tile = group.first_tile(); tile < scores.row.tiles(); tile += group.tile_step()) {
      if (!(to_order(scores.tile_largest(tile)) > low)) continue;
      float values[Scores<T>::kLoads][Scores<T>::kVector];
      scores.load_tile(tile, kLowest, values);
#pragma unroll
      for (const auto& load : values) {
#pragma unroll
        for (const float value : load) {
          const int32_t order = to_order(value);
          if (!(order > low && order <= high)) continue;
          most = max(most, static_cast<uint32_t>(order - low));
          least = max(least, static_cast<uint32_t>(high - order) + 1);
          const double weight = is_mass ? scores.weight(value) : 1.0;
#pragma unroll
          for (int i = 0; i < kSums; ++i) above[i] += order > places[i] ? weight : 0.0;
        }
      }
    }
    // one key holds one number: they are exchanged one after the other
    const RankKey largest = group.sums_and_largest(above, most);
    const RankKey smallest = group.largest(RankKey{least});
    if (largest == 0) return static_cast<int32_t>(low + 1);  // nothing is between the ends
    const int64_t last = low + static_cast<int64_t>(largest);
    const int64_t first = high - static_cast<int64_t>(smallest) + 1;
    const double weight = beyond;
#pragma unroll
    for (int i = kSums - 1; i >= 0; --i) {
      if (weight + above[i] < target) {
        high = places[i];
        beyond = weight + above[i];
      } else {
        low = max(low, int64_t{places[i]});
      }
    }
    // Nothing lies between `last` and the old upper end, or below `first`.
    if (last < high) high = last;
    low = max(low, first - 1);
  }
  return static_cast<int32_t>(high);
}

// The score that a token must reach to pass top-k, top-p and min-p. Top-k and top-p keep x unless
// the tokens above x already weigh as much as their target: k tokens, or top_p of the mass that
// top-k left. The summaries hold masses if top_p is below 1 or the sum is wanted.
//
// `total` is the sum of exp(score - largest) over what is kept, if `wants_total`, else 0.
template <class T>
__device__ float find_edge(Group& group, const Scores<T>& scores, const RowFilters& filters,
                           bool wants_total, double* tile_masses, double& total) {
  const int32_t lowest = to_order(kLowest);
  int32_t edge = lowest;
  total = 0.0;
#pragma unroll 1
  for (int step = 0; step < 3; ++step) {  // top-k, top-p, total: one copy of search and sum
    if (step == 2 && filters.min_p > 0.0f && filters.is_sampled()) {
      const double least =
          static_cast<double>(scores.largest) + log(static_cast<double>(filters.min_p));
      const float rounded = static_cast<float>(least);
      const int32_t reached = to_order(rounded) + (static_cast<double>(rounded) < least ? 1 : 0);
      edge = max(edge, reached);
    }
    const bool is_needed = step == 2   ? wants_total
                           : step == 1 ? filters.top_p < 1.0f
                                       : filters.top_k > 0;
    if (!is_needed || !filters.is_sampled()) continue;
    double target = static_cast<double>(filters.top_k);
    if (step > 0) {
      total = edge == lowest ? summed_weight(group, scores)
                             : measure(group, scores.row, RowLaw<T>{scores, from_order(edge), 1.0},
                                       tile_masses);
      target = fmax(static_cast<double>(filters.top_p) * total, 1e-300);
    }
    if (step < 2) edge = search(group, scores, target, step == 1, edge);
  }
  if (!wants_total) total = 0.0;
  return from_order(edge);
}

}  // namespace specdec::cuda
