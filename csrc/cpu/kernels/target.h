// SPDX-License-Identifier: Apache-2.0
// The code between these two macros is compiled for one instruction set (csrc/README.md, "Why
// target regions"). Headers are included before the region: their inline functions have to stay
// baseline code.
#pragma once

#define ISS_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define ISS_TARGET_BEGIN(isa) \
  ISS_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define ISS_TARGET_END ISS_PRAGMA(clang attribute pop)
#else
#define ISS_TARGET_BEGIN(isa) ISS_PRAGMA(GCC push_options) ISS_PRAGMA(GCC target(isa))
#define ISS_TARGET_END ISS_PRAGMA(GCC pop_options)
#endif

#if defined(__x86_64__)
#include <cpuid.h>

namespace iss {
// Features that __builtin_cpu_supports does not know in every compiler, by leaf, subleaf, register
// (eax 0 to edx 3) and bit. A system that lets programs use AVX2 or AVX-512 lets them use these,
// but for the tiles of AMX.
struct CpuFeature {
  unsigned leaf, subleaf, reg, bit;
};
constexpr CpuFeature kF16c{1, 0, 2, 29}, kAvxVnni{7, 1, 0, 4}, kAmxBf16{7, 0, 3, 22},
    kAmxTile{7, 0, 3, 24}, kAmxInt8{7, 0, 3, 25};

inline bool has(const CpuFeature& feature) {
  unsigned r[4] = {};
  return __get_cpuid_count(feature.leaf, feature.subleaf, &r[0], &r[1], &r[2], &r[3]) != 0 &&
         (r[feature.reg] >> feature.bit & 1) != 0;
}
}  // namespace iss
#endif
