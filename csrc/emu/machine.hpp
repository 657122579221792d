// The emulated GPU: every CUDA thread is a fiber, and the fibers take turns in a chosen order.
//
// A thread runs until it must wait: at a barrier, in a warp operation, or at its end. So a kernel
// that lacks a barrier gives another result in another order, and under ThreadSanitizer, to which
// each fiber is a thread, it is reported whatever the order. Blocks run one after another; in
// random order a few at a time, and under ThreadSanitizer all at once; those of a cluster together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "banks.hpp"
#include "cuda_types.hpp"
#include "fiber.hpp"
#include "shared_memory.hpp"

namespace specdec::emu {

using Location = std::source_location;

// What a GPU would leave undefined, or hang on.
struct Error : std::logic_error {
  using logic_error::logic_error;
};

// What ran since the counters were last set to zero.
struct Counters {
  uint64_t launches, blocks, barriers, warp_operations, atomics;
  uint64_t loaded_bytes, stored_bytes;     // global memory, through load_global and store_global
  uint64_t copied_bytes;                   // global to shared memory, by cp.async
  uint64_t matrix_loads;                   // ldmatrix
  uint64_t shared_accesses;                // of a warp: cp.async, load_shared, store_shared
  uint64_t bank_conflicts;                 // of all of these: turns beyond the least
  uint64_t matrix_products, matrix_flops;  // mma.sync; a product and a sum are two
  uint64_t dynamic_shared;                 // bytes, the most that a launch asked for
};
extern Counters counters;

// "forward", "reverse" or "random:<seed>"; throws std::invalid_argument for anything else.
void set_order(const std::string& order);

struct LaunchShape {
  const char* op;
  const void* kernel;
  dim3 grid;
  int threads;
  size_t dynamic_shared;
  unsigned cluster = 1;  // blocks, along x
};

// Runs `thread` for every thread of every block; throws Error.
void launch(const LaunchShape& shape, const std::function<void()>& thread);

// Lets launches of `kernel` use that much dynamic shared memory; 48 KiB need no leave.
void allow_dynamic_shared(const void* kernel, size_t bytes);

struct Block;
struct Cluster;

struct AsyncCopy {
  void* target;
  const void* source;
  int source_bytes, group;
  Location where;
};

enum class State : uint8_t { kReady, kAtBarrier, kAtClusterBarrier, kInWarpOperation, kDone };

struct Thread {
  Fiber fiber;
  uint3 index{};
  int linear = 0, warp = 0, lane = 0;
  State state = State::kReady;
  Block* block = nullptr;
  Location where{};              // what it waits in
  int predicate = 0, votes = 0;  // of a barrier: given, received
  const char* operation = "";    // of a warp: name, lanes, operands
  unsigned mask = 0;
  const void* input = nullptr;
  void* output = nullptr;
  std::vector<SharedAccess> shared_accesses;  // since the last barrier
  std::vector<AsyncCopy> copies;              // cp.async under way
  int copy_group = 0;
  void* copy_engine = nullptr;  // to ThreadSanitizer, the thread that copies
  char copy_tags[64] = {};      // stand for the end of a group's copies
};

struct Block {
  Block(uint3 index, size_t dynamic_shared) : index(index), shared(dynamic_shared) {}
  uint3 index;
  SharedMemory shared;
  std::vector<Thread*> threads;
  Cluster* cluster = nullptr;
  unsigned rank = 0;  // in the cluster
  int alive = 0, waiting = 0;
  Location barrier{};
  // Addresses that stand for what a barrier orders. Two, in turns: a thread that leaves one barrier
  // late must not see what others did on their way to the next.
  char barrier_tags[2] = {}, warp_tags[32][2] = {};
  unsigned barriers_passed = 0, warps_passed[32] = {};
};

struct Cluster {
  std::vector<Block*> blocks;
  int alive = 0, waiting = 0;  // threads
  Location barrier{};
  char barrier_tags[2] = {};
  unsigned barriers_passed = 0;
};

enum class Order { kForward, kReverse, kRandom };

// The launch under way.
struct Machine {
  Thread* current = nullptr;
  dim3 grid, block;
  unsigned cluster = 1;
  Order order = Order::kForward;
  int processors = 8;       // that a kernel is told of
  int largest_cluster = 2;  // likewise; 1 as on sm_80
  uint64_t seed = 0, random_state = 1;
  Fiber scheduler;
  std::vector<Thread*> ready;
  size_t next_ready = 0;  // forward order consumes `ready` from here
  std::string error;
};
extern Machine machine;

uint64_t random_number();
void make_ready(Thread* thread);
void wait();  // until something makes the current thread ready
std::string describe(const Location& where);

// Ends the launch with an error that names place, block and thread.
[[noreturn, gnu::format(printf, 2, 3)]] void fail(Location where, const char* format, ...);

// Waits for all threads of the block; the number whose predicate is not zero.
int barrier(const char* name, int predicate, Location where);

// Waits for all threads of the cluster.
void cluster_barrier(Location where);

// Waits for the lanes of `mask`; the last to come calls `resolve` with the warp's threads, once.
using Resolve = void (*)(Thread* const* lanes, unsigned mask);
void warp_operation(const char* name, unsigned mask, const void* input, void* output,
                    Resolve resolve, Location where, bool orders_memory = false);

// A place where another thread may go first.
void yield();

void* shared_variable(const void* tag, const char* name, size_t bytes, size_t alignment,
                      Location where = Location::current());

}  // namespace specdec::emu
