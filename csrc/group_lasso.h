// SPDX-License-Identifier: Apache-2.0
// What a group-lasso kernel is told: a weight is a matrix whose rows and columns each carry the id
// of the unit they belong to, or -1. Everything the regulariser does is one walk over such a
// matrix.
#pragma once

#include <cstdint>

namespace iss {

// Rows [row_begin, row_end) of one matrix [R, C].
template <typename T>
struct LabelledRows {
  int64_t row_begin, row_end, columns;
  const int32_t* row_units;     // [R]
  const int32_t* column_units;  // [C]
  // The columns of unit u are unit_columns[unit_starts[u]] to unit_columns[unit_starts[u + 1] - 1].
  const int64_t* unit_starts;   // [units + 1]
  const int64_t* unit_columns;  // [labelled columns]
  bool paper_overlap;           // count an element whose row and column share a unit twice
};

// Adds up squares: row_sums[r] = sum_c w^2, column_sums[c] = sum_r w^2 without what row_sums
// counts.
template <typename T>
struct SquaresArgs {
  LabelledRows<T> rows;
  const T* weight;  // [R, C]
  T* row_sums;      // [R]  rows [row_begin, row_end) are written
  T* column_sums;   // [C]  overwritten
};

// output[r, c] += weight[r, c] * (row_factors[r] + column_factors[c]), counting as above.
template <typename T>
struct AddScaledArgs {
  LabelledRows<T> rows;
  const T* weight;       // [R, C]
  const T* row_factors;  // [R]
  T* column_factors;     // [C]  changed during the call, restored after
  T* output;             // [R, C]
};

// weight[r, c] = 0 where |weight[r, c]| < threshold and row r or column c belongs to a unit.
template <typename T>
struct ThresholdArgs {
  LabelledRows<T> rows;
  T* weight;  // [R, C]
  T threshold;
};

}  // namespace iss
