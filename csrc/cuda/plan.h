// SPDX-License-Identifier: Apache-2.0
// How one LSTM layer is run on a GPU, decided from numbers alone: no CUDA call, so that it is
// tested where there is no GPU and can be asked for any GPU (iss_kernels.explain_plan).
//
// A group of blocks owns some rows of the batch for all time steps. Each block owns some units: it
// keeps their recurrent weights in shared memory, and once a step the blocks of a group exchange
// what the others need (h forward, the gates' gradients backward). Tiers differ in how.
#pragma once

#include <cstdint>
#include <string>

namespace iss {

enum class Tier {
  kBlock,    // a group is one block: the exchange stays in its shared memory
  kCluster,  // a group is a cluster (sm_90 and later): through distributed shared memory
  kGrid,     // blocks anywhere, launched cooperatively: through L2, with a counter of arrivals
  kSteps,    // nothing resident: a GEMM and a fused cell per step; always possible
};

// What products are computed with. Exact float32 and float64 take FMA, the rest tensor cores with
// float32 sums.
enum class Math { kFloat32, kFloat64, kTf32, kBfloat16, kFloat16 };

struct DeviceLimits {
  int major, minor, multiprocessors;
  int64_t shared_bytes;     // that a block can ask for (cudaDevAttrMaxSharedMemoryPerBlockOptin)
  int cluster_blocks = 16;  // of the largest cluster, as far as is known
};

struct LstmProblem {
  int64_t hidden, batch;
  bool projected;
  Math math;
  bool backward;
};

struct LstmPlan {
  Tier tier;
  Math math;
  bool backward;
  int units = 0;               // of a block; a multiple of 8
  int blocks = 0;              // of a group: ceil(H / units)
  int rows = 0;                // of the batch that a group runs at a time
  int groups = 0;              // resident at once; each takes every groups-th tile of rows
  int splits = 0;              // of every sum over K, each taken by other warps
  int threads = 0;             // of a block
  int64_t shared_bytes = 0;    // of a block
  int64_t exchange_bytes = 0;  // global memory for what blocks exchange; Tier::kGrid alone
  std::string why = {};        // one sentence: why this tier, and why not the ones before it
};

LstmPlan plan_lstm(const LstmProblem& problem, const DeviceLimits& device);

// A device that turned out not to hold all blocks of `plan` at once, as far as that tells.
DeviceLimits less_than(const LstmPlan& plan, DeviceLimits device);

}  // namespace iss
