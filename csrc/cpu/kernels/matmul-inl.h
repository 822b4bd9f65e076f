// SPDX-License-Identifier: Apache-2.0
// A product with a matrix, by the tiles of its operand.

// Rows [rows, k] as Pairs, rounded and filled up with zeros; a Pair in the place of a float. They
// are [rows, pairs], or, with `tiles`, [rows / 16][pairs / 16][16][16]. For T = float, where
// Vec<T>::kPairs. S: T, or Bfloat16.
template <typename T, typename S>
inline void round_rows(const S* from, int64_t stride, int64_t rows, int64_t k, int64_t pairs,
                       bool tiles, T* to) {
  constexpr int64_t kLanes = Vec<T>::kLanes, kLine = 2 * kTileSize;  // elements of a tile's row
  for (int64_t r = 0; r < rows; ++r, from += stride) {
    const auto [first, apart] = lines_of(tiles, r, 2 * pairs, kLine);
    Bfloat16* line = reinterpret_cast<Bfloat16*>(to) + first;
    int64_t i = 0;
    for (; i + kLine <= k; i += kLine, line += apart)
      if constexpr (std::is_same_v<S, Bfloat16>)
        __builtin_memcpy(line, from + i, kLine * sizeof(S));
      else
        for (int64_t j = 0; j < kLine; j += kLanes) Vec<T>::load(from + i + j).round_to(line + j);
    if (i == k) continue;
    std::fill_n(line, tiles ? kLine : 2 * pairs - i, Bfloat16{});
    if constexpr (std::is_same_v<S, Bfloat16>) {
      __builtin_memcpy(line, from + i, (k - i) * sizeof(S));
    } else {
      for (; i + kLanes <= k; i += kLanes, line += kLanes) Vec<T>::load(from + i).round_to(line);
      // Lanes after the last one are zeros, or the next row's, which is written later.
      if (i < k) Vec<T>::load(from + i, k - i).round_to(line);
    }
  }
}

// The tiles of a [rows, k] @ b [k, columns], in panels of kVectors.
template <typename T, int kVectors, typename Prefetch, typename Finish>
inline void each_tile(const T* a, int64_t stride, int64_t rows, int64_t k, Packed b,
                      int64_t columns, PanelRange panels, void* scratch, const Prefetch& prefetch,
                      const Finish& finish, Elements elements = Elements::kFloats) {
  const auto floats = [&]<typename W>(const W* weights) {
    each_tile_of<T, kVectors>(FloatOperand<T, kVectors, W>(a, stride, rows, k, panels, weights),
                              rows, k, columns, panels, prefetch, finish);
  };
  if constexpr (Vec<T>::kPairs)
    if (is_pairs(b.format)) {
      const int64_t pairs = groups_of(b.format, k, 2);
      const bool tiles = in_tiles(b.format);
      const bool whole = k % 2 == 0 && stride % 2 == 0 && reinterpret_cast<uintptr_t>(a) % 4 == 0;
      if (elements == Elements::kBfloat16 && !tiles && whole) {
        stride /= 2;  // they are pairs already
      } else if (elements != Elements::kPairs) {
        T* const to = static_cast<T*>(scratch);
        if (elements == Elements::kFloats)
          round_rows<T>(a, stride, rows, k, pairs, tiles, to);
        else
          round_rows<T>(reinterpret_cast<const Bfloat16*>(a), stride, rows, k, pairs, tiles, to);
        a = to;
        stride = pairs;
      }
      if constexpr (kHasTiles)
        if (b.format == Format::kTiles)
          return each_product<kVectors>(PairTiles<kVectors>{a, stride, pairs, b.panels}, rows,
                                        columns, panels, prefetch, finish);
      const FloatOperand<T, kVectors, Pair> operand(a, stride, rows, pairs, panels, b.panels);
      return each_tile_of<T, kVectors>(operand, rows, pairs, columns, panels, prefetch, finish);
    }
  if constexpr (std::is_same_v<T, float>) {
    if (b.format == Format::kFloat16 && rows == 1 && Vec<T>::halves())
      return each_panel_of<T, kVectors, kMostPanels>(
          FloatOperand<T, kVectors, Float16, true>(a, stride, rows, k, panels, b.panels), k,
          columns, panels, prefetch, finish);
    if (b.format == Format::kFloat16) return floats(static_cast<const Float16*>(b.panels));
    if (b.format == Format::kBfloat16) return floats(static_cast<const Bfloat16*>(b.panels));
    if (is_int8(b.format)) {
      const Int8Operand<kVectors> operand(a, rows, stride, k, b, scratch);
      if constexpr (kHasTiles)
        if (in_tiles(b.format))
          return each_product<kVectors>(Int8Tiles<kVectors>{operand}, rows, columns, panels,
                                        prefetch, finish);
      return each_tile_of<T, kVectors>(operand, rows, k, columns, panels, prefetch, finish);
    }
  }
  floats(static_cast<const T*>(b.panels));
}

template <typename T>
void matmul(const MatmulArgs<T>& args) {
  constexpr int kVectors = panel_vectors(1);
  constexpr int64_t kLanes = Vec<T>::kLanes, kColumns = kPanelColumns<T, kVectors>;
  const int64_t itemsize = args.bfloat16_out ? sizeof(Bfloat16) : sizeof(T);
  // Where element (row, column) of `out` is.
  const auto place = [&](int64_t row, int64_t column) {
    return reinterpret_cast<char*>(args.out) + (row * args.out_stride + column) * itemsize;
  };
  const auto prefetch = [&](int64_t row, int64_t rows, int64_t panel, int64_t panels) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t byte = 0; byte < panels * kColumns * itemsize; byte += 64)
        __builtin_prefetch(place(row + r, panel * kColumns) + byte, 1, 2);
  };
  const auto finish = [&](const T* sums, auto row, auto rows, int64_t panel,
                          auto panels) __attribute__((noinline)) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t column = (panel + p) * kColumns;
        const int64_t left = args.columns - column;
        const T* const sum = sums + sum_at<T, kVectors>(r, p * kVectors);
        char* const to = place(row + r, column);
        T* const out = reinterpret_cast<T*>(to);
        const T* const bias = args.bias == nullptr ? nullptr : args.bias + column;
        const auto put = [&](int64_t at, int64_t lanes) {
          Vec<T> value = Vec<T>::load(sum + at);
          if (bias != nullptr)
            value = value +
                    (lanes >= kLanes ? Vec<T>::load(bias + at) : Vec<T>::load(bias + at, lanes));
          if constexpr (std::is_same_v<T, float>)
            if (args.bfloat16_out) {
              Bfloat16* const rounded = reinterpret_cast<Bfloat16*>(to) + at;
              return lanes >= kLanes ? value.store(rounded) : value.store(rounded, lanes);
            }
          if (args.accumulate)
            value =
                value + (lanes >= kLanes ? Vec<T>::load(out + at) : Vec<T>::load(out + at, lanes));
          lanes >= kLanes ? value.store(out + at) : value.store(out + at, lanes);
        };
        if (left >= kColumns)
#pragma GCC unroll 4
          for (int64_t at = 0; at < kColumns; at += kLanes) put(at, kLanes);
        else
          for (int64_t at = 0; at < left; at += kLanes) put(at, left - at);
      }
  };
  if (args.b.order == Order::kPanels)
    return each_tile<T, kVectors>(args.a, args.a_stride, args.rows, args.k, args.b, args.columns,
                                  args.panels, args.scratch, prefetch, finish, args.elements);
  const auto in_place = [&](const auto& operand) {
    each_tile_of<T, kVectors>(operand, args.rows, args.k, args.columns, args.panels, prefetch,
                              finish);
  };
  const auto stored = [&]<typename W>(W) {
    args.b.order == Order::kStored ? in_place(StoredOperand<T, kVectors, W>(args))
                                   : in_place(TransposedOperand<T, kVectors, W>(args));
  };
  if constexpr (std::is_same_v<T, float>)
    if (args.b.format == Format::kBfloat16) return stored(Bfloat16());
  stored(T());
}
