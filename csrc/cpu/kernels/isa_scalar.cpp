// SPDX-License-Identifier: Apache-2.0

#include "cpu/kernels/table.h"

namespace iss {
namespace {
#include "cpu/kernels/vec_scalar-inl.h"
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

extern const CpuKernels kScalarKernels, kScalarBf16Kernels;
constinit const CpuKernels kScalarKernels = all_kernels("scalar", [] { return true; });
// For tests, on any machine: what the kernels of avx512_bf16 do.
constinit const CpuKernels kScalarBf16Kernels =
    all_kernels("scalar_bf16", [] { return true; }, Format::kPairs);
}  // namespace iss
