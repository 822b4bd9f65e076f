// SPDX-License-Identifier: Apache-2.0
// Kernels for test_simt.py: right ones that use everything there is, and next to each what breaks
// when a part is left out. Each wrong kernel is one line away from being right, and `kWrong` =
// false is that line put right: the checker must complain of the one and not of the other.

#include "simt/simt.h"

namespace iss {
namespace {

constexpr int kThreads = 128;

// out[i] = in[i], by way of what is named; in and out [2 * kThreads] unless said otherwise.
struct Args {
  const float* in;
  float* out;
  uint32_t* flag;  // [1] zero
  int64_t size;
};

template <bool kWrong>
__global__ void skipped_barrier(Args args) {
  const int i = threadIdx.x;
  if (!kWrong || i < kThreads / 2) __syncthreads();
  args.out[i] = args.in[i];
}

template <bool kWrong>
__global__ void exited_lane(Args args) {
  const int i = threadIdx.x;
  if (kWrong && i == 5) return;
  args.out[i] = __shfl_xor_sync(~0u, args.in[i], 1);
}

// A shuffle brings lanes together, but orders no memory.
template <bool kWrong>
__global__ void shuffle_as_barrier(Args args) {
  SIMT_SHARED(float, shared, [kThreads]);
  const int i = threadIdx.x;
  shared[i] = args.in[i];
  const float other = __shfl_xor_sync(~0u, args.in[i], 1);
  if (!kWrong) __syncwarp();
  args.out[i] = shared[i ^ 1] + other;
}

template <bool kWrong>
__global__ void two_blocks_one_output(Args args) {
  args.out[(kWrong ? 0 : blockIdx.x * kThreads) + threadIdx.x] = args.in[threadIdx.x];
}

template <bool kWrong>
__global__ void misaligned_vector(Args args) {
  if (threadIdx.x < 4)
    args.out[threadIdx.x] = reinterpret_cast<const float4*>(args.in + kWrong)[threadIdx.x].x;
}

template <bool kWrong>
__global__ void beyond_dynamic_shared(Args args) {
  SIMT_DYN_SHARED(float, shared);
  const int i = threadIdx.x;
  shared[i] = args.in[i];
  __syncthreads();
  args.out[i] = shared[(i + 1) % (kThreads + kWrong)];
}

template <bool kWrong>
__global__ void beyond_static_shared(Args args) {
  SIMT_SHARED(float, shared, [kThreads]);
  const int i = threadIdx.x;
  shared[i + kWrong] = args.in[i];
  __syncthreads();
  args.out[i] = shared[i];
}

template <bool kWrong>
__global__ void beyond_tensor(Args args) {
  const int i = threadIdx.x;
  args.out[i] = args.in[i == 7 ? args.size - !kWrong : i];
}

template <bool kWrong>
__global__ void before_tensor(Args args) {
  const int i = threadIdx.x;
  args.out[i - kWrong] = args.in[i];
}

template <bool kWrong>
__global__ void two_barriers(Args args) {
  const int i = threadIdx.x;
  if (kWrong && i % 2 == 0)
    __syncthreads();
  else if (kWrong)
    __syncthreads();
  else
    __syncthreads();
  args.out[i] = args.in[i];
}

template <bool kWrong>
__global__ void atomic_and_plain(Args args) {
  atomicAdd(&args.flag[0], 1u);
  if (!kWrong) __syncthreads();
  if (threadIdx.x == 0) args.out[0] = static_cast<float>(args.flag[0]);
}

template <bool kWrong>
__global__ void lane_outside_mask(Args args) {
  const int i = threadIdx.x;
  if (i % 32 < 16) args.out[i] = __shfl_sync(0x0000ffffu, args.in[i], kWrong ? 20 : 10);
}

template <bool kWrong>
__global__ void uninitialised_shared(Args args) {
  SIMT_SHARED(float, shared, [kThreads]);
  const int i = threadIdx.x;
  if (!kWrong || i != 9) shared[i] = args.in[i];
  __syncthreads();
  args.out[i] = shared[i];
}

template <bool kWrong>
__global__ void uninitialised_tensor(Args args) {
  const int i = threadIdx.x;  // the second half of out is never written
  args.out[i] = (kWrong ? args.out + kThreads : args.in)[i];
}

// Neighbouring 16-bit elements of two threads are no race; the same one is.
template <bool kWrong>
__global__ void neighbouring_elements(Args args) {
  auto* out = reinterpret_cast<uint16_t*>(args.out);
  out[threadIdx.x / (kWrong ? 2 : 1)] = 1;
}

// Many readers and then a write: none of them may be forgotten, whichever is last.
template <bool kWrong>
__global__ void write_after_reads(Args args) {
  SIMT_SHARED(float, shared, [1]);
  const int i = threadIdx.x;
  if (i == 0) shared[0] = args.in[0];
  __syncthreads();
  float sum = 0;
  for (int k = 0; k < 3; ++k) sum += shared[0];
  args.out[i] = sum;
  if (kWrong ? i / 32 != 2 : true) __syncwarp();
  if (!kWrong) __syncthreads();
  if (i == 65) shared[0] = sum;
}

template <bool kWrong>
__global__ void copy_in_flight(Args args) {
  SIMT_SHARED(float4, shared, [kThreads]);
  const int i = threadIdx.x;
  if (i < 32) {
    cp_async16(&shared[i], args.in + 4 * i);
    cp_async_commit();
    if (!kWrong) cp_async_wait<0>();
    args.out[i] = shared[i].x;
    cp_async_wait<0>();
  }
}

// cp_async_wait is for a thread's own copies: the others need a barrier.
template <bool kWrong>
__global__ void copy_of_another(Args args) {
  SIMT_SHARED(float4, shared, [kThreads]);
  const int i = threadIdx.x;
  if (i < 64) {
    cp_async16(&shared[i], args.in + 4 * i);
    cp_async_commit();
    cp_async_wait<0>();
  }
  if (!kWrong) __syncthreads();
  if (i < 64) args.out[i] = shared[i ^ 33].x;
}

template <bool kWrong>
__global__ void copy_left_behind(Args args) {
  SIMT_SHARED(float4, shared, [kThreads]);
  const int i = threadIdx.x;
  if (i < 32) cp_async16(&shared[i], args.in + 4 * i);
  cp_async_commit();
  if (!kWrong) cp_async_wait<0>();
  args.out[i] = args.in[i];
}

// A cluster of two: each block reads the other's shared memory.
template <int kWithout>
__device__ __forceinline__ void exchange(const Args& args) {
  SIMT_SHARED(float, shared, [kThreads]);
  const int i = threadIdx.x;
  shared[i] = args.in[blockIdx.x * kThreads + i];
  if (kWithout != 1) cluster_sync();
  args.out[blockIdx.x * kThreads + i] = map_shared(shared, cluster_rank() ^ 1)[i];
  if (kWithout != 2) cluster_sync();
}
template <bool kWrong>
__global__ void exchange_unready(Args args) {
  exchange<kWrong ? 1 : 0>(args);
}
template <bool kWrong>
__global__ void exchange_and_leave(Args args) {
  exchange<kWrong ? 2 : 0>(args);
}

template <bool kWrong>
__global__ void split_cluster_barrier(Args args) {
  SIMT_SHARED(float, shared, [2][kThreads]);
  const int i = threadIdx.x;
  float* theirs = map_shared(&shared[0][0], cluster_rank() ^ 1);
  cluster_sync();
  theirs[i] = args.in[blockIdx.x * kThreads + i];
  cluster_arrive();
  if (kWrong) theirs[kThreads + i] = 1;  // too late for this barrier
  shared[kWrong ? 0 : 1][i] = 2;         // not what the other one writes
  cluster_wait();
  args.out[blockIdx.x * kThreads + i] = shared[0][i];
}

// Lanes 0 to 7 go round the loop once more than the others, and the barrier is for all together.
template <bool kWrong>
__global__ void diverged_lanes(Args args) {
  for (int i = threadIdx.x % 32; i < 40; i += 32)
    if (i < 32) args.out[blockIdx.x * kThreads + threadIdx.x] = args.in[threadIdx.x];
  if (!kWrong) __syncwarp();
  cluster_arrive();
  cluster_wait();
}

template <bool kWrong>
__global__ void neighbour_through_grid(Args args) {
  const int i = threadIdx.x;
  args.out[blockIdx.x * kThreads + i] = args.in[blockIdx.x * kThreads + i];
  if (!kWrong) grid_sync();
  const float other = load_l2(args.out + (blockIdx.x ^ 1) * kThreads + i);
  grid_sync();
  args.out[blockIdx.x * kThreads + i] = other;
}

// The same through a counter of arrivals.
template <bool kRelease, bool kAcquire>
__device__ __forceinline__ void neighbour_through_flag(const Args& args) {
  const int i = threadIdx.x;
  args.out[blockIdx.x * kThreads + i] = args.in[blockIdx.x * kThreads + i];
  __syncthreads();
  if (i == 0) {
    if (kRelease)
      add_release(args.flag, 1);
    else
      atomicAdd(args.flag, 1u);
    while ((kAcquire ? load_acquire(args.flag) : atomicAdd(args.flag, 0u)) < gridDim.x) spin_hint();
  }
  __syncthreads();
  const float other = load_l2(args.out + (blockIdx.x ^ 1) * kThreads + i);
  grid_sync();
  args.out[blockIdx.x * kThreads + i] = other;
}
template <bool kWrong>
__global__ void relaxed_release(Args args) {
  neighbour_through_flag<!kWrong, true>(args);
}
template <bool kWrong>
__global__ void relaxed_acquire(Args args) {
  neighbour_through_flag<true, !kWrong>(args);
}

template <bool kWrong>
__global__ void endless_spin(Args args) {
  if (threadIdx.x == 0) {
    if (!kWrong) add_release(args.flag, 1);
    while (load_acquire(args.flag) < gridDim.x) spin_hint();
  }
}

template <bool kWrong>
__global__ void read_only_but_written(Args args) {
  const int i = threadIdx.x;
  if (kWrong) args.out[i] = args.in[i];
  __syncthreads();
  args.out[kThreads + i] = __ldg(kWrong ? args.out + (i ^ 1) : args.in + i);
}

// Matrix products of one warp: ldmatrix, mma; a [16, K] and b [8, K] of T, d [16, 8].
template <typename T>
__global__ void product(const T* a, const T* b, float* d) {
  constexpr int kRow = 32 / sizeof(T);  // of 32 bytes, in chunks of 16
  SIMT_SHARED(uint4, shared, [24][2]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 48; i += 32) {
    const T* from = i < 32 ? a + i * (kRow / 2) : b + (i - 32) * (kRow / 2);
    cp_async16(&shared[i / 2][i % 2], from);
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  uint32_t a_words[4], b_words[2];
  ldmatrix_x4(a_words, &shared[lane % 16][lane / 16]);
  ldmatrix_x2(b_words, &shared[16 + lane % 8][lane / 8 % 2]);
  float sums[4] = {};
  if constexpr (sizeof(T) == 4)
    mma_m16n8k8_tf32(sums, a_words, b_words);
  else
    mma_m16n8k16<T>(sums, a_words, b_words);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// A warp's names: for each lane, what it gets.
__global__ void warp_functions(const int* in, int* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_sync(~0u, in[lane], 3);
  out[32 + lane] = __shfl_sync(~0u, in[lane], 3, 8);
  out[64 + lane] = __shfl_xor_sync(~0u, in[lane], 5);
  out[96 + lane] = __shfl_down_sync(~0u, in[lane], 2);
  out[128 + lane] = __shfl_up_sync(~0u, in[lane], 2, 16);
  out[160 + lane] = static_cast<int>(__ballot_sync(~0u, in[lane] % 3 == 0));
}

// Where each thread of a launch is.
__global__ void coordinates(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * threads + thread] = static_cast<int>(thread + cluster_rank() * 1000);
}

// float32 sums in an order that is fixed, over all blocks: the same bits whatever runs first.
__global__ void ordered_sum(const float* in, float* sums, uint32_t* flag, float* out) {
  SIMT_SHARED(float, shared, [kThreads]);
  const int i = threadIdx.x;
  shared[i] = in[blockIdx.x * kThreads + i];
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (i < half) shared[i] += shared[i + half];
  }
  if (i != 0) return;
  sums[blockIdx.x] = shared[0];
  add_release(flag, 1);
  if (blockIdx.x != 0) return;
  while (load_acquire(flag) < gridDim.x) spin_hint();
  float sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += load_l2(sums + block);
  out[0] = sum;
}

struct Geometry {
  unsigned blocks;
  bool cooperative;
  unsigned cluster;
};
constexpr Geometry kOneBlock = {1, false, 1}, kTwoBlocks = {2, false, 1}, kGrid = {2, true, 1},
                   kCluster = {2, false, 2};

}  // namespace
}  // namespace iss

using iss::Args;

#define SAMPLE(name, geometry)                                                            \
  extern "C" __attribute__((visibility("default"))) int name(                             \
      bool wrong, const float* in, float* out, uint32_t* flag, int64_t size) {            \
    constexpr iss::Geometry g = iss::geometry;                                            \
    return iss::simt::launch(wrong ? iss::name<true> : iss::name<false>, dim3(g.blocks),  \
                             dim3(iss::kThreads), iss::kThreads * sizeof(float), nullptr, \
                             g.cooperative, g.cluster, Args{in, out, flag, size});        \
  }
SAMPLE(skipped_barrier, kOneBlock)
SAMPLE(exited_lane, kOneBlock)
SAMPLE(shuffle_as_barrier, kOneBlock)
SAMPLE(two_blocks_one_output, kTwoBlocks)
SAMPLE(misaligned_vector, kOneBlock)
SAMPLE(beyond_dynamic_shared, kOneBlock)
SAMPLE(beyond_static_shared, kOneBlock)
SAMPLE(beyond_tensor, kOneBlock)
SAMPLE(before_tensor, kOneBlock)
SAMPLE(two_barriers, kOneBlock)
SAMPLE(atomic_and_plain, kOneBlock)
SAMPLE(lane_outside_mask, kOneBlock)
SAMPLE(uninitialised_shared, kOneBlock)
SAMPLE(uninitialised_tensor, kOneBlock)
SAMPLE(neighbouring_elements, kOneBlock)
SAMPLE(write_after_reads, kOneBlock)
SAMPLE(copy_in_flight, kOneBlock)
SAMPLE(copy_of_another, kOneBlock)
SAMPLE(copy_left_behind, kOneBlock)
SAMPLE(exchange_unready, kCluster)
SAMPLE(exchange_and_leave, kCluster)
SAMPLE(split_cluster_barrier, kCluster)
SAMPLE(diverged_lanes, kCluster)
SAMPLE(neighbour_through_grid, kGrid)
SAMPLE(relaxed_release, kGrid)
SAMPLE(relaxed_acquire, kGrid)
SAMPLE(endless_spin, kOneBlock)
SAMPLE(read_only_but_written, kOneBlock)

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int product_bfloat16(const iss::Bfloat16* a, const iss::Bfloat16* b, float* d) {
  return iss::simt::launch(iss::product<iss::Bfloat16>, 1, 32, 0, nullptr, false, 1, a, b, d);
}
EXPORT int product_float16(const iss::Float16* a, const iss::Float16* b, float* d) {
  return iss::simt::launch(iss::product<iss::Float16>, 1, 32, 0, nullptr, false, 1, a, b, d);
}
EXPORT int product_tf32(const float* a, const float* b, float* d) {
  return iss::simt::launch(iss::product<float>, 1, 32, 0, nullptr, false, 1, a, b, d);
}
EXPORT int warp_functions(const int* in, int* out) {
  return iss::simt::launch(iss::warp_functions, 1, 32, 0, nullptr, false, 1, in, out);
}
EXPORT int coordinates(int* out, unsigned cluster) {
  return iss::simt::launch(iss::coordinates, dim3(4, 3, 2), dim3(5, 2, 3), 0, nullptr, false,
                           cluster, out);
}
EXPORT int ordered_sum(const float* in, float* sums, uint32_t* flag, float* out, unsigned blocks) {
  return iss::simt::launch(iss::ordered_sum, blocks, iss::kThreads, 0, nullptr, true, 1, in, sums,
                           flag, out);
}
EXPORT int launch_as(unsigned blocks, unsigned threads, size_t shared_bytes, bool cooperative,
                     unsigned cluster, int* out) {
  return iss::simt::launch(iss::coordinates, blocks, threads, shared_bytes, nullptr, cooperative,
                           cluster, out);
}
EXPORT int launch_grid(unsigned x, unsigned y, unsigned z, int* out) {
  return iss::simt::launch(iss::coordinates, dim3(x, y, z), 32, 0, nullptr, false, 1, out);
}
EXPORT unsigned round_to_tf32(float x) { return iss::to_tf32(x); }
