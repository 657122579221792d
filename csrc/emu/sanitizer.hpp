// What the emulator tells AddressSanitizer and ThreadSanitizer; nothing without them.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace specdec::emu {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kHasAsan = true, kHasTsan = false;
inline void poison(void* begin, size_t bytes) { __asan_poison_memory_region(begin, bytes); }
inline void unpoison(void* begin, size_t bytes) { __asan_unpoison_memory_region(begin, bytes); }
inline bool is_readable(const void* begin, size_t bytes) {
  return __asan_region_is_poisoned(const_cast<void*>(begin), bytes) == nullptr;
}
#else
constexpr bool kHasAsan = false;
inline void poison(void*, size_t) {}
inline void unpoison(void*, size_t) {}
inline bool is_readable(const void*, size_t) { return true; }
#endif

#if defined(__SANITIZE_THREAD__)
constexpr bool kHasTsan = true;
inline void acquire(void* tag) { __tsan_acquire(tag); }
inline void release(void* tag) { __tsan_release(tag); }

// While this lives, what runs counts as another thread's work: one that has seen all that this
// thread did before, and whose own work a thread has seen once it acquires `done`.
class AsAnotherThread {
 public:
  AsAnotherThread(void*& other, void* done) : self_(__tsan_get_current_fiber()), done_(done) {
    if (other == nullptr) other = __tsan_create_fiber(0);
    __tsan_release(&other);
    __tsan_switch_to_fiber(other, kNoSync);
    __tsan_acquire(&other);
  }
  ~AsAnotherThread() {
    __tsan_release(done_);
    __tsan_switch_to_fiber(self_, kNoSync);
  }
  AsAnotherThread(const AsAnotherThread&) = delete;
  AsAnotherThread& operator=(const AsAnotherThread&) = delete;

 private:
  static constexpr unsigned kNoSync = 1;
  void* self_;
  void* done_;
};

// The emulator's own loads and stores are not the kernel's: threads take turns, so they cannot
// race.
class Unchecked {
 public:
  Unchecked() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unchecked() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
  Unchecked(const Unchecked&) = delete;
  Unchecked& operator=(const Unchecked&) = delete;
};
#else
#if !defined(__SANITIZE_ADDRESS__)
constexpr bool kHasTsan = false;
#endif
inline void acquire(void*) {}
inline void release(void*) {}

class AsAnotherThread {
 public:
  AsAnotherThread(void*&, void*) {}
};

class Unchecked {
 public:
  Unchecked() {}  // not trivial: an object that only lives does not warn
};
#endif

}  // namespace specdec::emu
