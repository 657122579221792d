// Building blocks of attention on one tile of keys: packing, and a register-blocked matrix product.
//
// Operands are made of 4-byte quanta along the summed dimension: a float, or a pair of bfloat16
// where the CPU multiplies pairs. One side is packed [quanta, columns], the other is read one
// quantum at a time and spread over the lanes, so both products of attention (keys as columns,
// value dims as columns) are the same loop.
#pragma once

#include <cstdint>

#include "simd.hpp"

namespace specdec::SPECDEC_ISA {

inline constexpr int32_t kTileKeys = 64;
#if defined(__AVX512F__)
inline constexpr int32_t kMaxVectors = 4;  // 6 x 4 accumulators fill the registers
#else
inline constexpr int32_t kMaxVectors = 2;
#endif
inline constexpr int32_t kMaxRows = 6;
inline constexpr int32_t kMaxDepth = 64;  // products summed before they join a total

// Quanta of one float each; elements of any type are widened.
template <class Element>
struct FloatQuanta {
  using T = Element;
  static constexpr int32_t kElements = 1, kWidth = kLanes;  // of a quantum, of a register
  static Float load_quanta(const T* source) { return load(source); }
  static Float multiply_add(Float a, Float b, Float total) {
    return SPECDEC_ISA::multiply_add(a, b, total);
  }
  static void pack(const T* source, int32_t num, float* target) {
    const int32_t full = num / kLanes * kLanes;
    for (int32_t i = 0; i < full; i += kLanes) store(target + i, load(source + i));
    for (int32_t i = full; i < num; ++i) target[i] = to_float(source[i]);
  }
  static void pack_probs(const float* probs, int32_t num, float* target) {
    for (int32_t i = 0; i < num; i += kLanes) store(target + i, load(probs + i));
  }
  // Register v of the quanta of value rows, here one row each.
  static Float load_values(const T* row, const T*, int v) { return load(row + v * kLanes); }
  // Sums of such quanta, [columns], in the order of the value's dims.
  static void put_in_order(float*, int32_t) {}
};

#if defined(__AVX512BF16__)
// Quanta of two bfloat16 each, multiplied exactly and accumulated in float.
struct Bfloat16Pairs {
  using T = Bfloat16;
  static constexpr int32_t kElements = 2, kWidth = kLanes * kElements;
  static Float load_quanta(const T* source) { return load(reinterpret_cast<const float*>(source)); }
  static Float multiply_add(Float a, Float b, Float total) {
    return _mm512_dpbf16_ps(total, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  // Of an odd number the last, and a zero.
  static void pack(const T* source, int32_t num, float* target) {
    if (num % kElements != 0) target[num / kElements] = 0.0f;
    std::memcpy(target, source, static_cast<size_t>(num) * sizeof(T));
  }
  // Of an odd number of registers also what follows them, which nobody multiplies.
  static void pack_probs(const float* probs, int32_t num, float* target) {
    for (int32_t i = 0; i < num; i += 2 * kLanes) {
      const __m512bh pairs = _mm512_cvtne2ps_pbh(load(probs + i + kLanes), load(probs + i));
      store(target + i / 2, reinterpret_cast<Float>(pairs));
    }
  }
  // Register v of the quanta of value rows: elements of two keys side by side. Each two registers
  // interleave four elements of the one and four of the other, as instructions do it.
  static Float load_values(const T* even, const T* odd, int v) {
    const int32_t first = v / 2 * 2 * kLanes;
    const __m512i low = _mm512_loadu_si512(even + first), high = _mm512_loadu_si512(odd + first);
    return reinterpret_cast<Float>(v % 2 == 0 ? _mm512_unpacklo_epi16(low, high)
                                              : _mm512_unpackhi_epi16(low, high));
  }
  static void put_in_order(float* sums, int32_t columns) {
    for (int32_t i = 0; i < columns; i += 2 * kLanes) {
      const Float a = load(sums + i), b = load(sums + i + kLanes);
      store(sums + i,
            __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
      store(sums + i + kLanes, __builtin_shufflevector(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13,
                                                       14, 15, 28, 29, 30, 31));
    }
  }
};
#endif

// The rows of a tile, each contiguous.
template <class T>
using TileRows = const T* [kTileKeys];

// Columns of a product, packed [quanta, stride].
struct PackedColumns {
  const float* data;
  int64_t stride;

  Float load(int32_t quantum, int32_t column, int v) const {
    return SPECDEC_ISA::load(data + quantum * stride + column + v * kLanes);
  }
};

// Columns of a product, read from the value rows of a tile.
template <class Quanta>
struct ValueColumns {
  const TileRows<typename Quanta::T>& rows;

  Float load(int32_t quantum, int32_t column, int v) const {
    const int32_t row = quantum * Quanta::kElements;
    return Quanta::load_values(rows[row] + column, rows[row + Quanta::kElements - 1] + column, v);
  }
};

// Adds sum over k in [first, first + depth) of a[r, k] * b[k, column + c] to total[r, c] *
// scales[r] (to 0 without `scales`), for kRows rows and kVectors registers of columns. The sum
// starts from zero, so that a long total does not round every product.
template <class Quanta, class Columns, int kRows, int kVectors>
void multiply_block(const float* a, int64_t stride_a, const Columns& b, int32_t column,
                    int32_t first, int32_t depth, const float* scales, float* total,
                    int64_t stride_total) {
  Float sums[kRows][kVectors];  // in registers: every loop over it is unrolled
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Float{};
  }
  for (int32_t k = first; k < first + depth; ++k) {
    Float columns[kVectors];
    for (int v = 0; v < kVectors; ++v) columns[v] = b.load(k, column, v);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Float row = splat(a[r * stride_a + k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        sums[r][v] = Quanta::multiply_add(row, columns[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* target = total + r * stride_total + v * kLanes;
      if (scales != nullptr) sums[r][v] = multiply_add(load(target), splat(scales[r]), sums[r][v]);
      store(target, sums[r][v]);
    }
  }
}

template <class Columns>
using MultiplyBlock = void (*)(const float*, int64_t, const Columns&, int32_t, int32_t, int32_t,
                               const float*, float*, int64_t);

template <class Quanta, class Columns, int... kIndices>
constexpr MultiplyBlock<Columns> choose_block(int index, std::integer_sequence<int, kIndices...>) {
  constexpr MultiplyBlock<Columns> kBlocks[] = {
      multiply_block<Quanta, Columns, kIndices / kMaxVectors + 1, kIndices % kMaxVectors + 1>...};
  return kBlocks[index];
}

// `multiply_block` for up to kMaxRows rows and any number of columns, a multiple of kLanes.
template <class Quanta, class Columns>
void multiply(const float* a, int64_t stride_a, const Columns& b, int32_t depth,
              const float* scales, float* total, int32_t rows, int32_t columns) {
  constexpr auto kBlocks = std::make_integer_sequence<int, kMaxRows * kMaxVectors>();
  constexpr float kOnes[kMaxRows] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
  for (int32_t c = 0; c < columns; c += kMaxVectors * kLanes) {
    const int32_t left = (columns - c) / kLanes;
    const int32_t vectors = left < kMaxVectors ? left : kMaxVectors;
    const MultiplyBlock<Columns> block =
        choose_block<Quanta, Columns>((rows - 1) * kMaxVectors + vectors - 1, kBlocks);
    for (int32_t k = 0; k < depth; k += kMaxDepth) {
      const int32_t part = depth - k < kMaxDepth ? depth - k : kMaxDepth;
      block(a, stride_a, b, c, k, part, k == 0 ? scales : kOnes, total + c, columns);
    }
  }
}

// Logits [kRows, num_keys] of query rows and the first keys of a tile, in whole registers, read
// where they lie; D fills whole registers. Calls `after_keys(n)` after every n keys.
template <class Quanta, int kRows, class AfterKeys>
void multiply_keys(const float* q, int64_t stride_q, const TileRows<typename Quanta::T>& keys,
                   int32_t num_keys, int32_t depth, float* logits, AfterKeys& after_keys) {
  for (int32_t first = 0; first < num_keys; first += kLanes) {
    Float products[kRows][kLanes];
    for (int32_t key = 0; key < kLanes; key += kMaxVectors) {
      Float sums[kRows][kMaxVectors] = {};
      for (int32_t k = 0; k < depth; k += kLanes) {
        Float columns[kMaxVectors];
        for (int v = 0; v < kMaxVectors; ++v)
          columns[v] = Quanta::load_quanta(keys[first + key + v] + k * Quanta::kElements);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const Float row = load(q + r * stride_q + k);
#pragma GCC unroll 8
          for (int v = 0; v < kMaxVectors; ++v)
            sums[r][v] = Quanta::multiply_add(row, columns[v], sums[r][v]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kMaxVectors; ++v) products[r][key + v] = sums[r][v];
      }
      after_keys(kMaxVectors);
    }
    for (int r = 0; r < kRows; ++r) store(logits + r * num_keys + first, sum_each(products[r]));
  }
}

template <class Quanta, class AfterKeys, int... kIndices>
auto choose_keys(int32_t rows, std::integer_sequence<int, kIndices...>) {
  constexpr decltype(&multiply_keys<Quanta, 1, AfterKeys>) kProducts[] = {
      multiply_keys<Quanta, kIndices + 1, AfterKeys>...};
  return kProducts[rows - 1];
}

// Loads `num` elements, fewer than a register holds, and zeros.
template <class T, int kElements>
const T* padded(const T* row, int32_t num, T (&buffer)[kElements]) {
  std::memset(buffer, 0, sizeof buffer);
  std::memcpy(buffer, row, static_cast<size_t>(num) * sizeof(T));
  return buffer;
}

// Keys as columns: target [quanta of D, kTileKeys].
template <class Quanta>
void pack_keys(const TileRows<typename Quanta::T>& keys, int32_t dim, float* target) {
  constexpr int32_t kWidth = Quanta::kWidth;
  typename Quanta::T buffer[kWidth];
  const int32_t full = dim / kWidth * kWidth;
  for (int32_t key = 0; key < kTileKeys; key += kLanes) {
    Float rows[kLanes];
    float* columns = target + key;
    for (int32_t first = 0; first < full; first += kWidth, columns += kLanes * kTileKeys) {
#pragma GCC unroll 16
      for (int32_t i = 0; i < kLanes; ++i) rows[i] = Quanta::load_quanta(keys[key + i] + first);
      transpose(rows);
#pragma GCC unroll 16
      for (int32_t i = 0; i < kLanes; ++i) store(columns + i * kTileKeys, rows[i]);
    }
    if (full == dim) continue;
    for (int32_t i = 0; i < kLanes; ++i) {
      rows[i] = Quanta::load_quanta(padded(keys[key + i] + full, dim - full, buffer));
    }
    transpose(rows);
    for (int32_t i = 0; i * Quanta::kElements < dim - full; ++i)
      store(columns + i * kTileKeys, rows[i]);
  }
}

// Value dims as columns: target [quanta of kTileKeys, columns].
template <class Quanta>
void pack_values(const TileRows<typename Quanta::T>& values, int32_t dim, int32_t columns,
                 float* target) {
  constexpr int32_t kWidth = Quanta::kWidth;
  typename Quanta::T buffers[2][kWidth];
  const int32_t full = dim / kWidth * kWidth;
  for (int32_t key = 0; key < kTileKeys; key += Quanta::kElements, target += columns) {
    const auto* even = values[key];
    const auto* odd = values[key + Quanta::kElements - 1];
    for (int32_t e = 0; e < columns; e += kWidth, even += kWidth, odd += kWidth) {
      if (e == full) {
        even = padded(even, dim - e, buffers[0]);
        odd = padded(odd, dim - e, buffers[1]);
      }
      for (int v = 0; v < Quanta::kElements; ++v)
        store(target + e + v * kLanes, Quanta::load_values(even, odd, v));
    }
  }
}

}  // namespace specdec::SPECDEC_ISA
