// SPDX-License-Identifier: Apache-2.0
// A matrix that is multiplied where torch keeps it, without packing: for few rows, which would use
// the panels once (a single step of a cell). W: T, or Bfloat16 where T is float.

// B.T as it is stored, [columns, K], and what is added to its product. Each sum is a dot product of
// two rows in one vector of partial sums along K, so here too it depends neither on the other rows
// nor on how work is split.
template <typename T, int kVectors, typename W>
struct TransposedOperand {
  static constexpr int kTileRows = Vec<T>::kTileRows, tile_rows = kTileRows;
  using V = Vec<T>;
  static constexpr int64_t kLanes = V::kLanes;
  // Weights of more bytes come from beyond the L2 cache: each group of rows prefetches the next.
  static constexpr int64_t kCacheBytes = 1 << 21;

  struct Factors {
    const T* a;
    int64_t stride, k;
    const W* b;
  } parts[2];
  int64_t columns;
  bool far;

  explicit TransposedOperand(const MatmulArgs<T>& args)
      : parts{{args.a, args.a_stride, args.k, static_cast<const W*>(args.b.panels)},
              {args.a_more, args.a_more_stride, args.k_more,
               static_cast<const W*>(args.b_more.panels)}},
        columns(args.columns),
        far(columns * (args.k + args.k_more) * int64_t{sizeof(W)} > kCacheBytes) {}

  int64_t block() const { return std::numeric_limits<int64_t>::max(); }  // K whole
  int row_panels() const { return 1; }

  // As FloatOperand::multiply, for all of K.
  template <int Rows, int Vectors>
  void multiply(int64_t row, int64_t panel, int64_t, int64_t, T* sums) const {
    far ? multiply_as<true, Rows>(row, panel, Vectors, sums)
        : multiply_as<false, Rows>(row, panel, Vectors, sums);
  }

  template <bool kFar, int Rows>
  __attribute__((noinline, noclone)) void multiply_as(int64_t row, int64_t panel, int64_t vectors,
                                                      T* sums) const {
    // Columns at a time: as many as there are registers for their sums.
    constexpr int64_t kMost = Rows == 1 || (Rows == 2 && V::kTileRows == 6) ? 8 : 4;
    constexpr int kColumns = static_cast<int>(std::min(kMost, kLanes));
    V partial[Rows][kLanes];
    for (int r = 0; r < Rows; ++r)
      for (V& of_column : partial[r]) of_column = V::set(0);
    for (int64_t j = 0; j < vectors; ++j) {
      const int64_t first = panel * kPanelColumns<T, kVectors> + j * kLanes;
      const int64_t last = std::min(first + kLanes, columns) - 1;
      for (int64_t column = first; column <= last; column += kColumns)
        dots<kFar, Rows, kColumns>(row, column, last - column, &partial[0][column - first]);
      for (int r = 0; r < Rows; ++r) V::sums(partial[r]).store(sums + sum_at<T, kVectors>(r, j));
    }
  }

  // partial[r][c]: row row + r of a times column column + c of B, by lanes of K. There are no more
  // columns than column + last.
  template <bool kFar, int Rows, int kColumns>
  void dots(int64_t row, int64_t column, int64_t last, V* partial) const {
    V sum[Rows][kColumns];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) sum[r][c] = V::set(0);
    for (const auto& [a, stride, k, b] : parts) {
      const T* const x = a + row * stride;
      const W* w[kColumns];
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) w[c] = b + (column + std::min<int64_t>(c, last)) * k;
      const auto add = [&, stride = stride](const auto& load) __attribute__((always_inline)) {
        V from_x[Rows];
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) from_x[r] = load(x + r * stride);
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) {
          const V from_w = load(w[c]);
#pragma GCC unroll 8
          for (int r = 0; r < Rows; ++r) sum[r][c] = fma(from_x[r], from_w, sum[r][c]);
        }
      };
      int64_t i = 0;
      for (; i + kLanes <= k; i += kLanes) {
        if constexpr (kFar)
#pragma GCC unroll 8
          for (int c = 0; c < kColumns; ++c) __builtin_prefetch(w[c] + kColumns * k + i, 0, 2);
        add([&](const auto* from) { return V::load(from + i); });
      }
      if (i < k) add([&, k = k](const auto* from) { return V::load(from + i, k - i); });
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) partial[r * kLanes + c] = sum[r][c];
  }
};

// B as it is stored, [K, columns].
template <typename T, int kVectors, typename W>
struct StoredOperand {
  static constexpr int kTileRows = Vec<T>::kTileRows, tile_rows = kTileRows;
  using V = Vec<T>;
  static constexpr int64_t kLanes = V::kLanes;
  // A K block: the lines of a panel that several tiles of rows find in the L1 cache.
  static constexpr int64_t kBlockBytes = V::kTileRows < 6 ? 1 << 14 : 1 << 16;
  // The hardware's prefetcher does not follow strides of more than a page.
  static constexpr int64_t kAhead = 8;

  const T* a;
  int64_t stride, k, columns;
  const W* b;

  explicit StoredOperand(const MatmulArgs<T>& args)
      : a(args.a),
        stride(args.a_stride),
        k(args.k),
        columns(args.columns),
        b(static_cast<const W*>(args.b.panels)) {}

  int64_t block() const { return kBlockBytes / (kPanelColumns<T, kVectors> * sizeof(W)); }
  int row_panels() const { return kMostPanels; }

  // As FloatOperand::multiply.
  template <int Rows, int Vectors>
  void multiply(int64_t row, int64_t panel, int64_t begin, int64_t end, T* sums) const {
    const int64_t left = columns - panel * kPanelColumns<T, kVectors> - (Vectors - 1) * kLanes;
    left >= kLanes ? multiply_as<true, Rows, Vectors>(row, panel, begin, end, left, sums)
                   : multiply_as<false, Rows, Vectors>(row, panel, begin, end, left, sums);
  }

  // left: columns of the last vector, where it is not `kWhole`.
  template <bool kWhole, int Rows, int Vectors>
  __attribute__((noinline)) void multiply_as(int64_t row, int64_t panel, int64_t begin, int64_t end,
                                             int64_t left, T* sums) const {
    const T* const x = a + row * stride;
    const W* w = b + begin * columns + panel * kPanelColumns<T, kVectors>;
    V sum[Rows][Vectors];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
      for (int j = 0; j < Vectors; ++j)
        sum[r][j] = begin == 0 ? V::set(0) : V::load(sums + sum_at<T, kVectors>(r, j));
    for (int64_t i = begin; i < end; ++i, w += columns) {
      const W* const next = w + std::min(kAhead, k - 1 - i) * columns;
#pragma GCC unroll 16
      for (int j = 0; j < Vectors; ++j) {
        __builtin_prefetch(next + j * kLanes);
        const V from_w =
            kWhole || j + 1 < Vectors ? V::load(w + j * kLanes) : V::load(w + j * kLanes, left);
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r)
          sum[r][j] = fma(V::set(x[r * stride + i]), from_w, sum[r][j]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
      for (int j = 0; j < Vectors; ++j) sum[r][j].store(sums + sum_at<T, kVectors>(r, j));
  }
};
