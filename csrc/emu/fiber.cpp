#include "fiber.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#include "sanitizer.hpp"

namespace specdec::emu {
namespace {

constexpr size_t kStackBytes = (kHasAsan || kHasTsan ? 256 : 64) << 10;
constexpr size_t kGuardBytes = 4096;  // below each stack: an overflow is a fault, not a riddle

#if defined(__x86_64__)
// Saves what the calling convention asks of a callee, then becomes the other stack.
extern "C" void specdec_switch_stack(void** from_stack_pointer, void* to_stack_pointer);
__asm__(R"(
.text
.local specdec_switch_stack
.type specdec_switch_stack,@function
specdec_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size specdec_switch_stack, . - specdec_switch_stack
)");

constexpr uint64_t kFloatControls = 0x1F80 | uint64_t{0x037F} << 32;  // the ABI's initial values
#endif

char* map_stack() {
  void* mapped = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED || mprotect(mapped, kGuardBytes, PROT_NONE) != 0) throw std::bad_alloc();
  return static_cast<char*>(mapped) + kGuardBytes;
}

}  // namespace

Fiber::~Fiber() {
  if (!owns_stack_) return;
  munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes);
}

void Fiber::restart(void (*entry)()) {
  if (!owns_stack_) {
    stack_ = map_stack();
    owns_stack_ = true;
    stack_bytes_ = kStackBytes;
  }
#if defined(__SANITIZE_THREAD__)
  // Never destroyed: one that was left in the middle of something dies with a complaint.
  sanitizer_state_ = __tsan_create_fiber(0);
#else
  sanitizer_state_ = nullptr;
#endif
  unpoison(stack_, stack_bytes_);
#if defined(__x86_64__)
  auto* top = reinterpret_cast<uint64_t*>(stack_ + stack_bytes_);
  *--top = 0;  // keeps the stack aligned as if `entry` had been called
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = 0;
  *--top = kFloatControls;
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = stack_bytes_;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Fiber::adopt_current() {
#if defined(__SANITIZE_THREAD__)
  sanitizer_state_ = __tsan_get_current_fiber();
#endif
}

void Fiber::switch_from(Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.sanitizer_state_, stack_, stack_bytes_);
#elif defined(__SANITIZE_THREAD__)
  constexpr unsigned kNoSync = 1;  // taking turns must not look like synchronisation
  __tsan_switch_to_fiber(sanitizer_state_, kNoSync);
#endif
#if defined(__x86_64__)
  specdec_switch_stack(&from.stack_pointer_, stack_pointer_);
#else
  swapcontext(&from.context_, &context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.sanitizer_state_, nullptr, nullptr);
#endif
}

void Fiber::arrived_from(Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack = nullptr;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &from.stack_bytes_);
  from.stack_ = const_cast<char*>(static_cast<const char*>(stack));
#else
  (void)from;
#endif
}

}  // namespace specdec::emu
