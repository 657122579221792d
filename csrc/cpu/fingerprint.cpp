// Tells whether memory holds what it held. Each 64-bit word adds the product of its halves, each
// plus a key of its place, modulo 2^64 (the NH of Black et al., UMAC, CRYPTO 1999): one read, and
// no more arithmetic than the memory is slow. Bytes moved: all, once.
#include <atomic>

#include "parallel.hpp"
#include "simd.hpp"

namespace specdec::SPECDEC_ISA {
namespace {

constexpr int kUnrolled = 4;
constexpr int64_t kWords = kLanes / 2;               // of 64 bits in a register
constexpr int64_t kStep = kUnrolled * kWords;        // words of a round
constexpr int64_t kChunk = 8192 / kStep * kStep;     // words of a task
constexpr int64_t kAhead = 4096 / sizeof(uint64_t);  // words to prefetch ahead

typedef uint64_t Words __attribute__((vector_size(kLanes * 4)));

constexpr uint32_t kKeys = 0x9E3779B1;  // apart

uint32_t key(int64_t half) { return static_cast<uint32_t>(half + 1) * kKeys; }

Words multiply_halves(Uint values) {
  const Words words = reinterpret_cast<Words>(values);
#if defined(__AVX512F__)
  const __m512i low = reinterpret_cast<__m512i>(words);
  return reinterpret_cast<Words>(_mm512_mul_epu32(low, _mm512_srli_epi64(low, 32)));
#elif defined(__AVX2__)
  const __m256i low = reinterpret_cast<__m256i>(words);
  return reinterpret_cast<Words>(_mm256_mul_epu32(low, _mm256_srli_epi64(low, 32)));
#else
  return (words & 0xFFFFFFFFu) * (words >> 32);
#endif
}

uint64_t sum_of(const char* bytes, int64_t begin, int64_t end) {
  Words sums[kUnrolled] = {};
  Uint keys[kUnrolled];
  for (int j = 0; j < kUnrolled; ++j) {
    for (int lane = 0; lane < kLanes; ++lane) {
      keys[j][lane] = key(2 * (begin + j * kWords) + lane);
    }
  }
  constexpr uint32_t kNext = static_cast<uint32_t>(2 * kStep) * kKeys;
  int64_t word = begin;
  for (; word + kStep <= end; word += kStep) {
#pragma GCC unroll 4
    for (int j = 0; j < kUnrolled; ++j) {
      const char* source = bytes + (word + j * kWords) * 8;
      if (j % (64 / (kLanes * 4)) == 0) __builtin_prefetch(source + kAhead * 8, 0, 2);
      Uint values;
      std::memcpy(&values, source, sizeof values);
      sums[j] += multiply_halves(values + keys[j]);
      keys[j] += kNext;
    }
  }
  uint64_t total = 0;
  for (const Words& lanes : sums) {
    for (int lane = 0; lane < kWords; ++lane) total += lanes[lane];
  }
  for (; word < end; ++word) {
    uint32_t halves[2];
    std::memcpy(halves, bytes + word * 8, sizeof halves);
    total += uint64_t{halves[0] + key(2 * word)} * (halves[1] + key(2 * word + 1));
  }
  return total;
}

}  // namespace

uint64_t fingerprint(const void* values, int64_t num_bytes) {
  const char* bytes = static_cast<const char*>(values);
  const int64_t words = num_bytes / 8, rest = num_bytes % 8;
  std::atomic<uint64_t> total{0};
  parallel_for((words + kChunk - 1) / kChunk, 2, [&](int64_t begin, int64_t end) {
    total += sum_of(bytes, begin * kChunk, end * kChunk < words ? end * kChunk : words);
  });
  uint32_t halves[2] = {};
  std::memcpy(halves, bytes + words * 8, static_cast<size_t>(rest));
  return total + uint64_t{halves[0] + key(2 * words)} * (halves[1] + key(2 * words + 1));
}

}  // namespace specdec::SPECDEC_ISA
