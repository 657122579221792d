// As many products as this CPU can make: of registers with registers, on all threads. What benches
// take for the limit of arithmetic, since no library's product of matrices reaches it everywhere.
#include <atomic>

#include "parallel.hpp"
#include "tile.hpp"

namespace specdec::SPECDEC_ISA {

// Each product is 1 and joins a sum, so that the sums tell how many there were: exactly up to 2^23
// rounds. Ones and zeros come from memory that could hold anything, as far as the compiler knows.
int64_t multiply_registers(int64_t rounds) {
#if defined(__AVX512BF16__)
  using Quanta = Bfloat16Pairs;
#else
  using Quanta = FloatQuanta<float>;
#endif
  constexpr int kSums = 12;  // at once, enough to wait for none
  typename Quanta::T elements[Quanta::kElements];
  for (auto& element : elements) element = from_float<typename Quanta::T>(1.0f);
  float one;
  Quanta::pack(elements, Quanta::kElements, &one);
  std::atomic<int64_t> products{0};
  parallel_for(num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      float memory[kSums + 1] = {};
      memory[kSums] = one;
      asm volatile("" : "+m"(memory));
      const Float ones = splat(memory[kSums]);
      Float sums[kSums];
#pragma GCC unroll 12
      for (int s = 0; s < kSums; ++s) sums[s] = splat(memory[s]);
      for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
        for (int s = 0; s < kSums; ++s) {  // of floats by a factor that is no constant to hoist
          sums[s] = Quanta::kElements > 1 ? Quanta::multiply_add(ones, ones, sums[s])
                                          : Quanta::multiply_add(sums[s], ones, ones);
        }
      }
#pragma GCC unroll 12
      for (int s = 0; s < kSums; ++s) {
        for (int lane = 0; lane < kLanes; ++lane) products += static_cast<int64_t>(sums[s][lane]);
      }
    }
  });
  return 2 * products;
}

}  // namespace specdec::SPECDEC_ISA
