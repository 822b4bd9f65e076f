// SPDX-License-Identifier: Apache-2.0
// Whether the product of a matrix with zeros is zero and may be left out: 0 * inf and 0 * NaN are
// NaN.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "cpu/kernels/args.h"

namespace iss {

// Whether no value is inf or NaN. Both have an exponent of ones.
template <typename T>
bool all_finite(const T* values, int64_t count) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t,
                                  std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  constexpr Bits kExponent = sizeof(T) == 8               ? 0x7FF0000000000000
                             : sizeof(T) == 4             ? 0x7F800000
                             : std::is_same_v<T, Float16> ? 0x7C00
                                                          : 0x7F80;
  Bits found = 0;
  for (int64_t i = 0; i < count; ++i)
    found |= (std::bit_cast<Bits>(values[i]) & kExponent) == kExponent;
  return found == 0;
}

}  // namespace iss
