// SPDX-License-Identifier: Apache-2.0
// The walks over a labelled matrix: each weight is read once. Elements whose row and column belong
// to the same unit (one a row, as a rule) are taken care of beside the vector loop: the loop runs
// over whole rows, and what it did to those columns is undone.

// Calls visit(column) for the columns that belong to row's own unit.
template <typename T, typename Visit>
inline void each_shared_column(const LabelledRows<T>& rows, int64_t row, const Visit& visit) {
  const int32_t unit = rows.row_units[row];
  if (unit < 0 || rows.paper_overlap) return;
  for (int64_t k = rows.unit_starts[unit]; k < rows.unit_starts[unit + 1]; ++k)
    visit(rows.unit_columns[k]);
}

template <typename T>
void squares(const SquaresArgs<T>& args) {
  using V = Vec<T>;
  constexpr int64_t kLanes = V::kLanes;
  const int64_t columns = args.rows.columns;
  for (int64_t c = 0; c < columns; ++c) args.column_sums[c] = 0;
  for (int64_t row = args.rows.row_begin; row < args.rows.row_end; ++row) {
    const T* weight = args.weight + row * columns;
    each_shared_column(args.rows, row,
                       [&](int64_t c) { args.column_sums[c] -= weight[c] * weight[c]; });
    V sum = V::set(0);
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      const V w = V::load(weight + c), square = w * w;
      sum = sum + square;
      (V::load(args.column_sums + c) + square).store(args.column_sums + c);
    }
    if (const int64_t left = columns - c; left > 0) {
      const V w = V::load(weight + c, left), square = w * w;
      sum = sum + square;
      (V::load(args.column_sums + c, left) + square).store(args.column_sums + c, left);
    }
    args.row_sums[row] = sum.sum();
  }
}

template <typename T>
void add_scaled(const AddScaledArgs<T>& args) {
  using V = Vec<T>;
  constexpr int64_t kLanes = V::kLanes;
  const int64_t columns = args.rows.columns;
  for (int64_t row = args.rows.row_begin; row < args.rows.row_end; ++row) {
    const T* weight = args.weight + row * columns;
    T* output = args.output + row * columns;
    // The row's own unit scales these once, through row_factors.
    const T own = args.row_factors[row];
    each_shared_column(args.rows, row, [&](int64_t c) { args.column_factors[c] = 0; });
    const V by_row = V::set(own);
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      const V factor = by_row + V::load(args.column_factors + c);
      fma(V::load(weight + c), factor, V::load(output + c)).store(output + c);
    }
    if (const int64_t left = columns - c; left > 0) {
      const V factor = by_row + V::load(args.column_factors + c, left);
      fma(V::load(weight + c, left), factor, V::load(output + c, left)).store(output + c, left);
    }
    each_shared_column(args.rows, row, [&](int64_t c) { args.column_factors[c] = own; });
  }
}

template <typename T>
void threshold(const ThresholdArgs<T>& args) {
  using V = Vec<T>;
  constexpr int64_t kLanes = V::kLanes;
  const int64_t columns = args.rows.columns;
  const V limit = V::set(args.threshold);
  for (int64_t row = args.rows.row_begin; row < args.rows.row_end; ++row) {
    T* weight = args.weight + row * columns;
    if (args.rows.row_units[row] < 0) {
      for (int64_t c = 0; c < columns; ++c)
        if (args.rows.column_units[c] >= 0)
          zero_below(V::load(weight + c, 1), limit).store(weight + c, 1);
      continue;
    }
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes)
      zero_below(V::load(weight + c), limit).store(weight + c);
    if (const int64_t left = columns - c; left > 0)
      zero_below(V::load(weight + c, left), limit).store(weight + c, left);
  }
}
