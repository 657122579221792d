// Uninitialised memory that grows and is reused. Not std::vector: its members are shared by all
// instruction sets, and the linker may keep the copy compiled for the widest.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace specdec::SPECDEC_ISA {

template <class T>
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // At least `num` elements, aligned to a cache line; their values are lost when the memory grows.
  T* reserve(int64_t num) {
    if (num > capacity_) {
      std::free(data_);
      const size_t bytes = (static_cast<size_t>(num) * sizeof(T) + 63) / 64 * 64;
      data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
      capacity_ = data_ == nullptr ? 0 : num;
      if (data_ == nullptr) throw std::bad_alloc();
    }
    return data_;
  }

  T* get() { return data_; }
  const T* get() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace specdec::SPECDEC_ISA
