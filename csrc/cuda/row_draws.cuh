// Draws from a row's law, by the threads of a group: the argmax of noisy scores, and the inverse of
// the cumulative law at a coin. Neither depends on how many blocks share the row.
#pragma once

#include "row_law.cuh"

namespace specdec::cuda {

constexpr float kLargestNoise = 22.9f;  // gumbel(0) is 22.87

// A tile's best key below `after`, among the scores that reach the edge; by a warp.
template <class T>
__device__ RankKey tile_key(const Scores<T>& scores, const Noise* noise, float edge, int32_t tile,
                            RankKey after) {
  RankKey best = kNoKey;
#pragma unroll 1
  for (int j = 0; j < Scores<T>::kLoads; ++j) {
    const int32_t first = scores.row.first_token(tile, j);
    float values[Scores<T>::kVector];
    scores.load(first, edge, values);
    if (noise != nullptr) noise->add(first, values);
#pragma unroll
    for (int i = 0; i < Scores<T>::kVector; ++i) {
      if (values[i] == -INFINITY) continue;
      const RankKey key = rank_key(values[i] + 0.0f, first + i);
      if (key < after) best = max(best, key);
    }
  }
  return warp_largest(best);
}

// The argmax of score + noise among the scores that reach the edge. Tiles that cannot win are not
// read.
template <class T>
__device__ RankKey draw_noisy(Group& group, const Scores<T>& scores, const Noise& noise,
                              float edge) {
  RankKey best = kNoKey;
  for (int32_t tile = group.first_tile(); tile < scores.row.tiles(); tile += group.tile_step()) {
    const float largest = scores.tile_largest(tile);
    if (!(largest >= edge)) continue;
    if (best != kNoKey && !(largest + kLargestNoise >= score_of(best))) continue;
    best = max(best, tile_key(scores, &noise, edge, tile, ~RankKey{0}));
  }
  return group.largest(best);
}

// The sum of a warp's values up to this lane's.
__device__ inline double warp_scan(double value) {
  for (unsigned delta = 1; delta < kWarpSize; delta *= 2) {
    const double before = __shfl_up_sync(~0u, value, delta);
    if (this_lane() >= static_cast<int32_t>(delta)) value += before;
  }
  return value;
}

// Where the cumulative mass exceeds `target`: a lane with mass, or -1; adds the warp's to `below`.
// `last` is the last lane with mass, or -1; `before` what lies below this lane.
__device__ inline int32_t exceeding_lane(double mass, double target, double& below, int32_t& last,
                                         double& before) {
  const double up_to = warp_scan(mass);
  const double exclusive = __shfl_up_sync(~0u, up_to, 1);
  before = below + (this_lane() == 0 ? 0.0 : exclusive);
  const unsigned beyond = __ballot_sync(~0u, mass > 0.0 && below + up_to > target);
  last = kWarpSize - 1 - __clz(static_cast<int>(__ballot_sync(~0u, mass > 0.0)));
  below += __shfl_sync(~0u, up_to, kWarpSize - 1);
  return __ffs(static_cast<int>(beyond)) - 1;
}

// The lowest token of a tile at which the cumulative mass exceeds `target`, else the last one with
// mass; by a warp.
template <class T, class Law>
__device__ int32_t draw_in_tile(const LogitRow<T>& row, const Law& law, int32_t tile, double target,
                                double below) {
  int32_t drawn = 0;
#pragma unroll 1
  for (int j = 0; j < LogitRow<T>::kLoads; ++j) {
    const int32_t first = row.first_token(tile, j);
    double masses[LogitRow<T>::kVector];
    law.load(first, masses);
    double mass = 0.0;
#pragma unroll
    for (const double each : masses) mass += each;
    int32_t last;
    double before;
    const int32_t lane = exceeding_lane(mass, target, below, last, before);
    int32_t here = drawn;
    bool is_beyond = false;
#pragma unroll
    for (int i = 0; i < LogitRow<T>::kVector; ++i) {
      before += masses[i];
      if (masses[i] > 0.0 && !is_beyond) here = first + i;
      is_beyond |= masses[i] > 0.0 && before > target;
    }
    if (lane >= 0) return __shfl_sync(~0u, here, lane);
    if (last >= 0) drawn = __shfl_sync(~0u, here, last);
  }
  return drawn;
}

// The lowest token at which the cumulative mass exceeds `coin` times the whole. A coin so near 1
// that the product rounds up draws the last token with mass. `tile_masses`: [tiles], scratch.
template <class T, class Law>
__device__ int32_t draw_by_coin(Group& group, const LogitRow<T>& row, const Law& law, double coin,
                                double* tile_masses) {
  SPECDEC_SHARED(int32_t, drawn, [1]);
  const double whole = measure(group, row, law, tile_masses);
  if (group.thread() < kWarpSize) {
    const int32_t lane = this_lane();
    double target = coin * whole, below = 0.0;
    int32_t tile = -1, last_tile = 0;
    for (int32_t first = 0; first < row.tiles() && tile < 0; first += kWarpSize) {
      const double mass = first + lane < row.tiles() ? tile_masses[first + lane] : 0.0;
      int32_t last;
      double before;
      const int32_t found = exceeding_lane(mass, target, below, last, before);
      if (last >= 0) last_tile = first + last;
      if (found < 0) continue;
      tile = first + found;
      below = __shfl_sync(~0u, before, found);
    }
    if (tile < 0) target = INFINITY;
    const int32_t token = draw_in_tile(row, law, tile < 0 ? last_tile : tile, target, below);
    if (lane == 0) drawn[0] = token;
  }
  __syncthreads();
  return drawn[0];
}

}  // namespace specdec::cuda
