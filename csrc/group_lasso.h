// SPDX-License-Identifier: Apache-2.0
// What a group-lasso kernel is told: a weight is a matrix whose rows and columns each carry the id
// of the unit they belong to, or -1. Everything the regulariser does is one walk over such a
// matrix, stored as W and computed in Compute<W>.
#pragma once

#include <cstdint>
#include <type_traits>

#include "lstm.h"

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

// output[r, c] += weight[r, c] * (factor of row r + factor of column c), counting as above.
template <typename W>
struct AddScaledArgs {
  LabelledRows rows;
  const W* weight;             // [R, C]
  const Compute<W>* factors;   // [units]
  Compute<W>* column_factors;  // [C]  0 for no unit; changed during the call, restored after
  W* output;                   // [R, C]
};

// weight[r, c] *= factor of row r * factor of column c, one factor where they share a unit.
template <typename W>
struct ScaleArgs {
  LabelledRows rows;
  const Compute<W>* factors;   // [units]
  Compute<W>* column_factors;  // [C]  1 for no unit; changed during the call, restored after
  W* weight;                   // [R, C]
};

// weight[r, c] = 0 where |weight[r, c]| is below the limit of row r or of column c.
template <typename W>
struct ThresholdArgs {
  LabelledRows rows;
  Compute<W> threshold;             // the limit of a row of some unit; 0 of others
  const Compute<W>* column_limits;  // [C]  likewise
  W* weight;                        // [R, C]
};

}  // namespace iss
