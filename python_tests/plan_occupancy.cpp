// SPDX-License-Identifier: Apache-2.0
// Asks NVIDIA's occupancy calculator, which needs no GPU, about every plan (test_cuda_plan.py), and
// refuses each of them: what is planned instead is another plan, and in the end one of steps.
#include <cuda_occupancy.h>

#include <algorithm>
#include <cstdio>

#include "cuda/plan.h"

// How many plans there are in all where none can be launched; 0 where that does not end.
int refusals(const iss::LayerProblem& problem, iss::DeviceLimits limits) {
  for (int count = 0; count < 100; ++count) {
    const iss::LayerPlan plan = plan_layer(problem, limits);
    if (plan.tier == iss::Tier::kSteps) return count;
    limits = less_than(plan, limits);
  }
  return 0;
}

int main() {
  struct Gpu {
    iss::DeviceLimits limits;
    int threads, shared;  // of a multiprocessor
  };
  const Gpu gpus[] = {
      {{8, 0, 108, 163 * 1024}, 2048, 164 * 1024}, {{8, 6, 72, 99 * 1024}, 1536, 100 * 1024},
      {{9, 0, 132, 227 * 1024}, 2048, 228 * 1024}, {{10, 0, 148, 227 * 1024}, 2048, 228 * 1024},
      {{12, 0, 170, 99 * 1024}, 1536, 100 * 1024},
  };
  int asked = 0, most_refused = 0;
  for (const Gpu& gpu : gpus)
    for (int math = 0; math < 5; ++math)
      for (const bool backward : {false, true})
        for (const int gates : {4, 3, 1})
          for (const int batch : {1, 16, 128})
            for (int hidden = 1; hidden < 1600; hidden += hidden < 64 ? 3 : gates == 4 ? 29 : 97) {
              const iss::LayerProblem problem = {
                  gates, hidden, batch, false, static_cast<iss::Math>(math), backward};
              const iss::LayerPlan plan = plan_layer(problem, gpu.limits);
              if (plan.tier == iss::Tier::kSteps) continue;
              const int refused = refusals(problem, gpu.limits);
              if (refused == 0) {
                std::printf("%d.%d H %d, batch %d: no end\n", gpu.limits.major, gpu.limits.minor,
                            hidden, batch);
                return 1;
              }
              most_refused = std::max(most_refused, refused);
              cudaOccDeviceProp device;
              device.computeMajor = gpu.limits.major;
              device.computeMinor = gpu.limits.minor;
              device.maxThreadsPerBlock = 1024;
              device.maxThreadsPerMultiprocessor = gpu.threads;
              device.regsPerBlock = device.regsPerMultiprocessor = 65536;
              device.warpSize = 32;
              device.sharedMemPerBlock = 48 * 1024;
              device.sharedMemPerBlockOptin = gpu.limits.shared_bytes;
              device.sharedMemPerMultiprocessor = gpu.shared;
              device.reservedSharedMemPerBlock = 1024;
              device.numSms = gpu.limits.multiprocessors;
              cudaOccFuncAttributes kernel = {};
              kernel.maxThreadsPerBlock = 1024;
              // What __launch_bounds__ lets the compiler use.
              kernel.numRegs = plan.math == iss::Math::kFloat64 ? 255 : 128;
              kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
              kernel.maxDynamicSharedSizeBytes = gpu.limits.shared_bytes;
              cudaOccDeviceState state;
              cudaOccResult result;
              const cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(
                  &result, &device, &kernel, &state, plan.threads, plan.shared_bytes);
              ++asked;
              if (error != CUDA_OCC_SUCCESS || result.activeBlocksPerMultiprocessor < 1) {
                std::printf("%d.%d H %d, batch %d: %s\n", gpu.limits.major, gpu.limits.minor,
                            hidden, batch, plan.why.c_str());
                return 1;
              }
            }
  std::printf("%d plans, up to %d refused\n", asked, most_refused);
}
