// Picks the instruction set once, when the library is loaded.
#include <cstdlib>
#include <string>

#include "cpu/error.hpp"
#include "cpu/kernels.hpp"

namespace specdec {

namespace isa_default {
extern const CpuKernels kernels;
}

#if defined(__x86_64__)
namespace isa_avx2 {
extern const CpuKernels kernels;
}
namespace isa_avx512 {
extern const CpuKernels kernels;
}
namespace isa_avx512_bf16 {
extern const CpuKernels kernels;
}
#endif

namespace {

// Widest first.
struct Candidate {
  const CpuKernels* kernels;
  bool is_supported;
};

const CpuKernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const Candidate candidates[] = {
      {&isa_avx512_bf16::kernels, avx512 && __builtin_cpu_supports("avx512bf16")},
      {&isa_avx512::kernels, avx512},
      {&isa_avx2::kernels, avx2},
      {&isa_default::kernels, true},
  };
#else
  const Candidate candidates[] = {{&isa_default::kernels, true}};
#endif
  const char* wanted = std::getenv("SPECDEC_CPU_CAPABILITY");
  std::string usable;
  for (const Candidate& candidate : candidates) {
    if (!candidate.is_supported) continue;
    if (wanted == nullptr || std::string(wanted) == candidate.kernels->name)
      return *candidate.kernels;
    usable += usable.empty() ? "" : ", ";
    usable += candidate.kernels->name;
  }
  fail("SPECDEC_CPU_CAPABILITY must be one of %s, got %s", usable.c_str(), wanted);
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = choose();
  return chosen;
}

}  // namespace specdec
