#include "machine.hpp"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>

#include "sanitizer.hpp"

namespace specdec::emu {

Counters counters{};
Machine machine;

namespace {

constexpr size_t kSharedDefault = 48 << 10;
constexpr size_t kSharedLimit = 163 << 10;  // of sm_80, the smallest target
constexpr size_t kResidentBlocks = 4;       // in random order
constexpr unsigned kClusterLimit = 8;       // that every GPU with clusters can run

std::map<const void*, size_t> shared_leave;
const std::function<void()>* body = nullptr;

// The host's work comes before every thread's, and every thread's before what the host does next;
// one tag for both would put the threads in an order.
char launch_tag, end_tag;

Thread* pop_ready() {
  if (machine.order == Order::kForward) {
    Thread* first = machine.ready[machine.next_ready++];
    if (machine.next_ready == machine.ready.size()) {
      machine.ready.clear();
      machine.next_ready = 0;
    }
    return first;
  }
  const size_t chosen = machine.order == Order::kReverse ? machine.ready.size() - 1
                                                         : random_number() % machine.ready.size();
  std::swap(machine.ready[chosen], machine.ready.back());
  Thread* thread = machine.ready.back();
  machine.ready.pop_back();
  return thread;
}

void finish_thread() {
  Unchecked unchecked;
  Thread* self = machine.current;
  Block& block = *self->block;
  if (!self->copies.empty()) {
    fail(self->copies.front().where, "thread ends with cp.async under way");
  }
  if (block.waiting > 0) fail(block.barrier, "thread ends while others wait in a barrier");
  if (block.cluster->waiting > 0) {
    fail(block.cluster->barrier, "thread ends while others wait in a cluster barrier");
  }
  self->state = State::kDone;
  --block.alive;
  --block.cluster->alive;
  release(&end_tag);
  wait();
}

// A fiber serves launch after launch: making one costs more than most kernels.
void serve() {
  Fiber::arrived_from(machine.scheduler);
  while (true) {
    acquire(&launch_tag);
    (*body)();
    finish_thread();
  }
}

// Never freed: they are in the middle of serve.
std::vector<Thread*>& pool() {
  static auto* threads = new std::vector<Thread*>;
  return *threads;
}

Thread* pooled_thread(size_t i) {
  if (i == pool().size()) {
    pool().push_back(new Thread);
    pool().back()->fiber.restart(serve);
  }
  return pool()[i];
}

std::string deadlock(const Block& block) {
  const auto stuck = std::find_if(block.threads.begin(), block.threads.end(),
                                  [](const Thread* t) { return t->state != State::kDone; });
  return describe((*stuck)->where) + ": deadlock: " + std::to_string(block.alive) +
         " threads never finish, thread " + std::to_string((*stuck)->linear) + " among them";
}

void run_blocks(const LaunchShape& shape, const size_t* numbers, size_t num) {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Cluster>> clusters(num / machine.cluster);
  for (auto& cluster : clusters) cluster = std::make_unique<Cluster>();
  size_t used = 0;
  machine.ready.clear();
  machine.next_ready = 0;
  for (size_t i = 0; i < num; ++i) {
    const size_t n = numbers[i];
    const dim3& grid = machine.grid;
    const uint3 index{static_cast<unsigned>(n % grid.x), static_cast<unsigned>(n / grid.x % grid.y),
                      static_cast<unsigned>(n / grid.x / grid.y)};
    Block& block = *blocks.emplace_back(std::make_unique<Block>(index, shape.dynamic_shared));
    block.cluster = clusters[i / machine.cluster].get();
    block.rank = index.x % machine.cluster;
    block.cluster->blocks.push_back(&block);
    block.cluster->alive += shape.threads;
    for (int t = 0; t < shape.threads; ++t) {
      Thread* thread = pooled_thread(used++);
      thread->block = &block;
      thread->index = {static_cast<unsigned>(t), 0, 0};
      thread->linear = t;
      thread->warp = t / 32;
      thread->lane = t % 32;
      thread->copy_group = 0;
      block.threads.push_back(thread);
      make_ready(thread);
    }
    block.alive = shape.threads;
    ++counters.blocks;
  }
  release(&launch_tag);
  while (!machine.ready.empty() && machine.error.empty()) {
    machine.current = pop_ready();
    machine.current->fiber.switch_from(machine.scheduler);
    machine.current = nullptr;
  }
  acquire(&end_tag);
  for (const auto& block : blocks) {
    count_conflicts(*block);
    if (machine.error.empty() && block->alive > 0) machine.error = deadlock(*block);
    const std::string overrun = block->shared.overrun();
    if (machine.error.empty() && !overrun.empty())
      machine.error = "write behind the end of shared " + overrun;
  }
  for (size_t i = 0; i < used && !machine.error.empty(); ++i) {  // they wait for what never comes
    pool()[i]->copies.clear();
    pool()[i]->fiber.restart(serve);
  }
}

void check_shape(const LaunchShape& shape) {
  const auto leave = shared_leave.find(shape.kernel);
  const size_t shared = leave == shared_leave.end() ? kSharedDefault : leave->second;
  if (shape.threads < 1 || shape.threads > 1024 || shape.grid.x < 1 || shape.grid.y < 1 ||
      shape.grid.z < 1 || shape.grid.x > INT32_MAX || shape.grid.y > 65535 ||
      shape.grid.z > 65535 || shape.dynamic_shared > shared || shape.cluster < 1 ||
      shape.cluster > kClusterLimit || shape.grid.x % shape.cluster != 0) {
    throw Error(std::string(shape.op) + ": invalid launch: grid " + std::to_string(shape.grid.x) +
                " x " + std::to_string(shape.grid.y) + " x " + std::to_string(shape.grid.z) + ", " +
                std::to_string(shape.threads) + " threads, " +
                std::to_string(shape.dynamic_shared) + " bytes of shared memory, of which " +
                std::to_string(shared) + " are allowed, clusters of " +
                std::to_string(shape.cluster));
  }
}

template <class T>
void order(T* values, size_t num) {
  if (machine.order == Order::kReverse) std::reverse(values, values + num);
  for (size_t i = num; machine.order == Order::kRandom && i > 1; --i) {
    std::swap(values[i - 1], values[random_number() % i]);
  }
}

// Those of a cluster in a row; they follow one another along x.
std::vector<size_t> block_order(size_t num) {
  std::vector<size_t> clusters(num / machine.cluster), numbers;
  std::iota(clusters.begin(), clusters.end(), size_t{0});
  order(clusters.data(), clusters.size());
  for (const size_t cluster : clusters) {
    for (size_t i = 0; i < machine.cluster; ++i) numbers.push_back(cluster * machine.cluster + i);
    if (machine.cluster > 1)
      order(numbers.data() + numbers.size() - machine.cluster, machine.cluster);
  }
  return numbers;
}

}  // namespace

void set_order(const std::string& name) {
  static const std::string kRandom = "random:";
  if (name == "forward") {
    machine.order = Order::kForward;
  } else if (name == "reverse") {
    machine.order = Order::kReverse;
  } else if (name.starts_with(kRandom)) {
    machine.order = Order::kRandom;
    machine.seed = std::stoull(name.substr(kRandom.size()));
  } else {
    throw std::invalid_argument("order must be forward, reverse or random:<seed>, got " + name);
  }
}

void allow_dynamic_shared(const void* kernel, size_t bytes) {
  if (bytes > kSharedLimit) {
    throw Error("a block has at most " + std::to_string(kSharedLimit) +
                " bytes of shared memory, asked for " + std::to_string(bytes));
  }
  shared_leave[kernel] = bytes;
}

void launch(const LaunchShape& shape, const std::function<void()>& thread) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  Unchecked unchecked;
  check_shape(shape);
  machine.grid = shape.grid;
  machine.cluster = shape.cluster;
  machine.block = dim3(static_cast<unsigned>(shape.threads));
  body = &thread;
  machine.error.clear();
  machine.random_state = 0x9E3779B97F4A7C15 ^ (machine.seed + 1) * 0xD1342543DE82EF95;
  machine.scheduler.adopt_current();
  ++counters.launches;
  counters.dynamic_shared = std::max<uint64_t>(counters.dynamic_shared, shape.dynamic_shared);
  const std::vector<size_t> numbers =
      block_order(size_t{shape.grid.x} * shape.grid.y * shape.grid.z);
  const size_t few =
      std::max<size_t>(kResidentBlocks / shape.cluster * shape.cluster, shape.cluster);
  const size_t resident = kHasTsan                          ? numbers.size()
                          : machine.order == Order::kRandom ? few
                                                            : shape.cluster;
  for (size_t i = 0; i < numbers.size() && machine.error.empty(); i += resident) {
    run_blocks(shape, &numbers[i], std::min(resident, numbers.size() - i));
  }
  if (!machine.error.empty()) throw Error(std::string(shape.op) + ": " + machine.error);
}

}  // namespace specdec::emu
