// SPDX-License-Identifier: Apache-2.0
// What the two kernels that walk a sequence share: which rows run at a step, how shared memory is
// filled, how the blocks of a group wait for each other.
#pragma once

#include "cuda/product.h"

namespace iss {

// Rows [first, first + n) of N, those of the batch that run at a step of the walk.
struct StepRows {
  int64_t first;
  int n;
};
__device__ __forceinline__ StepRows rows_at(const Steps& sequence, int64_t step) {
  const int64_t t = sequence.reverse ? sequence.steps - 1 - step : step;
  if (!sequence.offsets) return {t * sequence.batch, static_cast<int>(sequence.batch)};
  const int64_t first = sequence.offsets[t];
  return {first, static_cast<int>(sequence.offsets[t + 1] - first)};
}

// Sigmoid and tanh. Where products round their operands to 11 bits or fewer, to 3e-7 absolutely:
// a quarter of the instructions, which otherwise take as long as the product.
template <Math math, typename W>
__device__ __forceinline__ W sigmoid_for(W x) {
  if constexpr (uses_tensor_cores(math))
    return quotient(1.0f, 1.0f + __expf(-x));
  else
    return sigmoid(x);
}
template <Math math, typename W>
__device__ __forceinline__ W tanh_for(W x) {
  if constexpr (uses_tensor_cores(math))
    return 1.0f - quotient(2.0f, 1.0f + __expf(2.0f * x));
  else
    return tanh(x);
}

// Writes rows x chunks; get(row, element) is an operand. Lanes walk along a row, or, by_column,
// down a column: whichever is contiguous where `get` reads.
template <Math math, bool by_column, typename Get>
__device__ __forceinline__ void fill(uint4* to, int rows, int chunks, int stride, Get get) {
  using C = Chunk<Element<math>>;
#pragma unroll 2
  for (int i = threadIdx.x; i < rows * chunks; i += blockDim.x) {
    const int row = by_column ? i % rows : i / chunks;
    const int chunk = by_column ? i / rows : i % chunks;
    C values;
#pragma unroll
    for (int e = 0; e < C::kSize; ++e) values.values[e] = get(row, chunk * C::kSize + e);
    to[row * stride + chunk] = __builtin_bit_cast(uint4, values);
  }
}

// The blocks that share some rows of the batch, and all their threads.
template <Tier tier>
struct Group {
  int index, rank;     // of the group; of this block in it
  int blocks;          // of a group
  uint32_t* arrivals;  // of the group; Tier::kGrid alone
  uint32_t expected;

  __device__ __forceinline__ Group(const LstmTiles& tiles, uint32_t* all_arrivals)
      : index(blockIdx.x / tiles.blocks),
        rank(blockIdx.x % tiles.blocks),
        blocks(tiles.blocks),
        arrivals(all_arrivals + (tier == Tier::kGrid ? index : 0)),
        expected(0) {}

  // What any thread of the group wrote before, all of them see afterwards. Counters only grow, so
  // that none is ever reset while somebody still waits for it.
  __device__ __forceinline__ void sync() {
    if constexpr (tier == Tier::kBlock) {
      __syncthreads();
    } else if constexpr (tier == Tier::kCluster) {
      cluster_sync();
    } else {
      expected += blocks;
      __syncthreads();
      if (threadIdx.x == 0) {
        add_release(arrivals, 1);
        while (static_cast<int32_t>(load_acquire(arrivals) - expected) < 0) spin_hint();
      }
      __syncthreads();
    }
  }

  // The same for shared memory alone, of which Tier::kGrid's blocks have none in common.
  __device__ __forceinline__ void sync_shared() {
    if constexpr (tier == Tier::kGrid)
      __syncthreads();
    else
      sync();
  }
};

// The Math of T's kernels, or, for float, the one of the two that a plan asks for.
template <typename T>
struct MathOf;
template <>
struct MathOf<float> {
  static constexpr Math value = Math::kFloat32;
};
template <>
struct MathOf<double> {
  static constexpr Math value = Math::kFloat64;
};
template <>
struct MathOf<Bfloat16> {
  static constexpr Math value = Math::kBfloat16;
};
template <>
struct MathOf<Float16> {
  static constexpr Math value = Math::kFloat16;
};

template <typename Args>
using SequenceKernel = void (*)(Args, LstmTiles);

template <typename Args>
int launch_sequence(SequenceKernel<Args> kernel, const LstmPlan& plan, const Args& args,
                    CudaStream stream) {
  return simt::launch(kernel, dim3(plan.blocks * plan.groups), dim3(plan.threads),
                      plan.shared_bytes, static_cast<cudaStream_t>(stream),
                      plan.tier == Tier::kGrid, plan.tier == Tier::kCluster ? plan.blocks : 1, args,
                      tiles_of(plan));
}

// Blocks of a group must all be resident: they wait for each other.
template <typename Args>
bool fits_device(SequenceKernel<Args> kernel, const LstmPlan& plan) {
  const int resident = simt::resident_blocks(kernel, plan.threads, plan.shared_bytes,
                                             plan.tier == Tier::kCluster ? plan.blocks : 1);
  return resident >= (plan.tier == Tier::kGrid ? plan.blocks * plan.groups : plan.blocks);
}

// X(T) for every T there are kernels for; a build may define it shorter.
#ifndef ISS_LSTM_INSTANCES
#define ISS_LSTM_INSTANCES(X) X(float) X(double) X(Bfloat16) X(Float16)
#endif

}  // namespace iss
