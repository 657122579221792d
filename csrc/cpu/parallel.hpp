// The thread pool of the host framework, without its headers.
#pragma once

#include <cstdint>
#include <type_traits>

namespace specdec {

int num_threads();

// Runs `body(context, begin, end)` over disjoint ranges that cover [0, num), each of at least
// `grain` items but the last.
void run_parallel(int64_t num, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);

template <class Body>
void parallel_for(int64_t num, int64_t grain, const Body& body) {
  if (num <= 0) return;
  if (num <= grain) return body(0, num);
  run_parallel(
      num, grain,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<std::remove_const_t<Body>*>(&body));
}

// Fewest that are worth a thread of values that take some arithmetic each.
constexpr int64_t kValuesPerThread = 16384;

// Fewest rows of `size` values that are worth a thread, whose start costs some microseconds: so
// many values, which are read and little more unless said otherwise.
constexpr int64_t rows_per_thread(int64_t size, int64_t values = 65536) {
  return 1 + values / (size + 1);
}

}  // namespace specdec
