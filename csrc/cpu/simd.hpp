// SIMD lanes of one native register, for the instruction set this source is compiled for.
//
// Arithmetic, comparison and selection are GCC vector extensions, which round like the scalar
// operators; only what they cannot say (widening products, half floats, reductions) names
// intrinsics. Everything lives in the namespace of its instruction set, so that no inline function
// compiled for a wide set is linked into a narrow one.
#pragma once

// GCC 12 warns about its own undefined registers.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#pragma GCC diagnostic pop

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "../core/numeric.hpp"

namespace specdec::SPECDEC_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

constexpr int32_t round_up(int32_t value, int32_t unit) { return (value + unit - 1) / unit * unit; }

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef float Float __attribute__((vector_size(kLanes * 4)));
typedef int32_t Int __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Uint __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Short __attribute__((vector_size(kLanes * 2)));
typedef float HalfFloat __attribute__((vector_size(kLanes * 2)));
typedef double Double __attribute__((vector_size(kLanes * 4)));
typedef int64_t Long __attribute__((vector_size(kLanes * 4)));

inline Float load(const float* source) {
  Float lanes;
  std::memcpy(&lanes, source, sizeof lanes);
  return lanes;
}

inline HalfFloat load_half(const float* source) {
  HalfFloat lanes;
  std::memcpy(&lanes, source, sizeof lanes);
  return lanes;
}

inline Double load(const double* source) {
  Double lanes;
  std::memcpy(&lanes, source, sizeof lanes);
  return lanes;
}

inline Int load(const int32_t* source) {
  Int lanes;
  std::memcpy(&lanes, source, sizeof lanes);
  return lanes;
}

inline void store(float* target, Float lanes) { std::memcpy(target, &lanes, sizeof lanes); }

// x in every lane, bits untouched (a NaN, or a pair of bfloat16, stays what it is).
inline Float splat(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#else
  return Float{x, x, x, x};
#endif
}

// a * b + c, with one rounding where the instruction set has it.
inline Float multiply_add(Float a, Float b, Float c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// b > a ? b : a; so `a` where one is NaN.
inline Float larger(Float a, Float b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(b, a);
#elif defined(__AVX2__)
  return _mm256_max_ps(b, a);
#else
  return b > a ? b : a;
#endif
}

template <int... kIndex>
inline Float larger_of_pairs(Float a, Float b, std::integer_sequence<int, kIndex...>) {
  return larger(__builtin_shufflevector(a, b, (2 * kIndex)...),
                __builtin_shufflevector(a, b, (2 * kIndex + 1)...));
}

// The larger of each two neighbours in `a`, then of those in `b`.
inline Float larger_of_pairs(Float a, Float b) {
  return larger_of_pairs(a, b, std::make_integer_sequence<int, kLanes>());
}

inline bool any(Int mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) !=
         0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(reinterpret_cast<__m256i>(mask), reinterpret_cast<__m256i>(mask));
#else
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

#if !defined(__AVX512F__)
typedef float Four __attribute__((vector_size(16)));

// The lanes of a register by halves.
template <class Combine>
inline float reduce(Float lanes, Combine combine) {
#if defined(__AVX2__)
  const Four four = combine(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
#else
  const Four four = lanes;
#endif
  const Four two = combine(four, __builtin_shufflevector(four, four, 2, 3, 2, 3));
  return combine(two, __builtin_shufflevector(two, two, 1, 1, 1, 1))[0];
}
#endif

// Not for NaN.
inline float largest(Float lanes) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(lanes);
#else
  return reduce(lanes, [](Four a, Four b) { return a > b ? a : b; });
#endif
}

inline float sum(Float lanes) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(lanes);
#else
  return reduce(lanes, [](Four a, Four b) { return a + b; });
#endif
}

inline double sum(Double lanes) {
  double total = 0.0;
  for (int i = 0; i < kLanes / 2; ++i) total += lanes[i];
  return total;
}

inline int32_t sum(Int lanes) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(lanes));
#else
  int32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
#endif
}

// 0, 1, 2, ...
inline Int count_up() {
  Int lanes{};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// Writes the lanes in `mask`, in order; all kLanes elements of the target may change. Returns how
// many the mask holds.
template <class Lanes, class T>
inline int32_t compress(Int mask, Lanes lanes, T* target) {
#if defined(__AVX512F__)
  // into a register: straight to memory, some CPUs do this in microcode
  const __mmask16 bits = _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
  const __m512i packed = _mm512_maskz_compress_epi32(bits, reinterpret_cast<__m512i>(lanes));
  _mm512_storeu_si512(target, packed);
  return __builtin_popcount(bits);
#else
  int32_t num = 0;
  if (!any(mask)) return num;
  for (int i = 0; i < kLanes; ++i) {
    target[num] = lanes[i];
    num -= mask[i];
  }
  return num;
#endif
}

// kLanes elements, widened to float.
inline Float load(const Bfloat16* source) {
#if defined(__AVX512F__)
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return reinterpret_cast<Float>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
#elif defined(__AVX2__)
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  return reinterpret_cast<Float>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
#else
  Short raw;
  std::memcpy(&raw, source, sizeof raw);
  return reinterpret_cast<Float>(__builtin_convertvector(raw, Uint) << 16);
#endif
}

inline Float load(const Half* source) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#elif defined(__aarch64__)
  return vcvt_f32_f16(vld1_f16(reinterpret_cast<const float16_t*>(source)));
#else
  Float lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = to_float(source[i]);
  return lanes;
#endif
}

// The bits of each value rounded to nearest, ties to even; a bfloat16 is their upper half.
inline Uint nearest_bfloat16(Float lanes) {
  const Uint bits = reinterpret_cast<Uint>(lanes);
  return lanes == lanes ? bits + 0x7FFFu + ((bits >> 16) & 1u) : 0x7FC00000u - Uint{};
}

// from_float of kLanes values.
inline void store(Bfloat16* target, Float lanes) {
  const Uint kept = nearest_bfloat16(lanes) >> 16;
#if defined(__AVX2__) && !defined(__AVX512F__)
  // GCC 12 clears the upper halves, which are clear, before it narrows.
  const __m256i narrow = _mm256_packus_epi32(reinterpret_cast<__m256i>(kept), __m256i{});
  const __m256i joined = _mm256_permute4x64_epi64(narrow, 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_castsi256_si128(joined));
#else
  const Short narrow = __builtin_convertvector(kept, Short);
  std::memcpy(target, &narrow, sizeof narrow);
#endif
}

inline void store(Half* target, Float lanes) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                      _mm512_cvtps_ph(lanes, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target),
                   _mm256_cvtps_ph(lanes, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
  vst1_f16(reinterpret_cast<float16_t*>(target), vcvt_f16_f32(lanes));
#else
  for (int i = 0; i < kLanes; ++i) target[i] = from_float<Half>(lanes[i]);
#endif
}

// The values that T would hold.
template <class T>
inline Float rounded(Float lanes) {
  T kept[kLanes];
  store(kept, lanes);
  return load(kept);
}

template <>
inline Float rounded<float>(Float lanes) {
  return lanes;
}

template <>
inline Float rounded<Bfloat16>(Float lanes) {
  return reinterpret_cast<Float>(nearest_bfloat16(lanes) & 0xFFFF0000u);
}

// Where to prefetch to, as __builtin_prefetch says it (2: past the first cache, which has room for
// few requests): measured on CPUs with these instructions, and on others.
#if defined(__AVX512BF16__)
inline constexpr int kCache = 2;
#else
inline constexpr int kCache = 3;
#endif

// Asks memory for `num` values that are read soon. Tensors lie in small pages, at whose ends the
// hardware stops to look ahead.
template <class T>
inline void prefetch(const T* values, int32_t num) {
  for (int32_t i = 0; i < num; i += 64 / static_cast<int32_t>(sizeof(T)))
    __builtin_prefetch(values + i, 0, kCache);
}

// How far ahead of a sweep to ask.
template <class T>
inline constexpr int32_t kAhead = 2048 / sizeof(T);

// The largest of `num` values, a multiple of kLanes, in lanes; NaN counts as -inf.
template <class T>
inline Float lanes_of(const T* values, int32_t num) {
  Float best = splat(-kInfinity);
  for (int32_t i = 0; i < num; i += kLanes) best = larger(best, load(values + i));
  return best;
}

template <class T>
inline float largest_of(const T* values, int32_t num) {
  return largest(lanes_of(values, num));
}

// One step of a transposition: swaps the off-diagonal blocks of size kStep of two rows.
template <int kStep, int... kLane>
[[gnu::always_inline]] inline void swap_blocks(Float& a, Float& b,
                                               std::integer_sequence<int, kLane...>) {
  const Float first =
      __builtin_shufflevector(a, b, (kLane & kStep ? kLanes + kLane - kStep : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kStep ? kLanes + kLane : kLane + kStep)...);
  a = first;
}

template <int kStep = kLanes / 2>
[[gnu::always_inline]] inline void transpose(Float (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & kStep)) {
      swap_blocks<kStep>(rows[i], rows[i | kStep], std::make_integer_sequence<int, kLanes>());
    }
  }
  if constexpr (kStep > 1) transpose<kStep / 2>(rows);
}

// The sum of each register's lanes, in the order of the registers.
template <int kStep = kLanes / 2>
[[gnu::always_inline]] inline Float sum_each(Float (&rows)[kLanes]) {
#pragma GCC unroll 8
  for (int i = 0; i < kStep; ++i) {
    swap_blocks<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kLanes>());
    rows[i] += rows[i + kStep];
  }
  if constexpr (kStep > 1) return sum_each<kStep / 2>(rows);
  return rows[0];
}

// Lane sets for the rules of core/philox.hpp.
struct VectorLanes {
  using Float = specdec::SPECDEC_ISA::Float;
  using Int = specdec::SPECDEC_ISA::Int;
  using Uint = specdec::SPECDEC_ISA::Uint;
  static Float splat(float x) { return SPECDEC_ISA::splat(x); }
  static Uint splat(uint32_t x) { return x - Uint{}; }
  static Float to_float(Uint x) { return __builtin_convertvector(x, Float); }
  static Float to_float(Int x) { return __builtin_convertvector(x, Float); }
  static Int to_bits(Float x) { return reinterpret_cast<Int>(x); }
  static Float from_bits(Int x) { return reinterpret_cast<Float>(x); }
  static Float select(Int is_first, Float a, Float b) { return is_first ? a : b; }

  static void multiply_wide(Uint a, uint32_t b, Uint& high, Uint& low) {
    // products of the even lanes and of the odd ones, each in 64 bits
#if defined(__AVX512F__)
    const __m512i factor = _mm512_set1_epi32(static_cast<int>(b));
    const __m512i lanes = reinterpret_cast<__m512i>(a);
    const __m512i even = _mm512_mul_epu32(lanes, factor);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(lanes, 32), factor);
    high = reinterpret_cast<Uint>(_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd));
    low = reinterpret_cast<Uint>(_mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32)));
#elif defined(__AVX2__)
    const __m256i factor = _mm256_set1_epi32(static_cast<int>(b));
    const __m256i lanes = reinterpret_cast<__m256i>(a);
    const __m256i even = _mm256_mul_epu32(lanes, factor);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(lanes, 32), factor);
    high = reinterpret_cast<Uint>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA));
    low = reinterpret_cast<Uint>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
#else
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t product = uint64_t{a[i]} * b;
      high[i] = static_cast<uint32_t>(product >> 32);
      low[i] = static_cast<uint32_t>(product);
    }
#endif
  }
};

}  // namespace specdec::SPECDEC_ISA
