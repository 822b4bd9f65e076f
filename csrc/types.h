// SPDX-License-Identifier: Apache-2.0
// The types that kernels of all devices share, and the letters for shapes.
//
// T steps, B batch, I input size, H hidden size (of an LSTM: its cells), P output size (H, or
// proj_size), G gates of a unit, D micro-steps of a step of a deep cell, N rows of a packed
// sequence (T * B of a padded one), n rows of one kernel call, R and C rows and columns of a
// labelled weight. Row-major; sizes and strides count elements.
#pragma once

#include <cstdint>

namespace iss {

// How the elements of a packed matrix are stored: as T, or smaller and widened as they are loaded.
// kInt8 has one scale per column, and the rows that it multiplies are quantised on the fly to 8
// bits; kInt8Fine is packed as kInt8, and rows whose elements differ widely in size are quantised
// in two terms, to some 15 bits. kPairs is bfloat16 for CPUs that multiply it: the rows are rounded
// to it on the fly, and products are summed in float. All but kSame go with T = float.
// kTiles, kInt8Tiles and kInt8FineTiles are kPairs, kInt8 and kInt8Fine for units that multiply
// tiles of 16 rows (AMX).
enum class Format {
  kSame,
  kFloat16,
  kBfloat16,
  kInt8,
  kInt8Fine,
  kPairs,
  kTiles,
  kInt8Tiles,
  kInt8FineTiles
};
constexpr bool in_tiles(Format format) { return format >= Format::kTiles; }
constexpr bool is_int8(Format format) {
  return format == Format::kInt8 || format == Format::kInt8Fine || format > Format::kTiles;
}
constexpr bool is_fine(Format format) {
  return format == Format::kInt8Fine || format == Format::kInt8FineTiles;
}
// The same format in two terms, of int8.
constexpr Format fine(Format format) {
  return format == Format::kInt8        ? Format::kInt8Fine
         : format == Format::kInt8Tiles ? Format::kInt8FineTiles
                                        : format;
}
// Whether rows are rounded to bfloat16.
constexpr bool is_pairs(Format format) {
  return format == Format::kPairs || format == Format::kTiles;
}
// Whether a row is rounded, to bfloat16 or 8 bits, before it is multiplied.
constexpr bool rounds_rows(Format format) { return is_pairs(format) || is_int8(format); }
struct Float16 {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};
// Two neighbours along K, the first in the low bits.
struct Pair {
  uint32_t bits;
};

}  // namespace iss
