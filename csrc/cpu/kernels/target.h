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
