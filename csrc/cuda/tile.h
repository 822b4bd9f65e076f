// SPDX-License-Identifier: Apache-2.0
// What lies where in a block's shared memory, for the kernels and for the planner that must know
// its size beforehand.
#pragma once

#include <cstdint>

#include "cuda/plan.h"

#ifdef __CUDACC__
#define ISS_HOST_DEVICE __host__ __device__
#else
#define ISS_HOST_DEVICE
#endif

namespace iss {

// Offsets in bytes, each a multiple of 16.
struct SharedLayout {
  int64_t weights, vectors, sums, bytes;  // bytes: the end
};
ISS_HOST_DEVICE constexpr SharedLayout shared_layout(Math math, bool backward, int64_t hidden,
                                                     int units, int rows, int threads);

}  // namespace iss
