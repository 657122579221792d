// Number formats shared by host and device code: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SPECDEC_HD __host__ __device__ inline
#else
// Never a function of its own: the linker could keep the copy of a wider instruction set.
#define SPECDEC_HD inline __attribute__((always_inline))
#endif

namespace specdec {

// std::bit_cast, which device code must not call.
template <class To, class From>
SPECDEC_HD To bit_cast(const From& from) {
  return __builtin_bit_cast(To, from);
}

enum class DType : int32_t { kFloat32, kFloat16, kBfloat16 };

struct Bfloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

SPECDEC_HD float to_float(float x) { return x; }

SPECDEC_HD float to_float(Bfloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

// Exact: the exponent is moved by a multiplication, which also normalises subnormals.
SPECDEC_HD float to_float(Half x) {
#if defined(__CUDA_ARCH__)
  float widened;
  asm("cvt.f32.f16 %0, %1;" : "=f"(widened) : "h"(x.bits));
  return widened;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7FFF) << 13;
  if ((x.bits & 0x7C00) == 0x7C00) return bit_cast<float>(sign | 0x7F800000 | magnitude);
  return bit_cast<float>(bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f) | sign);
#endif
}

template <class T>
T from_float(float x);

template <>
SPECDEC_HD float from_float<float>(float x) {
  return x;
}

// Rounds to nearest, ties to even; NaN stays NaN.
template <>
SPECDEC_HD Bfloat16 from_float<Bfloat16>(float x) {
#if defined(__CUDA_ARCH__)
  Bfloat16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
  return rounded;
#else
  if (x != x) return {0x7FC0};
  const uint32_t bits = bit_cast<uint32_t>(x);
  return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
#endif
}

// Rounds to nearest, ties to even; NaN stays NaN; overflows to infinity.
template <>
SPECDEC_HD Half from_float<Half>(float x) {
#if defined(__CUDA_ARCH__)
  Half rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
  return rounded;
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return {static_cast<uint16_t>(sign | 0x7E00)};
  if (magnitude >= 0x477FF000) return {static_cast<uint16_t>(sign | 0x7C00)};
  if (magnitude < 0x38800000) {  // subnormal: adding 1/2 leaves the rounded value in the low bits
    const uint32_t shifted = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f);
    return {static_cast<uint16_t>(sign | (shifted - 0x3F000000))};
  }
  const uint32_t rounded = magnitude + 0xFFF + ((magnitude >> 13) & 1);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13))};
#endif
}

// Calls `function` with a value of the element type.
template <class Function>
void with_dtype(DType dtype, Function function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(float{});
    case DType::kFloat16:
      return function(Half{});
    case DType::kBfloat16:
      return function(Bfloat16{});
  }
}

constexpr int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace specdec
