// What nvcc gives to a source without asking, for a C++20 compiler: keywords, built-in variables,
// barriers, atomics and device functions.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "machine.hpp"
#include "sanitizer.hpp"
#include "warp.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::specdec::emu::machine.current->index)
#define blockIdx (::specdec::emu::machine.current->block->index)
#define blockDim (::specdec::emu::machine.block)
#define gridDim (::specdec::emu::machine.grid)

inline void __syncthreads(specdec::emu::Location where = specdec::emu::Location::current()) {
  specdec::emu::barrier("__syncthreads", 0, where);
}

inline int __syncthreads_count(int predicate,
                               specdec::emu::Location where = specdec::emu::Location::current()) {
  return specdec::emu::barrier("__syncthreads_count", predicate, where);
}

inline int __syncthreads_or(int predicate,
                            specdec::emu::Location where = specdec::emu::Location::current()) {
  return specdec::emu::barrier("__syncthreads_or", predicate, where) > 0;
}

inline int __syncthreads_and(int predicate,
                             specdec::emu::Location where = specdec::emu::Location::current()) {
  return specdec::emu::barrier("__syncthreads_and", predicate == 0, where) == 0;
}

// Stronger than CUDA's: ThreadSanitizer knows no fence that orders nothing else.
inline void __threadfence() {
  static char tag;
  specdec::emu::release(&tag);
  specdec::emu::acquire(&tag);
  specdec::emu::yield();
}

inline void __threadfence_block() { __threadfence(); }

namespace specdec::emu {

// Relaxed, as on the GPU; other threads may come first.
template <class T, class Update>
T read_modify_write(T* address, Update update) {
  {
    Unchecked unchecked;
    ++counters.atomics;
  }
  yield();
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do {
    after = update(before);
  } while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED));
  return before;
}

}  // namespace specdec::emu

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return specdec::emu::read_modify_write(address, [=](T old) { return T(old + value); });
}

template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return specdec::emu::read_modify_write(address, [=](T old) { return old < value ? value : old; });
}

template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return specdec::emu::read_modify_write(address, [=](T old) { return value < old ? value : old; });
}

template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return specdec::emu::read_modify_write(address, [=](T old) { return T(old | value); });
}

template <class T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return specdec::emu::read_modify_write(address, [=](T old) { return T(old & value); });
}

template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return specdec::emu::read_modify_write(address, [=](T) { return value; });
}

template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return specdec::emu::read_modify_write(address,
                                         [=](T old) { return old == expected ? value : old; });
}

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(b) < T(a) ? T(b) : T(a);
}

template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(a) < T(b) ? T(b) : T(a);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
