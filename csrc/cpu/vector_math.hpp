// Exponential and hyperbolic tangent on SIMD lanes. Coefficients: own minimax fits.
#pragma once

#include "simd.hpp"

namespace specdec::SPECDEC_ISA {

// 2^x for x in [-126, 0], to about 2 ulp; 0 at -127.
inline Float exp2_normal(Float x) {
  constexpr float kRound =
      12582912.0f +
      127.0f;  // adding it leaves the nearest integer, as an exponent, in the low bits
  const Float shifted = x + kRound;
  const Float r = x - (shifted - kRound);
  constexpr float kTerms[] = {0.009671534f, 0.05550734f, 0.24022242f, 0.693147f, 1.0f};
  Float total = splat(0.0013264698f);
  for (float term : kTerms) total = multiply_add(total, r, splat(term));
  const Float power = reinterpret_cast<Float>(reinterpret_cast<Int>(shifted) << 23);
  return total * power;
}

// 2^x for x <= 0; 0 below -126.5, NaN for NaN.
inline Float exp2_negative(Float x) { return exp2_normal(larger(x, splat(-127.0f))); }

// tanh, to about 2 ulp: a polynomial near 0, else by exp.
inline Float tanh(Float x) {
  const Float magnitude = x < 0.0f ? -x : x;
  const Float square = x * x;
  constexpr float kTerms[] = {0.020805374f, -0.05378668f, 0.13331959f, -0.333333f};
  Float total = splat(-0.005905857f);
  for (float term : kTerms) total = multiply_add(total, square, splat(term));
  const Float near_zero = multiply_add(total * square, x, x);
  const Float e = exp2_negative(-2.88539008f * magnitude);  // exp(-2 |x|)
  const Float far = (1.0f - e) / (1.0f + e);
  return magnitude < 0.6f ? near_zero : (x < 0.0f ? -far : far);
}

// exp in double, to about 1e-14; 0 below -700.
inline Double exp(Double x) {
  constexpr double kRound =
      6755399441055744.0;  // 1.5 * 2^52: adding it leaves the nearest integer in the low bits
  const Double shifted = x * 1.4426950408889634 + kRound;
  const Double n = shifted - kRound;
  const Double r = (x - n * 0x1.62e42fefa38p-1) - n * 0x1.ef35793c7673p-45;  // ln 2 in two parts
  Double total = Double{} + 1.0 / 39916800;
  constexpr double kFactorials[] = {3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2, 1, 1};
  for (double factorial : kFactorials) total = total * r + 1.0 / factorial;
  const Long exponent = (reinterpret_cast<Long>(shifted) + 1023) << 52;
  const Double value = total * reinterpret_cast<Double>(exponent);
  return x < -700.0 ? Double{} : value;
}

}  // namespace specdec::SPECDEC_ISA
