// SPDX-License-Identifier: Apache-2.0
// What the two kernels that walk a sequence share: which rows run at a step, how shared memory is
// filled, how the blocks of a group wait for each other, and how a plan's kernel is found.
#pragma once

#include "cuda/cell.h"
#include "cuda/product.h"

namespace iss {

// Rows [first, first + n) of N, those of the batch that run at a step.
struct StepRows {
  int64_t first;
  int n;
};

// The steps of a sequence, at least one, in the order of the layer or back.
template <bool back>
class Walk {
 public:
  StepRows rows;  // of the step it is at

  __device__ __forceinline__ explicit Walk(const Steps& sequence)
      : sequence_(sequence),
        t_(sequence.reverse == back ? 0 : static_cast<int>(sequence.steps) - 1) {
    rows = {int64_t{t_} * sequence.batch, static_cast<int>(sequence.batch)};
    if (sequence.offsets) look_up();
  }
  // Whether the state of row b of the batch, which runs, is zero before the step in the layer's
  // order.
  __device__ __forceinline__ bool cuts(int b) const {
    return sequence_.cuts && sequence_.cuts[rows.first + b];
  }
  __device__ __forceinline__ bool is_last() const {
    return t_ == (sequence_.reverse == back ? sequence_.steps - 1 : 0);
  }
  // To the step that follows, which must be there.
  __device__ __forceinline__ void go_on() {
    const bool up = sequence_.reverse == back;
    t_ += up ? 1 : -1;
    rows.first += up ? sequence_.batch : -sequence_.batch;
    if (sequence_.offsets) look_up();
  }

 private:
  __device__ __forceinline__ void look_up() {
    rows.first = sequence_.offsets[t_];
    rows.n = static_cast<int>(sequence_.offsets[t_ + 1] - rows.first);
  }

  const Steps& sequence_;  // the kernel's argument: in no register
  int t_;
};

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

  __device__ __forceinline__ Group(const LayerTiles& tiles, uint32_t* all_arrivals)
      : index(tier == Tier::kBlock ? blockIdx.x : blockIdx.x / tiles.blocks),
        rank(tier == Tier::kBlock ? 0 : blockIdx.x % tiles.blocks),
        blocks(tier == Tier::kBlock ? 1 : tiles.blocks),
        arrivals(all_arrivals + (tier == Tier::kGrid ? index : 0)),
        expected(0) {}

  // What any thread of the group wrote before arrive(), all of them see after wait(). What is
  // stored between the two is nobody's business: nobody waits until it has reached memory.
  // Counters only grow, so that none is ever reset while somebody still waits for it.
  __device__ __forceinline__ void arrive() {
    if constexpr (tier == Tier::kCluster) {
      __syncwarp();  // here and below: the barrier is for lanes that are together
      cluster_arrive();
    } else {
      __syncthreads();
      if constexpr (tier == Tier::kGrid) {
        expected += blocks;
        if (threadIdx.x == 0) add_release(arrivals, 1);
      }
    }
  }
  __device__ __forceinline__ void wait() {
    if constexpr (tier == Tier::kCluster) {
      __syncwarp();
      cluster_wait();
    }
    if constexpr (tier == Tier::kGrid) {
      if (threadIdx.x == 0)
        while (static_cast<int32_t>(load_acquire(arrivals) - expected) < 0) spin_hint();
      __syncthreads();
    }
  }
  __device__ __forceinline__ void sync() {
    arrive();
    wait();
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
using SequenceKernel = void (*)(Args, LayerTiles);

template <Math kMath, Tier kTier, int kRowsOfPass>
struct Variant {
  static constexpr Math math = kMath;
  static constexpr Tier tier = kTier;
  static constexpr int rows = kRowsOfPass;
};

// f(the Variant that a plan of T's asks for).
template <Math math, Tier tier, typename F>
auto with_rows(int rows, F f) {
  if constexpr (uses_tensor_cores(math)) {
    if (rows == 8) return f(Variant<math, tier, 8>{});
    if (rows >= 16) return f(Variant<math, tier, 16>{});
  } else {
    if (rows == 1) return f(Variant<math, tier, 1>{});
    if (rows == 2) return f(Variant<math, tier, 2>{});
    if constexpr (pass_rows(math) == 8)
      if (rows >= 8) return f(Variant<math, tier, 8>{});
  }
  return f(Variant<math, tier, 4>{});
}
template <Math math, typename F>
auto with_tier(const LayerPlan& plan, F f) {
  switch (plan.tier) {
    case Tier::kBlock:
      return with_rows<math, Tier::kBlock>(plan.rows, f);
    case Tier::kCluster:
      return with_rows<math, Tier::kCluster>(plan.rows, f);
    default:
      return with_rows<math, Tier::kGrid>(plan.rows, f);
  }
}
template <typename T, typename F>
auto with_kernel(const LayerPlan& plan, F f) {
  if constexpr (std::is_same_v<T, float>)
    if (plan.math == Math::kTf32) return with_tier<Math::kTf32>(plan, f);
  return with_tier<MathOf<T>::value>(plan, f);
}

template <typename Args>
int launch_sequence(SequenceKernel<Args> kernel, const LayerPlan& plan, const Args& args,
                    CudaStream stream) {
  return simt::launch(kernel, dim3(plan.blocks * plan.groups), dim3(plan.threads),
                      plan.shared_bytes, static_cast<cudaStream_t>(stream),
                      plan.tier == Tier::kGrid, plan.tier == Tier::kCluster ? plan.blocks : 1, args,
                      tiles_of(plan));
}

// Blocks of a group must all be resident, for they wait for each other; and so must all groups of a
// plan, or the last ones begin when the first are done.
template <typename Args>
bool fits_device(SequenceKernel<Args> kernel, const LayerPlan& plan) {
  const int resident = simt::resident_blocks(kernel, plan.threads, plan.shared_bytes,
                                             plan.tier == Tier::kCluster ? plan.blocks : 1);
  return resident >= (plan.tier == Tier::kBlock ? 1 : plan.blocks * plan.groups);
}

}  // namespace iss
