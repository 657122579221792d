#include "planted.hpp"

#include <cstdio>
#include <memory>

#include "../../csrc/cuda/portability.cuh"

namespace specdec {
namespace {

constexpr int kThreads = 64;

struct Buffers {
  int32_t* out;       // [kThreads]
  const int32_t* in;  // [4 kThreads]
  int32_t* counter;   // [1]
};

__device__ int32_t thread() { return static_cast<int32_t>(threadIdx.x); }
__device__ int32_t neighbour() { return (thread() + 33) % kThreads; }

__global__ void missing_barrier(Buffers b) {
  SPECDEC_SHARED(int32_t, tile, [kThreads]);
  tile[thread()] = b.in[thread()];
  b.out[thread()] = tile[neighbour()];
}

__global__ void with_barrier(Buffers b) {
  SPECDEC_SHARED(int32_t, tile, [kThreads]);
  tile[thread()] = b.in[thread()];
  __syncthreads();
  b.out[thread()] = tile[neighbour()];
}

__global__ void missing_warp_barrier(Buffers b) {
  SPECDEC_SHARED(int32_t, tile, [kThreads]);
  tile[thread()] = b.in[thread()];
  b.out[thread()] = tile[thread() ^ 1];
}

__global__ void with_warp_barrier(Buffers b) {
  SPECDEC_SHARED(int32_t, tile, [kThreads]);
  tile[thread()] = b.in[thread()];
  __syncwarp();
  b.out[thread()] = tile[thread() ^ 1];
}

// A cp.async pipeline of two stages that sums four tiles; the flags take out one guard each.
template <bool kWaits, bool kGuardsReuse>
__global__ void pipeline(Buffers b) {
  SPECDEC_SHARED(int32_t, tiles, [2][kThreads]);
  const auto fetch = [&](int32_t tile) {
    if (tile < 4 && thread() < kThreads / 4) {
      cp_async16(&tiles[tile % 2][4 * thread()], b.in + tile * kThreads + 4 * thread());
    }
    cp_async_commit();
  };
  int32_t total = 0;
  fetch(0);
  for (int32_t tile = 0; tile < 4; ++tile) {
    fetch(tile + 1);
    if (kWaits) cp_async_wait<1>();
    __syncthreads();
    total += tiles[tile % 2][neighbour()];
    if (kGuardsReuse) __syncthreads();
  }
  cp_async_wait<0>();
  b.out[thread()] = total;
}

__global__ void copy_under_way_at_the_end(Buffers b) {
  SPECDEC_SHARED(int32_t, tile, [4 * kThreads]);
  cp_async16(tile + 4 * thread(), b.in + 4 * thread());
  cp_async_commit();
}

__global__ void misaligned_copy(Buffers b) {
  SPECDEC_SHARED(int32_t, tile, [4 * kThreads]);
  if (thread() == 0) cp_async16(tile, b.in + 1);
  cp_async_commit();
  cp_async_wait<0>();
}

__global__ void misaligned_load(Buffers b) {
  b.out[thread()] = load_global(reinterpret_cast<const int4*>(b.in + 1)).x;
}

__global__ void misaligned_pointer(Buffers b) {
  b.out[thread()] = reinterpret_cast<const int4*>(b.in + 1)->x;
}

__global__ void global_out_of_bounds(Buffers b) {
  b.out[thread()] = b.in[3 * kThreads + thread() + 1];
}

__global__ void copy_out_of_bounds(Buffers b) {
  SPECDEC_SHARED(int32_t, tile, [4 * kThreads]);
  cp_async16(tile + 4 * thread(), b.in + 4 * thread() + 4);
  cp_async_commit();
  cp_async_wait<0>();
}

__global__ void shared_out_of_bounds(Buffers b) {
  SPECDEC_SHARED(int32_t, tile, [kThreads]);
  (&tile[0])[thread() + 1] = b.in[thread()];
  __syncthreads();
  b.out[thread()] = tile[thread()];
}

__global__ void uninitialised_shared(Buffers b) {
  SPECDEC_SHARED(int32_t, tile, [kThreads]);
  if (thread() < 16) tile[thread()] = b.in[thread()];
  __syncthreads();
  b.out[thread()] = tile[neighbour()];
}

__global__ void blocks_race(Buffers b) { b.out[0] = static_cast<int32_t>(blockIdx.x); }

__global__ void wide_store_race(Buffers b) {
  SPECDEC_SHARED(int4, tile, [1]);
  tile[0] = int4{thread(), 0, 0, 0};
  __syncthreads();
  b.out[thread()] = tile[0].x;
}

// The last block to come adds what all have written.
__global__ void last_block(Buffers b) {
  SPECDEC_SHARED(int32_t, is_last, [1]);
  if (thread() == 0) {
    b.out[blockIdx.x] = b.in[blockIdx.x];
    __threadfence();
    is_last[0] = atomicAdd(b.counter, 1) == static_cast<int32_t>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  if (is_last[0] == 0 || thread() > 0) return;
  int32_t total = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) total += b.out[i];
  b.out[0] = total;
}

__global__ void divergent_barrier(Buffers b) {
  if (thread() < 32) {
    __syncthreads();
  } else {
    b.out[0] = 1;
    __syncthreads();
  }
}

__global__ void ended_before_a_barrier(Buffers b) {
  if (thread() >= 32) return;
  __syncthreads();
  b.out[thread()] = 1;
}

__global__ void lane_outside_of_its_mask(Buffers b) {
  b.out[thread()] = __shfl_sync(0xFFFFu, 1, 0);
}

__global__ void shuffle_from_outside_of_the_mask(Buffers b) {
  if (thread() % 32 < 16) b.out[thread()] = __shfl_sync(0xFFFFu, 1, 20);
}

__global__ void missing_lanes(Buffers b) {
  if (thread() % 2 == 0) b.out[thread()] = __shfl_xor_sync(~0u, 1, 2);
}

__global__ void different_warp_operations(Buffers b) {
  b.out[thread()] = thread() % 32 < 16 ? __shfl_sync(~0u, 1, 0) : __any_sync(~0u, 1);
}

__global__ void warp_waits_for_a_barrier(Buffers b) {
  if (thread() % 2 == 0) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  b.out[thread()] = 1;
}

// Blocks of a cluster pass numbers around, through global memory.
template <bool kWaits>
__global__ void cluster_exchange(Buffers b) {
  const unsigned rank = cluster_rank(), next = (rank + 1) % cluster_size();
  const unsigned first = blockIdx.x - rank;
  if (thread() == 0) b.out[blockIdx.x] = b.in[rank + 1];
  if (kWaits) cluster_sync();
  if (thread() == 0) b.out[8 + blockIdx.x] = b.out[first + next];
}

__global__ void divergent_cluster_barrier(Buffers b) {
  if (thread() < 32) {
    cluster_sync();
  } else {
    b.out[thread()] = 1;
    cluster_sync();
  }
}

__global__ void block_ended_before_a_cluster_barrier(Buffers b) {
  if (cluster_rank() == 1) return;
  cluster_sync();
  b.out[thread()] = 1;
}

// Columns of a matrix whose rows are 32 words, all in one bank, or 33.
template <int kWords>
__global__ void store_columns(Buffers b) {
  SPECDEC_SHARED(int32_t, tile, [kWords * kThreads]);
  store_shared(tile + kWords * thread(), b.in[thread()]);
  __syncthreads();
  const int32_t of_all = load_shared(tile);  // one word for all lanes: no conflict
  b.out[thread()] = thread() == 0 ? of_all : tile[kWords * thread()];
}

__global__ void copy_columns(Buffers b) {
  SPECDEC_SHARED(int32_t, tile, [32 * kThreads]);
  cp_async16(tile + 32 * thread(), b.in + 4 * (thread() % 16));
  cp_async_commit();
  cp_async_wait<0>();
  b.out[thread()] = tile[32 * thread()];
}

// Prints a sum of what came out, as the reader of a wrong result would see it.
std::function<void()> run(const char* name, void (*kernel)(Buffers), unsigned blocks = 1,
                          size_t dynamic_shared = 0, unsigned cluster = 1) {
  return [=] {
    const auto out = std::make_unique<int32_t[]>(kThreads);
    const auto in = std::make_unique<int32_t[]>(4 * kThreads);
    for (int32_t i = 0; i < 4 * kThreads; ++i) in[i] = i;
    int32_t counter = 0;
    const Buffers buffers{out.get(), in.get(), &counter};
    if (cluster > 1) {
      launch_clusters(name, kernel, dim3(blocks), kThreads, cluster, nullptr, buffers);
    } else {
      launch(name, kernel, dim3(blocks), kThreads, dynamic_shared, nullptr, buffers);
    }
    int64_t sum = 0;
    for (int32_t i = 0; i < kThreads; ++i) sum += out[i];
    std::printf("sum %ld\n", sum);
  };
}

}  // namespace

std::map<std::string, std::function<void()>> planted_faults() {
#define SPECDEC_PLANTED(kernel, ...)             \
  {                                              \
    #kernel, run(#kernel, kernel, ##__VA_ARGS__) \
  }
  return {
      SPECDEC_PLANTED(missing_barrier),
      SPECDEC_PLANTED(with_barrier),
      SPECDEC_PLANTED(missing_warp_barrier),
      SPECDEC_PLANTED(with_warp_barrier),
      {"pipeline", run("pipeline", pipeline<true, true>)},
      {"missing_wait", run("missing_wait", pipeline<false, true>)},
      {"write_after_read", run("write_after_read", pipeline<true, false>)},
      SPECDEC_PLANTED(copy_under_way_at_the_end),
      SPECDEC_PLANTED(misaligned_copy),
      SPECDEC_PLANTED(misaligned_load),
      SPECDEC_PLANTED(misaligned_pointer),
      SPECDEC_PLANTED(global_out_of_bounds),
      SPECDEC_PLANTED(copy_out_of_bounds),
      SPECDEC_PLANTED(shared_out_of_bounds),
      SPECDEC_PLANTED(uninitialised_shared),
      SPECDEC_PLANTED(blocks_race, 4),
      SPECDEC_PLANTED(wide_store_race),
      SPECDEC_PLANTED(last_block, 8),
      SPECDEC_PLANTED(divergent_barrier),
      SPECDEC_PLANTED(ended_before_a_barrier),
      SPECDEC_PLANTED(lane_outside_of_its_mask),
      SPECDEC_PLANTED(shuffle_from_outside_of_the_mask),
      SPECDEC_PLANTED(missing_lanes),
      SPECDEC_PLANTED(different_warp_operations),
      SPECDEC_PLANTED(warp_waits_for_a_barrier),
      {"cluster_exchange", run("cluster_exchange", cluster_exchange<true>, 4, 0, 2)},
      {"missing_cluster_barrier", run("missing_cluster_barrier", cluster_exchange<false>, 4, 0, 2)},
      SPECDEC_PLANTED(divergent_cluster_barrier, 2, 0, 2),
      SPECDEC_PLANTED(block_ended_before_a_cluster_barrier, 2, 0, 2),
      {"padded_columns", run("padded_columns", store_columns<33>)},
      {"bank_conflicts_of_stores", run("bank_conflicts_of_stores", store_columns<32>)},
      {"bank_conflicts_of_copies", run("bank_conflicts_of_copies", copy_columns)},
      {"too_much_shared_memory", run("too_much_shared_memory", with_barrier, 1, 49 << 10)},
  };
#undef SPECDEC_PLANTED
}

}  // namespace specdec
