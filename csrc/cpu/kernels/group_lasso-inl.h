// SPDX-License-Identifier: Apache-2.0
// The walks over a labelled matrix. Each weight is read once.
//
// An element whose row and column belong to the same unit counts once; most rows have one such
// element. The vector loop runs over whole rows and does not look for them. by_units() sets the
// factors of those columns to "none" for that row before the loop; squares() subtracts what the
// loop has counted twice.

// Calls visit(column) for the columns that belong to the unit of the row.
template <typename Visit>
inline void each_shared_column(const LabelledRows& rows, int64_t row, const Visit& visit) {
  const int32_t unit = rows.row_units[row];
  if (unit < 0 || rows.paper_overlap) return;
  for (int64_t k = rows.unit_starts[unit]; k < rows.unit_starts[unit + 1]; ++k)
    visit(rows.unit_columns[k]);
}

// Calls visit(column) for each whole vector of a row, and visit(column, lanes) for the rest.
template <typename T, typename Visit>
inline void each_vector(int64_t columns, const Visit& visit) {
  constexpr int64_t kLanes = Vec<T>::kLanes;
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) visit(c);
  if (c < columns) visit(c, columns - c);
}

// Prefetches into L2 what a walk at p reads 16 KB later: the hardware prefetcher starts again with
// each page of 4 KB. Prefetching into L1 is slower than none.
template <typename W>
inline void prefetch_after(const W* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + (1 << 14), 0, 2);
}

template <typename W>
inline Compute<W> widened(W w) {
  if constexpr (std::is_same_v<W, Bfloat16>)
    return std::bit_cast<float>(static_cast<uint32_t>(w.bits) << 16);
  else
    return w;
}

// Adds the squares of `Rows` rows in one pass; the rows lie `apart` rows from each other. The
// hardware prefetcher follows each row, and column sums are loaded and stored once for all of them.
template <int Rows, typename W>
inline void add_squares(const SquaresArgs<W>& args, int64_t row, int64_t apart) {
  using T = Compute<W>;
  using V = Vec<T>;
  const int64_t columns = args.rows.columns;
  const W* const weight = args.weight + row * columns;
  T* const column_sums = args.column_sums;
  V row_sums[Rows];
  for (V& sum : row_sums) sum = V::set(0);
  each_vector<T>(columns, [&](int64_t c, auto... lanes) {
    V of_rows = V::set(0);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const V w = V::load(weight + r * apart * columns + c, lanes...);
      row_sums[r] = fma(w, w, row_sums[r]);
      of_rows = fma(w, w, of_rows);
    }
    (V::load(column_sums + c, lanes...) + of_rows).store(column_sums + c, lanes...);
  });
  // Unrolled, so that row_sums stay in registers.
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) args.row_sums[row + r * apart] = row_sums[r].sum();
}

template <typename W>
void squares(const SquaresArgs<W>& args) {
  constexpr int kRows = 4;  // fastest from memory; 2 and 8 are slower
  std::fill_n(args.column_sums, args.rows.columns, Compute<W>(0));
  const int64_t apart = (args.rows.row_end - args.rows.row_begin) / kRows;
  int64_t row = args.rows.row_begin;
  for (; row < args.rows.row_begin + apart; ++row) add_squares<kRows>(args, row, apart);
  for (row += (kRows - 1) * apart; row < args.rows.row_end; ++row) add_squares<1>(args, row, 0);
  for (row = args.rows.row_begin; row < args.rows.row_end; ++row)
    each_shared_column(args.rows, row, [&](int64_t c) {
      const Compute<W> w = widened(args.weight[row * args.rows.columns + c]);
      args.column_sums[c] -= w * w;
    });
}

template <typename W, ByUnits kWhat>
void by_units(const ByUnitsArgs<W>& args) {
  using T = Compute<W>;
  using V = Vec<T>;
  constexpr T kNone = kWhat == ByUnits::kScale ? 1 : 0;  // the factor of no unit
  const int64_t columns = args.rows.columns;
  for (int64_t row = args.rows.row_begin; row < args.rows.row_end; ++row) {
    const W* const weight = args.weight + row * columns;
    W* const output = args.output + row * columns;
    const int32_t unit = args.rows.row_units[row];
    T own = kNone;
    if (unit >= 0) own = kWhat == ByUnits::kThreshold ? args.threshold : args.factors[unit];
    // An element of the row's own unit gets its factor through the row alone. kThreshold needs no
    // such care: the larger of two equal limits is that limit.
    const auto set_shared = [&](T value) {
      if constexpr (kWhat != ByUnits::kThreshold)
        each_shared_column(args.rows, row, [&](int64_t c) { args.of_columns[c] = value; });
    };
    set_shared(kNone);
    const V of_row = V::set(own);
    each_vector<T>(columns, [&](int64_t c, auto... lanes) {
      prefetch_after(weight + c);
      const V w = V::load(weight + c, lanes...);
      const V of_column = V::load(args.of_columns + c, lanes...);
      if constexpr (kWhat == ByUnits::kAddScaled) {
        prefetch_after(output + c);
        const V before = V::load(output + c, lanes...);
        fma(w, of_row + of_column, before).store(output + c, lanes...);
      } else if constexpr (kWhat == ByUnits::kScale) {
        (w * (of_row * of_column)).store(output + c, lanes...);
      } else {
        zero_below(w, max(of_row, of_column)).store(output + c, lanes...);
      }
    });
    set_shared(own);
  }
}
