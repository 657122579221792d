// What `verify` returns on request, from what was noted when it decided.
#pragma once

#include "acceptance.cuh"
#include "kernels.hpp"

namespace specdec::cuda {

void score_path(const DecideParams& params, Stream stream);
void write_law(const DecideParams& params, Stream stream);

}  // namespace specdec::cuda
