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
constinit const CpuKernels kNeonKernels = all_kernels("neon", [] { return true; });
}  // namespace iss
#endif
