// A stack of its own and the switch to it.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace specdec::emu {

// A default one stands for the stack that the program came with.
class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Forgets what it was doing; `entry` runs at the next switch and must never return.
  void restart(void (*entry)());

  // Makes this the fiber that runs now, from `from`, which goes on when something switches back.
  void switch_from(Fiber& from);

  // `entry` calls this first: sanitizers learn where it came from.
  static void arrived_from(Fiber& from);

  // ThreadSanitizer knows the program's own stack by asking; call it there before any switch.
  void adopt_current();

 private:
  void* stack_pointer_ = nullptr;
  char* stack_ = nullptr;
  size_t stack_bytes_ = 0;
  bool owns_stack_ = false;
  void* sanitizer_state_ = nullptr;  // ASan: its fake stack; TSan: its fiber
#if !defined(__x86_64__)
  ucontext_t context_;
#endif
};

}  // namespace specdec::emu
