// SPDX-License-Identifier: Apache-2.0
// The register tile under every matrix product here: Rows rows of `a` times the vectors of a packed
// panel. Each sum runs over k in order with one accumulator, so a result depends neither on the
// other rows of the batch nor on how work is split: batch 1 and batch 64 give the same bits.

// A tile of a single row may be two panels wide: one panel has too few sums to hide the latency of
// their additions.
constexpr int kMostPanels = 2;

// kVectors: of a panel, 3 or 4.
template <typename T, int kVectors>
constexpr int64_t kPanelColumns = kVectors * Vec<T>::kLanes;

// The size of the sums of up to kBlockRows rows and two panels: [panel][row][kPanelColumns]. Where
// a last panel is partly empty, the end of its rows is not written.
template <typename T, int kVectors>
constexpr int64_t kSums = kMostPanels * kBlockRows * kPanelColumns<T, kVectors>;

// The offset of vector j of row r in the sums; j counts over both panels.
template <typename T, int kVectors>
constexpr int64_t sum_at(int64_t r, int64_t j) {
  return (j / kVectors * kBlockRows + r) * kPanelColumns<T, kVectors> +
         j % kVectors * Vec<T>::kLanes;
}

// The loop of a micro-kernel along K, on an ISA whose instructions multiply two rows at once
// (MatrixSums). It takes two steps at a time and returns how many it took: all, or all but the
// last. x(r, i) is row r of `a` at step i, at(i, j) is vector j of B at step i, and prefetch(i)
// brings what a later step reads into the cache.
template <typename TwoRows, int Rows, int Vectors, typename Sum, typename X, typename At,
          typename Prefetch>
inline int64_t by_two_rows(Sum (&sum)[Rows][Vectors], int64_t steps, const X& x, const At& at,
                           const Prefetch& prefetch) {
  constexpr auto next = [](int r) { return std::min(r + 1, Rows - 1); };  // or the last one again
  TwoRows sums[(Rows + 1) / 2][Vectors];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r += 2)
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) sums[r / 2][j] = TwoRows::of(sum[r][j].v, sum[next(r)][j].v);
  int64_t i = 0;
  for (; i + 2 <= steps; i += 2) {
    prefetch(i);
    prefetch(i + 1);
    decltype(TwoRows::load(x(0, 0), x(0, 0))) rows[(Rows + 1) / 2];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r += 2) rows[r / 2] = TwoRows::load(x(r, i), x(next(r), i));
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) {
#pragma GCC unroll 16
      for (int r = 0; r < Rows; r += 2)
        sums[r / 2][j] = sums[r / 2][j].plus(rows[r / 2], at(i, j), at(i + 1, j));
      // Keeps the compiler from loading all vectors at once: registers are too few.
      __asm__ volatile("" ::: "memory");
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r += 2)
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) {
      const TwoRows rows = sums[r / 2][j].rows();
      sum[r][j] = {rows.left};
      if (r + 1 < Rows) sum[next(r)][j] = {rows.right};
    }
  return i;
}

// Calls multiply() with the number of rows and vectors as constants: 0 to Rows, 1 to Vectors.
template <int Rows, int Vectors, typename T, typename Operands>
inline void tile(const Operands& operands, int64_t row, int64_t rows, int64_t panel,
                 int64_t vectors, int64_t begin, int64_t end, T* sums) {
  if constexpr (Rows > 0) {
    if (rows < Rows)
      return tile<Rows - 1, Vectors>(operands, row, rows, panel, vectors, begin, end, sums);
    if constexpr (Vectors > 1)
      if (vectors < Vectors)
        return tile<Rows, Vectors - 1>(operands, row, rows, panel, vectors, begin, end, sums);
    operands.template multiply<Rows, Vectors>(row, panel, begin, end, sums);
  }
}

// Where the sums of a product of tiles begin, zeros where `initial` is nullptr, and where they go:
// `stride` floats from row to row of both.
struct TileSums {
  const float* initial;
  float* out;
  int64_t stride;
};

// How many vectors of columns there are from `panel` on, where the last panel may be partly empty.
template <typename T, int kVectors>
inline int64_t vectors_from(int64_t panel, int64_t columns) {
  return (columns - panel * kPanelColumns<T, kVectors> + Vec<T>::kLanes - 1) / Vec<T>::kLanes;
}

// each_tile_of for a single row. It has no loops over rows, and `finish` is compiled for one row:
// the product of one panel takes only a few hundred cycles, so such overhead counts.
template <typename T, int kVectors, int kPanels, typename Operands, typename Prefetch,
          typename Finish>
inline void each_panel_of(const Operands& operands, int64_t k, int64_t columns, PanelRange range,
                          const Prefetch& prefetch, const Finish& finish) {
  constexpr std::integral_constant<int64_t, 0> kFirst;
  constexpr std::integral_constant<int64_t, 1> kOne;
  alignas(64) T sums[kSums<T, kVectors>];
  for (int64_t done = range.begin; done < range.end; done += kPanels) {
    const int64_t panels = std::min<int64_t>(kPanels, range.end - done);
    // Backwards: the panels that the last call used last are still in the cache.
    const int64_t panel = range.backwards ? range.begin + range.end - done - panels : done;
    const int64_t vectors = std::min(panels * kVectors, vectors_from<T, kVectors>(panel, columns));
    prefetch(0, 1, panel, panels);
    tile<1, kPanels * kVectors>(operands, 0, 1, panel, vectors, 0, k, sums);
    if constexpr (kPanels == 1)
      finish(sums, kFirst, kOne, panel, kOne);
    else
      finish(sums, kFirst, kOne, panel, panels);
  }
}

// Computes the sums of all rows and panels, and calls finish(sums, first_row, rows, first_panel,
// panels) for each part of them. Just before the last K block of a part it calls
// prefetch(first_row, rows, first_panel, panels) for what finish reads and writes; prefetched
// earlier, it would be evicted by the weights.
//
// There are as few tiles as registers allow. Their heights are as even as possible, since a tile of
// two or three rows runs at 0.8 of the speed. They are as wide as a panel. A single row that would
// be left over is a tile of its own, two panels wide.
template <typename T, int kVectors, typename Operands, typename Prefetch, typename Finish>
inline void each_tile_of(const Operands& operands, int64_t all_rows, int64_t k, int64_t columns,
                         PanelRange range, const Prefetch& prefetch, const Finish& finish) {
  if (all_rows == 1)
    return operands.row_panels() == 1
               ? each_panel_of<T, kVectors, 1>(operands, k, columns, range, prefetch, finish)
               : each_panel_of<T, kVectors, kMostPanels>(operands, k, columns, range, prefetch,
                                                         finish);
  constexpr int kTileRows = Operands::kTileRows;
  const int64_t tile_rows = operands.tile_rows;
  alignas(64) T sums[kSums<T, kVectors>];
  for (int64_t start = 0; start < all_rows; start += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, all_rows - start);
    const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
    const bool single = rows % tile_rows == 1 && rows <= 4 * tile_rows;
    const int64_t most_panels = single ? kMostPanels : 1;
    const int64_t height = single ? tile_rows : rows / tiles, higher = single ? 0 : rows % tiles;
    const auto row_of = [&](int64_t t) {  // a tile's first
      return start + std::min(rows, t * height + std::min(t, higher));
    };
    const int64_t block = tiles == 1 ? k : operands.block() / most_panels;
    const int64_t group = k <= block ? 1 : tiles;
    for (int64_t panel = range.begin; panel < range.end; panel += most_panels) {
      const int64_t panels = std::min(most_panels, range.end - panel);
      const int64_t vectors =
          std::min(panels * kVectors, vectors_from<T, kVectors>(panel, columns));
      for (int64_t of = 0; of < tiles; of += group) {
        const int64_t first = row_of(of), last = row_of(of + group);
        int64_t begin = 0;
        do {
          const int64_t end = std::min(begin + block, k);
          if (end == k) prefetch(first, last - first, panel, panels);
          for (int64_t t = of; t < of + group; ++t) {
            const int64_t row = row_of(t), rows_here = row_of(t + 1) - row;
            T* const to = sums + sum_at<T, kVectors>(row - first, 0);
            if (rows_here == 1 && single)
              tile<1, kMostPanels * kVectors>(operands, row, 1, panel, vectors, begin, end, to);
            else
              for (int64_t p = 0; p < panels; ++p)
                tile<kTileRows, kVectors>(operands, row, rows_here, panel + p,
                                          vectors - p * kVectors, begin, end,
                                          to + sum_at<T, kVectors>(0, p * kVectors));
          }
          begin = end;
        } while (begin < k);
        finish(sums, first, last - first, panel, panels);
      }
    }
  }
}
