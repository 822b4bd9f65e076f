// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels/table.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace iss {
namespace {
// Every aarch64 CPU has NEON: no target region.
#include "cpu/kernels/vec_neon-inl.h"
#include "cpu/kernels/math-inl.h"
#include "cpu/kernels/tile-inl.h"
#include "cpu/kernels/operand_float-inl.h"
#include "cpu/kernels/operand_int8-inl.h"
#include "cpu/kernels/operand_stored-inl.h"
#include "cpu/kernels/tiles_none-inl.h"
#include "cpu/kernels/pack-inl.h"
#include "cpu/kernels/matmul-inl.h"
#include "cells/lstm-inl.h"
#include "cells/gru-inl.h"
#include "cells/rnn-inl.h"
#include "cells/rhn-inl.h"
#include "cpu/kernels/step-inl.h"
#include "cpu/kernels/group_lasso-inl.h"
#include "cpu/kernels/table-inl.h"
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
