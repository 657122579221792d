// cpu/parallel.hpp by torch's own pool.
#include "cpu/parallel.hpp"

#include <torch/csrc/stable/ops.h>

namespace specdec {

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void run_parallel(int64_t num, int64_t grain, void (*body)(void*, int64_t, int64_t),
                  void* context) {
  torch::stable::parallel_for(0, num, grain,
                              [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

}  // namespace specdec
