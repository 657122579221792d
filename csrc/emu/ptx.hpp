// The functions of ../cuda/ptx.cuh, in C++.
#pragma once

#include "../core/numeric.hpp"
#include "cuda.hpp"

namespace specdec {

namespace emu {

void count_access(const void* address, size_t bytes, uint64_t& counter, Location where);
void note_access(const void* address, size_t bytes, Location where);
void async_copy16(void* shared, const void* global, int bytes, Location where);
void async_commit();
void async_wait(int groups_under_way);
void load_matrices(uint32_t (&registers)[4], const void* row, bool is_transposed, Location where);
void matrix_product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    float (*widen)(uint16_t), Location where);

}  // namespace emu

template <class T>
T load_global(const T* address, emu::Location where = emu::Location::current()) {
  emu::count_access(address, sizeof(T), emu::counters.loaded_bytes, where);
  return *address;
}

template <class T>
void store_global(T* address, std::type_identity_t<T> value,
                  emu::Location where = emu::Location::current()) {
  emu::count_access(address, sizeof(T), emu::counters.stored_bytes, where);
  *address = value;
}

template <class T>
T load_shared(const T* address, emu::Location where = emu::Location::current()) {
  emu::note_access(address, sizeof(T), where);
  return *address;
}

template <class T>
void store_shared(T* address, std::type_identity_t<T> value,
                  emu::Location where = emu::Location::current()) {
  emu::note_access(address, sizeof(T), where);
  *address = value;
}

inline void cp_async16(void* shared, const void* global, int bytes = 16,
                       emu::Location where = emu::Location::current()) {
  emu::async_copy16(shared, global, bytes, where);
}

inline void cp_async_commit() { emu::async_commit(); }

template <int kGroupsUnderWay>
void cp_async_wait() {
  emu::async_wait(kGroupsUnderWay);
}

inline void ldmatrix(uint32_t (&registers)[4], const void* row,
                     emu::Location where = emu::Location::current()) {
  emu::load_matrices(registers, row, false, where);
}

inline void ldmatrix_transposed(uint32_t (&registers)[4], const void* row,
                                emu::Location where = emu::Location::current()) {
  emu::load_matrices(registers, row, true, where);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  emu::Location where = emu::Location::current()) {
  emu::matrix_product(d, a, b, [](uint16_t bits) { return to_float(T{bits}); }, where);
}

inline uint32_t cluster_rank() { return emu::machine.current->block->rank; }
inline uint32_t cluster_size() { return emu::machine.cluster; }

inline void cluster_sync(emu::Location where = emu::Location::current()) {
  emu::cluster_barrier(where);
}

inline int32_t anew(int32_t x) { return x; }

inline float power_of_2(float x) { return std::exp2(x); }

// `low` in the low half.
template <class T>
uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

}  // namespace specdec
