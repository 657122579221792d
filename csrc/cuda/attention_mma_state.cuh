// The rows of a warp on tensor cores: q.k, the online softmax, p.v.
#pragma once

#include "attention_mma_tile.cuh"

namespace specdec::cuda {

// The online softmax of 16 rows over a warp's keys. Lane holds rows lane / 4 and 8 further, and of
// every 8 columns 2 (lane % 4) and the next: elements 0, 1 of the first row, 2, 3 of the other.
template <int kDim>
struct MmaState {
  float sums[kDim / 8][4] = {};
  float largest[2] = {-INFINITY, -INFINITY};
  float weight[2] = {0.0f, 0.0f};  // of the lane's columns

  // Takes in the maxima of `logits`, [kBlocks][4], and gives what their exponents are taken from.
  template <int kBlocks>
  __device__ void rescale(const float (*logits)[4], float (&base)[2]);
};

template <int kDim>
template <int kBlocks>
__device__ inline void MmaState<kDim>::rescale(const float (*logits)[4], float (&base)[2]) {
  float now[2] = {largest[0], largest[1]};
#pragma unroll
  for (int32_t i = 0; i < 4 * kBlocks; ++i) {
    now[i % 4 / 2] = fmaxf(now[i % 4 / 2], logits[i / 4][i % 4]);
  }
#pragma unroll
  for (int32_t r = 0; r < 2; ++r) {
    now[r] = fmaxf(now[r], __shfl_xor_sync(~0u, now[r], 1));
    now[r] = fmaxf(now[r], __shfl_xor_sync(~0u, now[r], 2));
    base[r] = base_of(now[r]);
    const float keep = power_of_2(largest[r] - base[r]);
    weight[r] *= keep;
    largest[r] = now[r];
#pragma unroll
    for (int32_t n = 0; n < kDim / 8; ++n) {
      sums[n][2 * r] *= keep;
      sums[n][2 * r + 1] *= keep;
    }
  }
}

template <class T, int kDim, int kRows>
__device__ inline void load_q_fragment(const T* q, int32_t lane, int32_t step,
                                       uint32_t (&fragment)[4]) {
  ldmatrix(fragment, q + MmaTile<kDim, kRows>::at(lane % 16, 2 * step + lane / 16));
}

// Adds some of a warp's keys of a tile to its fragments of rows. `seen`: for each of the lane's
// rows, bits of the keys from its first column on.
template <class T, int kDim, int kRows, class Tile = MmaTile<kDim, kRows>>
__device__ inline void add_keys(const T* q,
                                const uint32_t (&kept_q)[Tile::kKeepsQ ? kDim / 16 : 1][4],
                                const T* keys, const T* values, const LogitScale& scale,
                                bool is_masked, const uint32_t (&seen)[Tile::kFragments][2],
                                MmaState<kDim> (&states)[Tile::kFragments]) {
  constexpr int32_t kBlocks = Tile::kSpan / 8, kFragments = Tile::kFragments;
  const int32_t lane = anew(static_cast<int32_t>(threadIdx.x) % 32);
  float logits[kFragments * kBlocks][4] = {};
#pragma unroll
  for (int32_t step = 0; step < kDim / 16; ++step) {
    uint32_t a[kFragments][4];
#pragma unroll
    for (int32_t f = 0; f < kFragments; ++f) {
      if constexpr (Tile::kKeepsQ) {
        for (int32_t i = 0; i < 4; ++i) a[f][i] = kept_q[step][i];
      } else {
        load_q_fragment<T, kDim, kRows>(q + 16 * f * kDim, lane, step, a[f]);
      }
    }
#pragma unroll
    for (int32_t block = 0; block < kBlocks; block += 2) {
      uint32_t b[4];
      ldmatrix(b, keys + Tile::at(8 * block + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
#pragma unroll
      for (int32_t f = 0; f < kFragments; ++f) {
        mma_m16n8k16<T>(logits[f * kBlocks + block], a[f], {b[0], b[1]});
        mma_m16n8k16<T>(logits[f * kBlocks + block + 1], a[f], {b[2], b[3]});
      }
    }
  }

  scale.apply<false>(logits);
  if (is_masked) {
#pragma unroll
    for (int32_t i = 0; i < 4 * kFragments * kBlocks; ++i) {
      const int32_t block = i / 4, column = block % kBlocks * 8 + i % 2;
      const bool is_seen = (seen[block / kBlocks][i % 4 / 2] >> column & 1) != 0;
      logits[block][i % 4] = is_seen ? logits[block][i % 4] : -INFINITY;
    }
  }
  float base[kFragments][2];
#pragma unroll
  for (int32_t f = 0; f < kFragments; ++f) {
    states[f].template rescale<kBlocks>(logits + f * kBlocks, base[f]);
  }
#pragma unroll
  for (int32_t block = 0; block < kBlocks; block += 2) {
    uint32_t probs[kFragments][4];  // fragments of A: what D of the first product holds, packed
#pragma unroll
    for (int32_t i = 0; i < 4 * kFragments; ++i) {
      const int32_t f = i / 4, r = i % 2;
      float* pair = &logits[f * kBlocks + block + i % 4 / 2][2 * r];
      for (int32_t j = 0; j < 2; ++j) {
        pair[j] = power_of_2(pair[j] - base[f][r]);
        states[f].weight[r] += pair[j];
      }
      probs[f][i % 4] = pack2<T>(pair[0], pair[1]);
    }
#pragma unroll
    for (int32_t n = 0; n < kDim / 8; n += 2) {
      uint32_t b[4];
      ldmatrix_transposed(b, values + Tile::at(8 * block + lane % 16, n + lane / 16));
#pragma unroll
      for (int32_t f = 0; f < kFragments; ++f) {
        mma_m16n8k16<T>(states[f].sums[n], probs[f], {b[0], b[1]});
        mma_m16n8k16<T>(states[f].sums[n + 1], probs[f], {b[2], b[3]});
      }
    }
  }
}

}  // namespace specdec::cuda
