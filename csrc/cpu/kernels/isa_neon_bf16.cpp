// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels/table.h"
#include "cpu/kernels/target.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#define ISS_NEON_BF16
#if defined(__clang__)
ISS_TARGET_BEGIN("bf16,dotprod,i8mm")
#else
ISS_TARGET_BEGIN("arch=armv8.2-a+bf16+dotprod+i8mm")
#endif

namespace iss {
namespace {
#include "cpu/kernels/vec_neon-inl.h"
#include "cpu/kernels/all-inl.h"
}  // namespace
ISS_TARGET_END

extern const CpuKernels kNeonBf16Kernels;
constinit const CpuKernels kNeonBf16Kernels = all_kernels(
    "neon_bf16",
    [] {
#if defined(__linux__)
      // HWCAP_ASIMDDP; HWCAP2_I8MM and HWCAP2_BF16, which Armv8.6 has together.
      constexpr unsigned long kDotProducts = 1 << 20, kMatrices = 1 << 13 | 1 << 14;
      return (getauxval(AT_HWCAP) & kDotProducts) != 0 &&
             (getauxval(AT_HWCAP2) & kMatrices) == kMatrices;
#else
      return false;
#endif
    },
    Format::kPairs);
}  // namespace iss
#endif
