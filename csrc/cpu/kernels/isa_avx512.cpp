// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels/table.h"
#include "cpu/kernels/target.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined inputs of its own AVX-512 intrinsics for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

ISS_TARGET_BEGIN("fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
namespace iss {
namespace {
#include "cpu/kernels/vec_avx512-inl.h"
#include "cpu/kernels/math-inl.h"
#include "cpu/kernels/tile-inl.h"
#include "cpu/kernels/operand_float-inl.h"
#include "cpu/kernels/operand_int8-inl.h"
#include "cpu/kernels/operand_stored-inl.h"
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
ISS_TARGET_END

extern const CpuKernels kAvx512Kernels;
const CpuKernels kAvx512Kernels = {
    .isa = "avx512",
    .supported =
        [] {
          // A CPU without VNNI (2017's Skylake-SP) is served by AVX2.
          return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma") &&
                 __builtin_cpu_supports("f16c");
        },
    .f32 = table<float>(),
    .f64 = table<double>(),
    .lasso_f32 = lasso_table<float>(),
    .lasso_f64 = lasso_table<double>(),
    .lasso_bf16 = lasso_table<Bfloat16>(),
};
}  // namespace iss
#endif
