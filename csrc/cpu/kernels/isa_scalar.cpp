// SPDX-License-Identifier: Apache-2.0

#include "cpu/kernels/table.h"

namespace iss {
namespace {
#include "cpu/kernels/vec_scalar-inl.h"
#include "cpu/kernels/all-inl.h"
}  // namespace

extern const CpuKernels kScalarKernels, kScalarBf16Kernels;
constinit const CpuKernels kScalarKernels = all_kernels("scalar", [] { return true; });
// For tests, on any machine: what the kernels of avx512_bf16 do.
constinit const CpuKernels kScalarBf16Kernels =
    all_kernels("scalar_bf16", [] { return true; }, Format::kPairs);
}  // namespace iss
