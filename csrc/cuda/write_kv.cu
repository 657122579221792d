// Copies new keys and values into their slots. A group of neighbouring threads owns one row: one
// head of one node, of K or of V. Blocks of one request share its rows. Every byte is read once and
// written once; nodes without a slot, and pages outside of the cache, are dropped.
#include "../core/write_kv.hpp"

#include "../cpu/error.hpp"
#include "kernels.hpp"
#include "unit_rows.cuh"

namespace specdec::cuda {
namespace {

constexpr int kBlockThreads = 256;
constexpr int64_t kMaxBlocksPerRequest = 65535;

struct WriteKvUnits {
  UnitView k_cache, v_cache;
  UnitView k, v;  // nodes in place of slots
  SlotMap slots;
  const int32_t* lengths;    // [B]
  const int32_t* num_nodes;  // [B]
  int64_t stride_lengths, stride_num_nodes, capacity;
  int32_t nodes, threads_per_row;
};

template <class Unit>
__global__ void __launch_bounds__(kBlockThreads)
    write_kv_kernel(const __grid_constant__ WriteKvUnits params) {
  const int64_t b = blockIdx.x;
  const int32_t num_nodes = min(params.num_nodes[b * params.stride_num_nodes], params.nodes);
  const int64_t length = params.lengths[b * params.stride_lengths];
  const int32_t heads = params.k.heads, rows = num_nodes * heads;
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  const int32_t rows_per_block = kBlockThreads / params.threads_per_row;
  const int32_t first_unit = thread % params.threads_per_row;
  for (int64_t row = int64_t{blockIdx.y} * rows_per_block + thread / params.threads_per_row;
       row < 2 * rows; row += int64_t{gridDim.y} * rows_per_block) {
    const bool is_value = row >= rows;
    const int32_t of_tensor = static_cast<int32_t>(row) - (is_value ? rows : 0);
    const int32_t node = of_tensor / heads, head = of_tensor % heads;
    const Place place = place_of(params.slots, params.capacity, b, length + node);
    if (!place.is_valid) continue;
    const UnitView& source = is_value ? params.v : params.k;
    const UnitView& target = is_value ? params.v_cache : params.k_cache;
    for (int32_t unit = first_unit; unit < source.units; unit += params.threads_per_row) {
      store_global(target.at<Unit>(place.page, head, place.offset, unit),
                   load_global(source.at<Unit>(b, head, node, unit)));
    }
  }
}

int32_t threads_per_row(int32_t units) {
  int32_t threads = 1;
  while (threads < units && threads < kBlockThreads) threads *= 2;
  return threads;
}

}  // namespace

void write_kv(const WriteKvParams& params, Stream stream) {
  const int64_t rows = int64_t{2} * params.nodes * params.k.heads;
  if (params.batch == 0 || rows == 0) return;
  if (rows > INT32_MAX) fail("write_kv: 2 N G must fit in 32 bits, got %ld", rows);
  int64_t unit = 16;
  for (const CacheView* cache : {&params.k, &params.v, &params.k_cache, &params.v_cache}) {
    unit = std::min(unit, widest_unit(*cache, params.dtype));
  }
  const auto units = [&](const CacheView& cache) { return unit_view(cache, params.dtype, unit); };
  const int32_t threads = threads_per_row(std::max(units(params.k).units, units(params.v).units));
  const WriteKvUnits in_units{
      .k_cache = units(params.k_cache),
      .v_cache = units(params.v_cache),
      .k = units(params.k),
      .v = units(params.v),
      .slots = params.slots,
      .lengths = params.lengths,
      .num_nodes = params.num_nodes,
      .stride_lengths = params.stride_lengths,
      .stride_num_nodes = params.stride_num_nodes,
      .capacity = params.capacity,
      .nodes = params.nodes,
      .threads_per_row = threads,
  };
  const int64_t rows_per_block = kBlockThreads / threads;
  const int64_t blocks =
      std::min((rows + rows_per_block - 1) / rows_per_block, kMaxBlocksPerRequest);
  with_unit(unit, [&](auto value) {
    launch("write_kv", write_kv_kernel<decltype(value)>,
           dim3(static_cast<unsigned>(params.batch), static_cast<unsigned>(blocks)), kBlockThreads,
           0, stream, in_units);
  });
}

}  // namespace specdec::cuda
