// The one header that kernels include. nvcc gets CUDA; a C++20 compiler gets the emulator, under
// the same names. Beyond CUDA's own: launch, allow_dynamic_shared, num_processors, the functions of
// ptx.cuh, and two macros, since a C++ compiler has no place to put a `__shared__` variable:
//
//   SPECDEC_SHARED(float, partial, [8]);   is   __shared__ float partial[8];
//   SPECDEC_DYNAMIC_SHARED(float, tile);   is   float* tile, the dynamic shared memory
//
// Bulk traffic with global memory goes through load_global and store_global, which the emulator
// counts and checks for alignment.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "ptx.cuh"

#define SPECDEC_SHARED(type, name, dims) __shared__ type name dims
#define SPECDEC_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char specdec_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(specdec_dynamic_shared)

namespace specdec {

inline void check_cuda(const char* op, cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(op) +
                             ": CUDA launch failed: " + cudaGetErrorString(status));
  }
}

// Asks by the return value of this launch, not by the thread's last error: that may be another's.
template <class Params>
void launch(const char* op, void (*kernel)(Params), dim3 grid, int threads, size_t dynamic_shared,
            void* stream, std::type_identity_t<Params> params) {
  void* arguments[] = {&params};
  check_cuda(op, cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid,
                                  dim3(static_cast<unsigned>(threads)), arguments, dynamic_shared,
                                  static_cast<cudaStream_t>(stream)));
}

template <class Params>
void allow_dynamic_shared(const char* op, void (*kernel)(Params), size_t bytes) {
  check_cuda(op, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(bytes)));
}

// Multiprocessors of the current device.
inline int32_t num_processors(const char* op) {
  int device = 0, num = 0;
  check_cuda(op, cudaGetDevice(&device));
  check_cuda(op, cudaDeviceGetAttribute(&num, cudaDevAttrMultiProcessorCount, device));
  return num;
}

}  // namespace specdec

#else
#include "../emu/ptx.hpp"

#define SPECDEC_SHARED(type, name, dims)                                   \
  static const char name##_tag = 0;                                        \
  using name##_type = type dims;                                           \
  auto& name = *static_cast<name##_type*>(::specdec::emu::shared_variable( \
      &name##_tag, #name, sizeof(name##_type), alignof(name##_type)))
#define SPECDEC_DYNAMIC_SHARED(type, name) \
  type* name = static_cast<type*>(::specdec::emu::machine.current->block->shared.dynamic())

namespace specdec {

template <class Params>
void launch(const char* op, void (*kernel)(Params), dim3 grid, int threads, size_t dynamic_shared,
            void*, const std::type_identity_t<Params>& params) {
  emu::launch({op, reinterpret_cast<const void*>(kernel), grid, threads, dynamic_shared},
              [&] { kernel(params); });
}

template <class Params>
void allow_dynamic_shared(const char*, void (*kernel)(Params), size_t bytes) {
  emu::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), bytes);
}

inline int32_t num_processors(const char*) { return emu::machine.processors; }

}  // namespace specdec
#endif
