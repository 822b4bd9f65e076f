// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels/table.h"
#include "cpu/kernels/target.h"

#if defined(__x86_64__)
#include <immintrin.h>

ISS_TARGET_BEGIN("avx2,fma,f16c")
namespace iss {
namespace {
#include "cpu/kernels/vec_avx2-inl.h"
#include "cpu/kernels/all-inl.h"
}  // namespace
ISS_TARGET_END

extern const CpuKernels kAvx2Kernels;
constinit const CpuKernels kAvx2Kernels = all_kernels("avx2", [] {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
});
}  // namespace iss
#endif
