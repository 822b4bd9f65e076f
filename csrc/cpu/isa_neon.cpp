// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace iss {
namespace {
// Every aarch64 CPU has NEON: no target region.
#include "cpu/vec_neon-inl.h"
#include "cpu/math-inl.h"
#include "cpu/matmul-inl.h"
#include "cpu/lstm_step-inl.h"
#include "cpu/group_lasso-inl.h"
#include "cpu/table-inl.h"
}  // namespace

extern const CpuKernels kNeonKernels;
const CpuKernels kNeonKernels = {
    .isa = "neon",
    .supported = [] { return true; },
    .f32 = table<float>(),
    .f64 = table<double>(),
    .lasso_f32 = lasso_table<float>(),
    .lasso_f64 = lasso_table<double>(),
    .lasso_bf16 = lasso_table<Bfloat16>(),
};
}  // namespace iss
#endif
