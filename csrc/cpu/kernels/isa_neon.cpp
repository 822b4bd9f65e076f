// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels/table.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace iss {
namespace {
// Every aarch64 CPU has NEON: no target region.
#include "cpu/kernels/vec_neon-inl.h"
#include "cpu/kernels/all-inl.h"
}  // namespace

extern const CpuKernels kNeonKernels;
constinit const CpuKernels kNeonKernels = all_kernels("neon", [] { return true; });
}  // namespace iss
#endif
