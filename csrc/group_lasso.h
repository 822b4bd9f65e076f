// SPDX-License-Identifier: Apache-2.0
// What a group-lasso kernel is told: a weight is a matrix whose rows and columns each carry the id
// of the unit they belong to, or -1. Everything the regulariser does is one walk over such a
// matrix, stored as W and computed in Compute<W>.
#pragma once

#include <cstdint>
#include <type_traits>

#include "types.h"

namespace iss {

// bfloat16 is widened as it is loaded, and rounded once as it is stored.
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

// Adds up squares: row_sums[r] = sum_c w^2, column_sums[c] = sum_r w^2 without what row_sums
// counts.
template <typename W>
struct SquaresArgs {
  LabelledRows rows;
  const W* weight;          // [R, C]
  Compute<W>* row_sums;     // [R]  rows [row_begin, row_end) are written
  Compute<W>* column_sums;  // [C]  overwritten
};

// What happens to each element, given what its row's and its column's unit have for it: a factor,
// or a limit. Where the two are one unit, it counts once (but for paper_overlap).
enum class ByUnits {
  kAddScaled,  // output += weight * (factor of the row + factor of the column); 0 of no unit
  kScale,      // output = weight * factor of the row * factor of the column; 1 of no unit
  kThreshold,  // output = weight, or 0 where |weight| < the limit of the row or of the column
};

template <typename W>
struct ByUnitsArgs {
  LabelledRows rows;
  const W* weight;            // [R, C]
  W* output;                  // [R, C]; weight, but for kAddScaled
  const Compute<W>* factors;  // [units]; nullptr for kThreshold
  Compute<W> threshold;       // the limit of every unit; kThreshold alone
  Compute<W>* of_columns;     // [C] factors or limits; changed during the call, restored after
};

}  // namespace iss
