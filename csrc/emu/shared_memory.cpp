#include "shared_memory.hpp"

#include <cstdlib>
#include <cstring>
#include <new>

#include "sanitizer.hpp"

namespace specdec::emu {
namespace {

constexpr size_t kArenaAlignment = 1024;  // so that addresses tell banks
constexpr size_t kStaticLimit = 48 << 10;
constexpr size_t kRedZone = 64;
constexpr int kPoison = 0xFF;  // NaN as a float, -1 as an integer

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

void SharedMemory::Free::operator()(char* arena) const { std::free(arena); }

SharedMemory::SharedMemory(size_t dynamic_bytes)
    : dynamic_bytes_(dynamic_bytes),
      capacity_(round_up(dynamic_bytes + 2 * kStaticLimit, kArenaAlignment)),
      used_(dynamic_bytes + kRedZone),
      arena_(static_cast<char*>(std::aligned_alloc(kArenaAlignment, capacity_))),
      variables_{{nullptr, "dynamic shared memory", 0, dynamic_bytes}} {
  if (arena_ == nullptr) throw std::bad_alloc();
  std::memset(arena_.get(), kPoison, capacity_);
  poison(arena_.get() + dynamic_bytes, capacity_ - dynamic_bytes);
}

SharedMemory::~SharedMemory() { unpoison(arena_.get(), capacity_); }

void* SharedMemory::variable(const void* tag, const char* name, size_t bytes, size_t alignment) {
  for (const Variable& known : variables_) {
    if (known.tag == tag) return arena_.get() + known.begin;
  }
  const size_t begin = round_up(used_, alignment);
  if (static_bytes_ + bytes > kStaticLimit || begin + bytes + kRedZone > capacity_) return nullptr;
  variables_.push_back({tag, name, begin, bytes});
  used_ = begin + bytes + kRedZone;
  static_bytes_ += bytes;
  unpoison(arena_.get() + begin, bytes);
  return arena_.get() + begin;
}

bool SharedMemory::contains(const void* begin, size_t bytes) const {
  const char* first = static_cast<const char*>(begin);
  return first >= arena_.get() && first + bytes <= arena_.get() + used_;
}

std::string SharedMemory::overrun() const {
  if (kHasAsan) return {};  // it has reported the write itself, and forbids the look
  for (const Variable& variable : variables_) {
    const char* zone = arena_.get() + variable.begin + variable.bytes;
    for (size_t i = 0; i < kRedZone; ++i) {
      if (zone[i] != static_cast<char>(kPoison)) return variable.name;
    }
  }
  return {};
}

}  // namespace specdec::emu
