// SPDX-License-Identifier: Apache-2.0
// The arguments of the group-lasso kernels on the CPU, and what both devices do to each element.
//
// A labelled weight is a matrix whose rows and columns each carry the id of the unit they belong
// to, or -1. Every op of the regulariser is one walk over such matrices. W is the type that a
// weight is stored in, Compute<W> the type of sums, norms and factors.
#pragma once

#include <cstdint>
#include <type_traits>

#include "types.h"

namespace iss {

// A bfloat16 weight is widened as it is loaded and rounded once as it is stored.
template <typename W>
using Compute = std::conditional_t<std::is_same_v<W, Bfloat16>, float, W>;

// Rows [row_begin, row_end) of one matrix [R, C].
struct LabelledRows {
  int64_t row_begin, row_end, columns;
  const int32_t* row_units;  // [R]
  // The columns of unit u are unit_columns[unit_starts[u]] to unit_columns[unit_starts[u + 1] - 1].
  const int64_t* unit_starts;   // [units + 1]
  const int64_t* unit_columns;  // [labelled columns]
  bool paper_overlap;           // count an element whose row and column share a unit twice
};

// row_sums[r] = sum of w^2 over row r; column_sums[c] = sum of w^2 over column c, without the
// elements whose row belongs to the same unit as the column: row_sums counts those.
template <typename W>
struct SquaresArgs {
  LabelledRows rows;
  const W* weight;          // [R, C]
  Compute<W>* row_sums;     // [R]  rows [row_begin, row_end) are written
  Compute<W>* column_sums;  // [C]  overwritten
};

// The op on each element. The unit of its row and the unit of its column each give a factor or a
// limit; where both are the same unit, it counts once (twice with paper_overlap).
enum class ByUnits {
  kAddScaled,  // output += weight * (factor of the row + factor of the column); no unit gives 0
  kScale,      // output = weight * factor of the row * factor of the column; no unit gives 1
  kThreshold,  // output = weight, or 0 where |weight| < the limit of the row or of the column
};

template <typename W>
struct ByUnitsArgs {
  LabelledRows rows;
  const W* weight;            // [R, C]
  W* output;                  // [R, C]; is `weight` except for kAddScaled
  const Compute<W>* factors;  // [units]; nullptr for kThreshold
  Compute<W> threshold;       // the limit of every unit; for kThreshold only
  Compute<W>* of_columns;     // [C] factors or limits; the kernel changes and restores them
};

}  // namespace iss
