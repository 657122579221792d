// Counter-based randomness: every draw is a pure function of (seed, absolute position, index,
// domain).
//
// The rules of specdec_kernels/philox.py, written once for any lane type: `Lanes` is `ScalarLanes`
// below or a SIMD set with the same members (csrc/cpu/simd.hpp). Each arithmetic step is one
// rounded float operation, so sources that include this file are compiled without contraction into
// FMA (-ffp-contract=off; --fmad=false for nvcc).
#pragma once

#include <cstdint>

#include "numeric.hpp"

namespace specdec {

// Disjoint streams: one per reason to draw.
enum class Domain : uint32_t { kDraft = 0, kAccept = 1, kResidual = 2, kTarget = 3 };

struct ScalarLanes {
  using Float = float;
  using Int = int32_t;
  using Uint = uint32_t;
  static SPECDEC_HD float splat(float x) { return x; }
  static SPECDEC_HD uint32_t splat(uint32_t x) { return x; }
  static SPECDEC_HD float to_float(uint32_t x) { return static_cast<float>(x); }
  static SPECDEC_HD float to_float(int32_t x) { return static_cast<float>(x); }
  static SPECDEC_HD int32_t to_bits(float x) { return bit_cast<int32_t>(x); }
  static SPECDEC_HD float from_bits(int32_t x) { return bit_cast<float>(x); }
  static SPECDEC_HD float select(bool is_first, float a, float b) { return is_first ? a : b; }
  static SPECDEC_HD void multiply_wide(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
    const uint64_t product = static_cast<uint64_t>(a) * b;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }
};

// Philox4x32-10 with key = seed and counter = (index / 4, domain, position): the bits of indices 4
// block .. 4 block + 3. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011.
template <class Lanes>
SPECDEC_HD void philox(typename Lanes::Uint block, int64_t seed, int64_t position, uint32_t domain,
                       typename Lanes::Uint (&bits)[4]) {
  using Uint = typename Lanes::Uint;
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  bits[0] = block;
  bits[1] = Lanes::splat(domain);
  bits[2] = Lanes::splat(static_cast<uint32_t>(position));
  bits[3] = Lanes::splat(static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32));
  for (int round = 0; round < 10; ++round) {
    Uint high0, low0, high1, low1;
    Lanes::multiply_wide(bits[0], 0xD2511F53u, high0, low0);
    Lanes::multiply_wide(bits[2], 0xCD9E8D57u, high1, low1);
    bits[0] = high1 ^ bits[1] ^ Lanes::splat(key0);
    bits[1] = low1;
    bits[2] = high0 ^ bits[3] ^ Lanes::splat(key1);
    bits[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// 2 atanh(t) = 2t (1 + t^2/3 + ... + t^(2 kTerms)/(2 kTerms + 1)), by Horner's rule.
template <class Lanes, int kTerms>
SPECDEC_HD typename Lanes::Float atanh_series(typename Lanes::Float t) {
  const typename Lanes::Float square = t * t;
  typename Lanes::Float total = Lanes::splat(static_cast<float>(1.0 / (2 * kTerms + 1)));
  for (int k = kTerms - 1; k >= 0; --k) {
    total = total * square + Lanes::splat(static_cast<float>(1.0 / (2 * k + 1)));
  }
  return (t + t) * total;
}

// Natural logarithm of positive normal floats, in a fixed sequence of rounded operations.
template <class Lanes>
SPECDEC_HD typename Lanes::Float rounded_log(typename Lanes::Float x) {
  const typename Lanes::Int bits = Lanes::to_bits(x);
  const typename Lanes::Int exponent =
      (bits - 0x3F3504F3) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  const typename Lanes::Float mantissa = Lanes::from_bits(bits - (exponent << 23));
  const typename Lanes::Float t = (mantissa - 1.0f) / (mantissa + 1.0f);
  return Lanes::to_float(exponent) * 0.6931471805599453f + atanh_series<Lanes, 4>(t);
}

// A uniform double in [0, 1) with 53 bits, from the words at indices 2 index and 2 index + 1.
SPECDEC_HD double uniform(int64_t seed, int64_t position, uint32_t index, Domain domain) {
  uint32_t bits[4];
  philox<ScalarLanes>(index / 2, seed, position, static_cast<uint32_t>(domain), bits);
  const bool is_even = index % 2 == 0;  // not an index: registers have none
  const uint32_t high = is_even ? bits[0] : bits[2], low = is_even ? bits[1] : bits[3];
  const uint64_t both = (static_cast<uint64_t>(high >> 5) << 26) + (low >> 6);
  return static_cast<double>(both) * 0x1p-53;
}

// Standard Gumbel noise -log(-log(1 - v)) with v = (bits + 1/2) / 2^32. Small v, which decide an
// argmax over a vocabulary, keep their full relative precision.
template <class Lanes>
SPECDEC_HD typename Lanes::Float gumbel(typename Lanes::Uint bits) {
  using Float = typename Lanes::Float;
  constexpr float kLargest = 1.0f - 0x1p-24f;
  Float v = (Lanes::to_float(bits) + 0.5f) * 0x1p-32f;
  v = Lanes::select(v > kLargest, Lanes::splat(kLargest), v);
  const Float series = atanh_series<Lanes, 6>(v / (2.0f - v));
  const Float exponential = Lanes::select(v < 0.5f, series, -rounded_log<Lanes>(1.0f - v));
  return -rounded_log<Lanes>(exponential);
}

}  // namespace specdec
