// Tells whether memory holds what it held. Each 64-bit word adds the product of its halves, each
// plus a key of its place, modulo 2^64 (the NH of Black et al., UMAC, CRYPTO 1999): one read, and
// no more arithmetic than the memory is slow. Bytes moved: all, once.
#include <atomic>

#include "parallel.hpp"
#include "simd.hpp"

namespace specdec::SPECDEC_ISA {
namespace {

constexpr int kStreams = 4;             // read side by side, in which more of memory is awake
constexpr int64_t kWords = kLanes / 2;  // of 64 bits in a register
constexpr int64_t kChunk = 8192;        // words of a task
constexpr uint32_t kKeys = 0x9E3779B1;  // apart

typedef uint64_t Words __attribute__((vector_size(kLanes * 4)));

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

uint64_t multiply_keyed(const uint32_t* halves, int64_t word) {
  return uint64_t{halves[0] + key(2 * word)} * (halves[1] + key(2 * word + 1));
}

uint64_t sum_of(const char* bytes, int64_t begin, int64_t end) {
  const int64_t part = (end - begin) / kStreams / kWords * kWords;
  Words sums[kStreams] = {};
  Uint keys[kStreams];
  for (int j = 0; j < kStreams; ++j) {
    for (int lane = 0; lane < kLanes; ++lane) keys[j][lane] = key(2 * (begin + j * part) + lane);
  }
  for (int64_t word = begin; word < begin + part; word += kWords) {
#pragma GCC unroll 4
    for (int j = 0; j < kStreams; ++j) {
      Uint values;
      std::memcpy(&values, bytes + (word + j * part) * 8, sizeof values);
      sums[j] += multiply_halves(values + keys[j]);
      keys[j] += static_cast<uint32_t>(kLanes) * kKeys;
    }
  }
  uint64_t total = 0;
  for (const Words& lanes : sums) {
    for (int lane = 0; lane < kWords; ++lane) total += lanes[lane];
  }
  for (int64_t word = begin + kStreams * part; word < end; ++word) {
    uint32_t halves[2];
    std::memcpy(halves, bytes + word * 8, sizeof halves);
    total += multiply_keyed(halves, word);
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
  return total + multiply_keyed(halves, words);
}

}  // namespace specdec::SPECDEC_ISA
