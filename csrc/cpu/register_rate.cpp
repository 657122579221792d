// As many products as this CPU can make: of registers with registers, on all threads. What benches
// take for the limit of arithmetic, since no library's product of matrices reaches it everywhere.
#include "parallel.hpp"
#include "tile.hpp"

namespace specdec::SPECDEC_ISA {

int64_t multiply_registers(int64_t rounds) {
#if defined(__AVX512BF16__)
  using Quanta = Bfloat16Pairs;
#else
  using Quanta = FloatQuanta<float>;
#endif
  constexpr int kSums = 12;  // at once, enough to wait for none
  const int threads = num_threads();
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      float memory[(kSums + 2) * kLanes] = {};
      asm volatile("" : "+m"(memory));  // holds anything now, as far as the compiler knows
      const Float a = load(memory), b = load(memory + kLanes);
      Float sums[kSums];
#pragma GCC unroll 12
      for (int s = 0; s < kSums; ++s) sums[s] = load(memory + (s + 2) * kLanes);
      for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
        for (int s = 0; s < kSums; ++s) {
          sums[s] = Quanta::kElements > 1 ? Quanta::multiply_add(a, b, sums[s])
                                          : Quanta::multiply_add(sums[s], a, b);
        }
      }
#pragma GCC unroll 12
      for (int s = 0; s < kSums; ++s) store(memory + s * kLanes, sums[s]);
      asm volatile("" : : "m"(memory));
    }
  });
  return int64_t{2} * Quanta::kElements * kLanes * kSums * rounds * threads;
}

}  // namespace specdec::SPECDEC_ISA
