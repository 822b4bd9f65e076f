// SPDX-License-Identifier: Apache-2.0
// How one recurrent layer is run on a GPU, decided from numbers alone: no CUDA call, so that it is
// tested where there is no GPU and can be asked for any GPU (iss_kernels.explain_plan).
//
// A group of blocks owns some rows of the batch for all time steps. Each block owns some units: it
// keeps their recurrent weights in shared memory, and once a step the blocks of a group exchange
// what the others need (h forward, parts of its gradient backward). Tiers differ in how.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>

namespace iss {

enum class Tier {
  kBlock,    // a group is one block: the exchange stays in its shared memory
  kCluster,  // a group is a cluster (sm_90 and later): through distributed shared memory
  kGrid,     // blocks anywhere, launched cooperatively: through L2, with a counter of arrivals
  kSteps,    // nothing resident: a GEMM and a pointwise kernel per step; always possible
  kOneStep,  // forward, a sequence of a single step: x and h are multiplied in one launch
};

// What products are computed with. Exact float32 and float64 take FMA, the rest tensor cores with
// float32 sums.
enum class Math { kFloat32, kFloat64, kTf32, kBfloat16, kFloat16 };

// Blocks of a cluster: 8 can be had everywhere, 16 on data centre GPUs.
constexpr int kPortableCluster = 8, kLargestCluster = 16;
constexpr bool is_data_centre(int major, int minor) { return minor == 0 && major < 12; }

// [n - 1]: clusters of n blocks that are resident at once, each block with a multiprocessor of its
// own.
using ClusterCounts = std::array<int, kLargestCluster>;

// Those of a device that cannot be asked. A cluster lies within one of the GPU's processing
// clusters; of these it is taken to have one for every 16 multiprocessors, the last with 8. That is
// never too much for an H100 (132 multiprocessors), which holds
//   blocks      2   3   4   5   6   7   8   9  10 ... 16
//   clusters   66  39  30  22  17  15  15   9   7      7
//   estimate   60  37  30  22  15  15  15   7   7      7
constexpr ClusterCounts estimated_clusters(int major, int minor, int multiprocessors) {
  ClusterCounts counts = {};
  const int largest = major < 9                      ? 0
                      : is_data_centre(major, minor) ? kLargestCluster
                                                     : kPortableCluster;
  for (int n = 1; n <= largest; ++n)
    counts[n - 1] = std::max((multiprocessors / 16 - 1) * (16 / n) + 8 / n, 0);
  return counts;
}

struct DeviceLimits {
  int major, minor, multiprocessors;
  int64_t shared_bytes;  // that a block can ask for (cudaDevAttrMaxSharedMemoryPerBlockOptin)
  ClusterCounts clusters = estimated_clusters(major, minor, multiprocessors);
};

constexpr int64_t kManySteps = int64_t{1} << 40;  // so many that what comes before them is nothing

struct LayerProblem {
  int gates;  // G of the cell
  int64_t hidden, batch;
  bool projected;
  Math math;
  bool backward;
  int64_t steps = kManySteps;
};

struct LayerPlan {
  Tier tier;
  Math math;
  bool backward;
  int gates = 0;
  int units = 0;               // of a block; a multiple of 8, forward of units_of_tile
  int blocks = 0;              // of a group: ceil(H / units)
  int rows = 0;                // of the batch that a group runs at a time
  int groups = 0;              // resident at once; each takes every groups-th tile of rows
  int splits = 0;              // of every sum over K, each taken by other warps
  int threads = 0;             // of a block
  int64_t shared_bytes = 0;    // of a block
  int64_t exchange_bytes = 0;  // global memory for what blocks exchange; Tier::kGrid alone
  std::string why = {};        // one sentence: why this tier, and why not the ones before it
};

LayerPlan plan_layer(const LayerProblem& problem, const DeviceLimits& device);

// A device that turned out not to hold all blocks of `plan` at once, as far as that tells.
DeviceLimits less_than(const LayerPlan& plan, DeviceLimits device);

}  // namespace iss
