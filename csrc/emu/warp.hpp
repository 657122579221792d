// Shuffles, votes and reductions of a warp. A lane brings its operand; the last one to come writes
// every lane's result.
#pragma once

#include <type_traits>

#include "machine.hpp"

namespace specdec::emu {

template <class T>
struct Shuffled {
  T value;
  int source;  // lane
};

template <class T>
T shuffle(const char* name, unsigned mask, T value, int source, Location where) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "shuffles take 32- and 64-bit numbers");
  if ((mask >> source & 1) == 0) {
    fail(where, "%s: lane %d, which is read, is not in mask %08x", name, source, mask);
  }
  const Shuffled<T> input{value, source};
  T output{};
  warp_operation(
      name, mask, &input, &output,
      [](Thread* const* lanes, unsigned all) {
        for (int i = 0; i < 32; ++i) {
          if ((all >> i & 1) == 0) continue;
          const int from = static_cast<const Shuffled<T>*>(lanes[i]->input)->source;
          *static_cast<T*>(lanes[i]->output) =
              static_cast<const Shuffled<T>*>(lanes[from]->input)->value;
        }
      },
      where);
  return output;
}

// `combine(all so far, next)` in lane order; every lane gets the last.
template <class T, class Combine>
T reduce(const char* name, unsigned mask, T value, Combine, Location where) {
  T output{};
  warp_operation(
      name, mask, &value, &output,
      [](Thread* const* lanes, unsigned all) {
        const int first = __builtin_ctz(all);
        T total = *static_cast<const T*>(lanes[first]->input);
        for (int i = first + 1; i < 32; ++i) {
          if (all >> i & 1) total = Combine{}(total, *static_cast<const T*>(lanes[i]->input));
        }
        for (int i = first; i < 32; ++i) {
          if (all >> i & 1) *static_cast<T*>(lanes[i]->output) = total;
        }
      },
      where);
  return output;
}

inline int current_lane() { return machine.current->lane; }

// First lane of the caller's segment of `width` lanes.
inline int segment(int width) { return current_lane() & ~(width - 1); }

inline unsigned ballot(const char* name, unsigned mask, int predicate, Location where) {
  const unsigned own = predicate != 0 ? 1u << current_lane() : 0u;
  return reduce(name, mask, own, [](unsigned a, unsigned b) { return a | b; }, where);
}

}  // namespace specdec::emu

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
              specdec::emu::Location where = specdec::emu::Location::current()) {
  using namespace specdec::emu;
  return shuffle("__shfl_sync", mask, value, segment(width) + (lane & (width - 1)), where);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 specdec::emu::Location where = specdec::emu::Location::current()) {
  using namespace specdec::emu;
  const int source = current_lane() - static_cast<int>(delta);
  return shuffle("__shfl_up_sync", mask, value, source < segment(width) ? current_lane() : source,
                 where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   specdec::emu::Location where = specdec::emu::Location::current()) {
  using namespace specdec::emu;
  const int source = current_lane() + static_cast<int>(delta);
  return shuffle("__shfl_down_sync", mask, value,
                 source >= segment(width) + width ? current_lane() : source, where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  specdec::emu::Location where = specdec::emu::Location::current()) {
  using namespace specdec::emu;
  const int source = current_lane() ^ bits;
  return shuffle("__shfl_xor_sync", mask, value,
                 source >= segment(width) + width ? current_lane() : source, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              specdec::emu::Location where = specdec::emu::Location::current()) {
  return specdec::emu::ballot("__ballot_sync", mask, predicate, where);
}

inline int __any_sync(unsigned mask, int predicate,
                      specdec::emu::Location where = specdec::emu::Location::current()) {
  return specdec::emu::ballot("__any_sync", mask, predicate, where) != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      specdec::emu::Location where = specdec::emu::Location::current()) {
  return specdec::emu::ballot("__all_sync", mask, predicate == 0, where) == 0;
}

template <class T>
T __reduce_add_sync(unsigned mask, T value,
                    specdec::emu::Location where = specdec::emu::Location::current()) {
  return specdec::emu::reduce(
      "__reduce_add_sync", mask, value, [](T a, T b) { return T(a + b); }, where);
}

template <class T>
T __reduce_min_sync(unsigned mask, T value,
                    specdec::emu::Location where = specdec::emu::Location::current()) {
  return specdec::emu::reduce(
      "__reduce_min_sync", mask, value, [](T a, T b) { return b < a ? b : a; }, where);
}

template <class T>
T __reduce_max_sync(unsigned mask, T value,
                    specdec::emu::Location where = specdec::emu::Location::current()) {
  return specdec::emu::reduce(
      "__reduce_max_sync", mask, value, [](T a, T b) { return a < b ? b : a; }, where);
}

template <class T>
T __reduce_and_sync(unsigned mask, T value,
                    specdec::emu::Location where = specdec::emu::Location::current()) {
  return specdec::emu::reduce(
      "__reduce_and_sync", mask, value, [](T a, T b) { return T(a & b); }, where);
}

template <class T>
T __reduce_or_sync(unsigned mask, T value,
                   specdec::emu::Location where = specdec::emu::Location::current()) {
  return specdec::emu::reduce(
      "__reduce_or_sync", mask, value, [](T a, T b) { return T(a | b); }, where);
}

inline void __syncwarp(unsigned mask = ~0u,
                       specdec::emu::Location where = specdec::emu::Location::current()) {
  specdec::emu::warp_operation(
      "__syncwarp", mask, nullptr, nullptr, [](specdec::emu::Thread* const*, unsigned) {}, where,
      true);
}
