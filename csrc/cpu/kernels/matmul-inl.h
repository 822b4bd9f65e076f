// SPDX-License-Identifier: Apache-2.0
// A product with a matrix, by the tiles of its operand.

// Rows [rows, k] as Pairs, rounded and filled up with zeros; a Pair in the place of a float. They
// are [rows, pairs], or, with `tiles`, [rows / 16][pairs / 16][16][16]. Rows that are true in
// `zeros` are zeros. For T = float, where Vec<T>::kPairs. S: T, or Bfloat16.
template <typename T, typename S>
inline void round_rows(const S* from, int64_t stride, int64_t rows, int64_t k, int64_t pairs,
                       bool tiles, T* to, const bool* zeros = nullptr) {
  constexpr int64_t kLanes = Vec<T>::kLanes, kLine = 2 * kTileSize;  // elements of a tile's row
  for (int64_t r = 0; r < rows; ++r, from += stride) {
    const auto [first, apart] = lines_of(tiles, r, 2 * pairs, kLine);
    Bfloat16* line = reinterpret_cast<Bfloat16*>(to) + first;
    if (zeros != nullptr && zeros[r]) {
      for (int64_t i = 0; i < 2 * pairs; i += kLine, line += tiles ? apart : kLine)
        std::fill_n(line, std::min(kLine, 2 * pairs - i), Bfloat16{});
      continue;
    }
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

// The sums of tiles begin with zeros, and all of them are finished.
struct InBuffer {
  int64_t columns;
  TileSums operator()(int64_t, int64_t, int64_t, float* buffer) const {
    return {nullptr, buffer, columns};
  }
};

// The tiles of a [rows, k] @ b [k, columns], in panels of kVectors. place: of each_product, for
// Format::kTiles. zeros: of round_rows.
template <typename T, int kVectors, typename Prefetch, typename Finish, typename Place>
inline void each_tile(const T* a, int64_t stride, int64_t rows, int64_t k, Packed b,
                      int64_t columns, PanelRange panels, void* scratch, const Prefetch& prefetch,
                      const Finish& finish, const Place& place,
                      Elements elements = Elements::kFloats, const bool* zeros = nullptr) {
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
          round_rows<T>(a, stride, rows, k, pairs, tiles, to, zeros);
        else
          round_rows<T>(reinterpret_cast<const Bfloat16*>(a), stride, rows, k, pairs, tiles, to);
        a = to;
        stride = pairs;
      }
      if constexpr (kHasTiles)
        if (b.format == Format::kTiles)
          return each_product<kVectors>(PairTiles<kVectors>{a, stride, pairs, b.panels}, rows,
                                        columns, panels, prefetch, finish, place);
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
                                        prefetch, finish, InBuffer{kPanelColumns<float, kVectors>});
      return each_tile_of<T, kVectors>(operand, rows, k, columns, panels, prefetch, finish);
    }
  }
  floats(static_cast<const T*>(b.panels));
}

template <typename T>
void matmul(const MatmulArgs<T>& args) {
  constexpr int kVectors = panel_vectors(1);
  constexpr int64_t kLanes = Vec<T>::kLanes, kColumns = kPanelColumns<T, kVectors>;
  const bool by_panels = args.panel_rows > 0;
  const int64_t itemsize = args.bfloat16_out ? sizeof(Bfloat16) : sizeof(T);
  const int64_t stride = by_panels ? kColumns : args.out_stride;
  // Where element (row, first column of the panel) of `out` is.
  const auto place = [&](int64_t row, int64_t panel) {
    const int64_t at =
        by_panels ? (panel * args.panel_rows + row) * kColumns : row * stride + panel * kColumns;
    return reinterpret_cast<char*>(args.out) + at * itemsize;
  };
  const auto prefetch = [&](int64_t row, int64_t rows, int64_t panel, int64_t panels) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t byte = 0; byte < panels * kColumns * itemsize; byte += 64)
        __builtin_prefetch(place(row + r, panel) + byte, 1, 2);
  };
  // Writes `left` columns of the sums of each row, all of a panel where it has so many.
  const auto finish_as = [&](auto bias_given, auto accumulates, auto rounds, const T* sums,
                             int64_t row, int64_t rows, int64_t panel, int64_t left) {
    const T* const bias = bias_given ? args.bias + panel * kColumns : nullptr;
    const auto finish_row = [&](const T* sum, char* to, auto count) {
      for (int64_t at = 0; at < count; at += kLanes) {
        const bool whole = at + kLanes <= count;
        const auto load = [&](const T* from) {
          return whole ? Vec<T>::load(from + at) : Vec<T>::load(from + at, count - at);
        };
        const auto store = [&](Vec<T> value, auto* to) {
          whole ? value.store(to + at) : value.store(to + at, count - at);
        };
        Vec<T> value = Vec<T>::load(sum + at);
        if constexpr (bias_given) value = value + load(bias);
        if constexpr (accumulates) value = value + load(reinterpret_cast<const T*>(to));
        if constexpr (rounds)
          store(value, reinterpret_cast<Bfloat16*>(to));
        else
          store(value, reinterpret_cast<T*>(to));
      }
    };
    char* to = place(row, panel);
    for (int64_t r = 0; r < rows; ++r, to += stride * itemsize)
      if (left >= kColumns)
        finish_row(sums + sum_at<T, kVectors>(r, 0), to,
                   std::integral_constant<int64_t, kColumns>());
      else
        finish_row(sums + sum_at<T, kVectors>(r, 0), to, left);
  };
  const auto finish_tiles = [&](auto accumulates, const T* sums, int64_t row, int64_t rows,
                                int64_t panel, int64_t panels) {
    constexpr std::true_type yes;
    constexpr std::false_type no;
    for (int64_t p = 0; p < panels; ++p) {
      const T* const of_panel = sums + sum_at<T, kVectors>(0, p * kVectors);
      const int64_t left = args.columns - (panel + p) * kColumns;
      const auto go = [&](auto bias_given, auto rounds) {
        if constexpr (!rounds)
          if (accumulates && args.accumulate)
            return finish_as(bias_given, yes, no, of_panel, row, rows, panel + p, left);
        finish_as(bias_given, no, rounds, of_panel, row, rows, panel + p, left);
      };
      if constexpr (std::is_same_v<T, float>)
        if (args.bfloat16_out) {
          args.bias == nullptr ? go(no, yes) : go(yes, yes);
          continue;
        }
      args.bias == nullptr ? go(no, no) : go(yes, no);
    }
  };
  const auto finish = [&](const T* sums, auto row, auto rows, int64_t panel, auto panels)
                          __attribute__((noinline)) {
                            finish_tiles(std::true_type(), sums, row, rows, panel, panels);
                          };
  if (args.b.order == Order::kPanels) {
    if constexpr (kHasTiles && std::is_same_v<T, float>)
      if (args.b.format == Format::kTiles) {
        // Sums begin with what they are added to, and whole tiles go to their place at once.
        const auto place_sums = [&](int64_t row, int64_t rows, int64_t panel,
                                    float* buffer) -> TileSums {
          float* const to = reinterpret_cast<float*>(place(row, panel));
          const int64_t left = std::min(kColumns, args.columns - panel * kColumns);
          if (args.bias == nullptr && !args.bfloat16_out && rows % kTileSize == 0 &&
              left == kColumns)
            return {args.accumulate ? to : nullptr, to, stride};
          if (!args.accumulate) return {nullptr, buffer, kColumns};
          for (int64_t r = 0; r < rows; ++r)
            std::copy_n(to + r * stride, left, buffer + r * kColumns);
          return {buffer, buffer, kColumns};
        };
        const auto finish_sums = [&](const T* sums, auto row, auto rows, int64_t panel,
                                     auto panels) __attribute__((noinline)) {
          finish_tiles(std::false_type(), sums, row, rows, panel, panels);
        };
        return each_tile<T, kVectors>(args.a, args.a_stride, args.rows, args.k, args.b,
                                      args.columns, args.panels, args.scratch, prefetch,
                                      finish_sums, place_sums, args.elements);
      }
    return each_tile<T, kVectors>(args.a, args.a_stride, args.rows, args.k, args.b, args.columns,
                                  args.panels, args.scratch, prefetch, finish, InBuffer{kColumns},
                                  args.elements);
  }
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
