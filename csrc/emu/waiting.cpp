// Where threads wait for one another, and what they are told when they may not.
#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "machine.hpp"
#include "sanitizer.hpp"

namespace specdec::emu {
namespace {

bool same_place(const Location& a, const Location& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

void release_barrier(Block& block) {
  int votes = 0;
  for (const Thread* thread : block.threads) {
    votes += thread->state == State::kAtBarrier && thread->predicate != 0;
  }
  for (Thread* thread : block.threads) {
    if (thread->state != State::kAtBarrier) continue;
    thread->votes = votes;
    make_ready(thread);
  }
  count_conflicts(block);
  block.waiting = 0;
  ++block.barriers_passed;
  ++counters.barriers;
}

}  // namespace

std::string describe(const Location& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

uint64_t random_number() {  // xorshift64
  uint64_t& state = machine.random_state;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

void make_ready(Thread* thread) {
  thread->state = State::kReady;
  machine.ready.push_back(thread);
}

void wait() { machine.scheduler.switch_from(machine.current->fiber); }

void fail(Location where, const char* format, ...) {
  Unchecked unchecked;
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Thread* self = machine.current;
  const uint3 block = self->block->index;
  char who[128];
  std::snprintf(who, sizeof who, " [block %u,%u,%u thread %d: warp %d lane %d]", block.x, block.y,
                block.z, self->linear, self->warp, self->lane);
  machine.error = describe(where) + ": " + text + who;
  self->state = State::kDone;
  wait();
  __builtin_trap();
}

int barrier(const char* name, int predicate, Location where) {
  Unchecked unchecked;
  Thread* self = machine.current;
  Block& block = *self->block;
  if (block.waiting > 0 && !same_place(block.barrier, where)) {
    fail(where, "%s diverges: other threads wait at %s", name, describe(block.barrier).c_str());
  }
  if (block.alive != static_cast<int>(block.threads.size())) {
    fail(where, "%s after %zu threads ended", name, block.threads.size() - block.alive);
  }
  block.barrier = self->where = where;
  self->state = State::kAtBarrier;
  self->predicate = predicate;
  char* tag = &block.barrier_tags[block.barriers_passed % 2];
  release(tag);
  if (++block.waiting == block.alive) release_barrier(block);
  wait();
  acquire(tag);
  return self->votes;
}

void cluster_barrier(Location where) {
  Unchecked unchecked;
  Thread* self = machine.current;
  Cluster& cluster = *self->block->cluster;
  if (cluster.waiting > 0 && !same_place(cluster.barrier, where)) {
    fail(where, "cluster barrier diverges: other threads wait at %s",
         describe(cluster.barrier).c_str());
  }
  if (cluster.alive != static_cast<int>(cluster.blocks.size() * self->block->threads.size())) {
    fail(where, "cluster barrier after threads of the cluster ended");
  }
  cluster.barrier = self->where = where;
  self->state = State::kAtClusterBarrier;
  char* tag = &cluster.barrier_tags[cluster.barriers_passed % 2];
  release(tag);
  if (++cluster.waiting == cluster.alive) {
    for (const Block* block : cluster.blocks) {
      for (Thread* thread : block->threads) make_ready(thread);
    }
    cluster.waiting = 0;
    ++cluster.barriers_passed;
    ++counters.barriers;
  }
  wait();
  acquire(tag);
}

void warp_operation(const char* name, unsigned mask, const void* input, void* output,
                    Resolve resolve, Location where, bool orders_memory) {
  Unchecked unchecked;
  Thread* self = machine.current;
  Block& block = *self->block;
  ++counters.warp_operations;
  Thread* const* lanes = &block.threads[static_cast<size_t>(self->warp) * 32];
  const int num_lanes = std::min(32, static_cast<int>(block.threads.size()) - self->warp * 32);
  if (num_lanes < 32) mask &= (1u << num_lanes) - 1;
  if ((mask >> self->lane & 1) == 0) {
    fail(where, "%s: the calling lane is not in mask %08x", name, mask);
  }
  self->operation = name;
  self->mask = mask;
  self->input = input;
  self->output = output;
  self->where = where;
  self->state = State::kInWarpOperation;
  unsigned arrived = 0;
  for (int i = 0; i < num_lanes; ++i) {
    if ((mask >> i & 1) == 0) continue;
    const Thread& other = *lanes[i];
    if (other.state == State::kDone) fail(where, "%s: lane %d of the mask has ended", name, i);
    if (other.state != State::kInWarpOperation || other.mask != mask) continue;
    if (std::strcmp(other.operation, name) != 0 || other.where.line() != where.line()) {
      fail(where, "%s: lane %d is in %s at %s instead", name, i, other.operation,
           describe(other.where).c_str());
    }
    arrived |= 1u << i;
  }
  // Only whole warps take turns for certain; parts of one are ordered with both.
  const bool is_whole = num_lanes == std::popcount(mask);
  char* tags = block.warp_tags[self->warp];
  const unsigned turn = block.warps_passed[self->warp] % 2;
  for (unsigned i = 0; orders_memory && i < 2; ++i) {
    if (!is_whole || i == turn) release(&tags[i]);
  }
  if (arrived == mask) {
    resolve(lanes, mask);
    block.warps_passed[self->warp] += orders_memory && is_whole;
    for (int i = 0; i < num_lanes; ++i) {
      if (mask >> i & 1) make_ready(lanes[i]);
    }
  }
  wait();
  for (unsigned i = 0; orders_memory && i < 2; ++i) {
    if (!is_whole || i == turn) acquire(&tags[i]);
  }
}

void yield() {
  Unchecked unchecked;
  if (machine.order != Order::kRandom || random_number() % 4 != 0) return;
  make_ready(machine.current);
  wait();
}

void* shared_variable(const void* tag, const char* name, size_t bytes, size_t alignment,
                      Location where) {
  Unchecked unchecked;
  void* variable =
      machine.current->block->shared.variable(tag, name, bytes, std::max<size_t>(alignment, 16));
  if (variable == nullptr) fail(where, "shared %s does not fit", name);
  return variable;
}

}  // namespace specdec::emu
