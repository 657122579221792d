// The shared memory of one block: poisoned when the block starts, with a red zone behind every
// variable.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

namespace specdec::emu {

class SharedMemory {
 public:
  explicit SharedMemory(size_t dynamic_bytes);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // The variable of this tag, made at the first call; null where static variables do not fit.
  void* variable(const void* tag, const char* name, size_t bytes, size_t alignment);

  void* dynamic() const { return arena_.get(); }
  size_t used_bytes() const { return dynamic_bytes_ + static_bytes_; }
  bool contains(const void* begin, size_t bytes) const;

  // The variable whose red zone was written to; empty if none was.
  std::string overrun() const;

 private:
  struct Variable {
    const void* tag;
    std::string name;
    size_t begin, bytes;
  };
  struct Free {
    void operator()(char* arena) const;
  };

  size_t dynamic_bytes_, static_bytes_ = 0, capacity_, used_;
  std::unique_ptr<char, Free> arena_;
  std::vector<Variable> variables_;
};

}  // namespace specdec::emu
