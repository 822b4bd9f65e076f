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
#include <sys/syscall.h>
#include <unistd.h>

#define ISS_AMX

// Only the kernels of Format::kPairs use AVX512-BF16, those of kTiles and kInt8Tiles AMX.
ISS_TARGET_BEGIN(
    "fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16,amx-int8")
namespace iss {
namespace {
#include "cpu/kernels/vec_avx512-inl.h"
#include "cpu/kernels/all-inl.h"
}  // namespace
ISS_TARGET_END

namespace {
bool supported() {
  // A CPU without VNNI (2017's Skylake-SP) is served by AVX2.
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool with_bf16() { return supported() && __builtin_cpu_supports("avx512bf16"); }

// On Linux a process must ask for the tiles before it uses them.
bool tiles_permitted() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
}  // namespace

extern const CpuKernels kAmxKernels, kAvx512Bf16Kernels, kAvx512Kernels;
constinit const CpuKernels kAmxKernels = all_kernels(
    "amx",
    [] {
      return with_bf16() && __builtin_cpu_supports("amx-tile") &&
             __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") &&
             tiles_permitted();
    },
    Format::kTiles, Format::kInt8Tiles);
constinit const CpuKernels kAvx512Bf16Kernels =
    all_kernels("avx512_bf16", &with_bf16, Format::kPairs);
constinit const CpuKernels kAvx512Kernels = all_kernels("avx512", &supported);
}  // namespace iss
#endif
