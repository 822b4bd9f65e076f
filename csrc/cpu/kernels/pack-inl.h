// SPDX-License-Identifier: Apache-2.0
// Packs a matrix into panels (PackArgs); transposes a matrix.

// Calls visit(panel, slot, column) for each place of a panel's rows, for all of args.panels; column
// is -1 where the place is empty. In a block of `count` units from `first` on (PackArgs), slot s is
// gate s / count of unit first + s % count.
template <typename T, int kVectors, typename Visit>
inline void each_column(const PackArgs& args, const Visit& visit) {
  constexpr int64_t kLanes = Vec<T>::kLanes;
  const int64_t gates = args.gates, units = args.columns / gates;
  const int64_t of_block = gates * kLanes;  // slots
  for (int64_t panel = args.panels.begin; panel < args.panels.end; ++panel)
    for (int64_t slot = 0; slot < kPanelColumns<T, kVectors>; ++slot) {
      const int64_t block = panel * (kVectors / gates) + slot / of_block;
      const int64_t first = block * kLanes, count = std::min(kLanes, units - first);
      const int64_t at = slot % of_block;
      visit(panel, slot, at < gates * count ? at / count * units + first + at % count : -1);
    }
}

// to[i * stride + s] = rows[s][i] for i < count and s < lanes. All Vec::kLanes rows are readable.
inline void transpose_rows(const float* const* rows, int64_t lanes, int64_t count, int64_t stride,
                           float* to) {
  using V = Vec<float>;
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    V columns[4];
    V::load_columns(rows, i, columns);
    for (int64_t k = 0; k < 4; ++k) {
      float* const at = to + (i + k) * stride;
      lanes == V::kLanes ? columns[k].store(at) : columns[k].store(at, lanes);
    }
  }
  for (; i < count; ++i)
    for (int64_t s = 0; s < lanes; ++s) to[i * stride + s] = rows[s][i];
}

template <typename T, int kVectors, typename W>
inline void pack_as(const PackArgs& args) {
  // kRows rows of a panel at a time: they and the cache lines that they come from stay in L1.
  constexpr int64_t kRows = 64, kColumns = kPanelColumns<T, kVectors>, kLanes = Vec<T>::kLanes;
  static constexpr W kZeros[kRows] = {};
  const W* from[kColumns];
  int64_t to[kColumns];
  each_column<T, kVectors>(args, [&](int64_t panel, int64_t slot, int64_t column) {
    from[slot] = column < 0 ? nullptr : static_cast<const W*>(args.b) + column * args.stride_column;
    to[slot] = slot;
    if constexpr (std::is_same_v<W, Bfloat16>) {  // two vectors interleaved: Vec::load_even
      const int64_t vector = slot / kLanes, lane = slot % kLanes;
      if (vector / 2 * 2 + 1 < kVectors) to[slot] = vector / 2 * 2 * kLanes + 2 * lane + vector % 2;
    }
    if (slot + 1 < kColumns) return;
    // This was the last column of the panel: all places are known.
    for (int64_t begin = 0; begin < args.k; begin += kRows) {
      W* const rows = static_cast<W*>(args.packed) + (panel * args.k + begin) * kColumns;
      const int64_t count = std::min(kRows, args.k - begin);
      for (int64_t s = 0; s < kColumns; ++s) {
        if constexpr (std::is_same_v<W, float>) {
          if (args.stride_k == 1) {  // a vector of columns
            const float* columns[kLanes];
            for (int64_t lane = 0; lane < kLanes; ++lane) {
              const float* const column = from[s + lane];
              columns[lane] = column == nullptr ? kZeros : column + begin;
              // The next kRows.
              for (int64_t i = kRows; i < 2 * kRows; i += 16)
                __builtin_prefetch(columns[lane] + i, 0, 2);
            }
            transpose_rows(columns, kLanes, count, kColumns, rows + s);
            s += kLanes - 1;
            continue;
          }
        }
        for (int64_t i = 0; i < count; ++i)
          rows[i * kColumns + to[s]] =
              from[s] == nullptr ? W{} : from[s][(begin + i) * args.stride_k];
      }
    }
  });
}

// For one gate and contiguous rows of B: each row of a panel is copied.
template <typename T>
inline void pack_rows(const PackArgs& args) {
  constexpr int64_t kColumns = kPanelColumns<T, panel_vectors(1)>;
  const T* const b = static_cast<const T*>(args.b);
  for (int64_t panel = args.panels.begin; panel < args.panels.end; ++panel) {
    const int64_t count = std::min(kColumns, args.columns - panel * kColumns);
    T* to = static_cast<T*>(args.packed) + panel * args.k * kColumns;
    for (int64_t i = 0; i < args.k; ++i, to += kColumns) {
      std::copy_n(b + i * args.stride_k + panel * kColumns, count, to);
      std::fill_n(to + count, kColumns - count, T(0));
    }
  }
}

// For T = float, where Vec<T>::kPairs. S: Bfloat16, or T, which is rounded.
template <typename T, int kVectors, typename S>
inline void pack_pairs(const PackArgs& args) {
  constexpr int64_t kColumns = kPanelColumns<T, kVectors>, kLanes = Vec<T>::kLanes;
  const S* const b = static_cast<const S*>(args.b);
  const int64_t pairs = groups_of(args.format, args.k, 2);
  // Vector by vector in tiles, else row by row.
  const bool tiles = in_tiles(args.format);
  const int64_t stride = tiles ? kLanes : kColumns, to_next = tiles ? pairs * kLanes : kLanes;
  const auto place = [&](int64_t panel, int64_t i, int64_t slot) {
    return static_cast<Pair*>(args.packed) + panel * pairs * kColumns + i * stride +
           slot / kLanes * to_next;
  };
  if (args.gates == 1 && args.stride_column == 1) {  // two rows of B at a time
    for (int64_t panel = args.panels.begin; panel < args.panels.end; ++panel)
      for (int64_t i = 0; i < pairs; ++i)
        for (int64_t slot = 0; slot < kColumns; slot += kLanes) {
          const int64_t column = panel * kColumns + slot, left = args.columns - column;
          const auto row = [&](int64_t k) __attribute__((always_inline)) {
            const S* const at = b + k * args.stride_k + column;
            return k >= args.k || left <= 0 ? Vec<T>::set(0)
                   : left >= kLanes         ? Vec<T>::load(at)
                                            : Vec<T>::load(at, left);
          };
          Vec<T>::store_pairs(row(2 * i), row(2 * i + 1), place(panel, i, slot));
        }
    return;
  }
  constexpr int64_t kRows = 64;  // as in pack_as
  const S* from[kColumns];
  each_column<T, kVectors>(args, [&](int64_t panel, int64_t slot, int64_t column) {
    from[slot] = column < 0 ? nullptr : b + column * args.stride_column;
    if (slot + 1 < kColumns) return;
    for (int64_t begin = 0; begin < 2 * pairs; begin += kRows) {
      const int64_t count = std::clamp<int64_t>(args.k - begin, 0, kRows);
      for (int64_t first = 0; first < kColumns; first += kLanes) {
        T rounded[kLanes][kRows / 2] = {};  // Pairs, in the place of floats
        const T* columns[kLanes];
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          columns[lane] = rounded[lane];
          const S* const at = from[first + lane];
          if (at == nullptr) continue;
          if constexpr (std::is_same_v<S, Bfloat16>)
            if (args.stride_k == 1) {
              __builtin_memcpy(rounded[lane], at + begin, count * sizeof(S));
              continue;
            }
          S values[kRows] = {};
          for (int64_t i = 0; i < count; ++i) values[i] = at[(begin + i) * args.stride_k];
          for (int64_t i = 0; i < kRows; i += kLanes)
            Vec<T>::load(values + i).round_to(reinterpret_cast<Bfloat16*>(rounded[lane]) + i);
        }
        transpose_rows(columns, kLanes, std::min(kRows / 2, pairs - begin / 2), stride,
                       reinterpret_cast<T*>(place(panel, begin / 2, first)));
      }
    }
  });
}

template <int kVectors>
inline void pack_int8(const PackArgs& args) {
  using Operand = Int8Operand<kVectors>;
  constexpr int64_t kLanes = Vec<float>::kLanes;
  const int64_t groups = groups_of(args.format, args.k, Dot::kDepth);
  const bool tiles = in_tiles(args.format);  // as in pack_pairs
  const int64_t stride = tiles ? kLanes : Operand::kColumns;
  const int64_t to_next = tiles ? groups * kLanes : kLanes;
  each_column<float, kVectors>(args, [&](int64_t panel, int64_t slot, int64_t column) {
    char* const base = static_cast<char*>(args.packed) + panel * Operand::panel_bytes(groups);
    const int8_t* from = static_cast<const int8_t*>(args.b) + column * args.stride_column;
    int32_t sum = 0;
    for (int64_t i = 0; i < groups * Dot::kDepth; ++i) {
      const int8_t weight = column < 0 || i >= args.k ? 0 : from[i * args.stride_k];
      const int64_t at = i / Dot::kDepth * stride + slot / kLanes * to_next + slot % kLanes;
      base[at * Dot::kDepth + i % Dot::kDepth] = weight;
      sum += weight;
    }
    float* const tail = reinterpret_cast<float*>(base + Operand::kColumns * groups * Dot::kDepth);
    tail[slot] = column < 0 ? 0 : args.scales[column];
    reinterpret_cast<int32_t*>(tail + Operand::kColumns)[slot] = -Dot::kZero * sum;
  });
}

template <typename T, int kVectors>
inline void pack_vectors(const PackArgs& args) {
  switch (args.format) {
    case Format::kSame:
      return args.gates == 1 && args.stride_column == 1 ? pack_rows<T>(args)
                                                        : pack_as<T, kVectors, T>(args);
    case Format::kFloat16:
      return pack_as<T, kVectors, Float16>(args);
    case Format::kBfloat16:
      return pack_as<T, kVectors, Bfloat16>(args);
    case Format::kInt8:
    case Format::kInt8Fine:
    case Format::kInt8Tiles:
    case Format::kInt8FineTiles:
      return pack_int8<kVectors>(args);
    case Format::kPairs:
    case Format::kTiles:
      if constexpr (Vec<T>::kPairs)
        args.rounds ? pack_pairs<T, kVectors, T>(args) : pack_pairs<T, kVectors, Bfloat16>(args);
  }
}

template <typename T>
void pack(const PackArgs& args) {
  panel_vectors(args.gates) == 3 ? pack_vectors<T, 3>(args) : pack_vectors<T, 4>(args);
}

// For T = float, where Vec<T>::kPairs.
template <typename T>
inline void transpose_pairs(const TransposeArgs<T>& args) {
  using V = Vec<T>;
  constexpr int64_t kLanes = V::kLanes, kRows = 2 * kTileSize;  // of a tile
  const bool tiles = in_tiles(args.format);
  for (int64_t column = 0; column < args.columns; column += kLanes) {
    const int64_t columns = std::min(kLanes, args.columns - column);
    const auto load = [&](const T* from) {
      return columns == kLanes ? V::load(from) : V::load(from, columns);
    };
    const auto [first_line, apart] = lines_of(tiles, column, args.to_stride, kTileSize);
    T* to = args.to + first_line;
    const int64_t stride = tiles ? kTileSize : args.to_stride;
    V sum = V::set(0);
    for (int64_t row = 0; row < args.rows; row += kRows) {
      alignas(64) T pairs[kTileSize][kLanes];
      const T* lines[kTileSize];
      for (int64_t p = 0; p < kTileSize; ++p) {
        const int64_t at = row + 2 * p;
        const T* const from = args.from + at * args.from_stride + column;
        const V first = at < args.rows ? load(from) : V::set(0);
        const V second = at + 1 < args.rows ? load(from + args.from_stride) : V::set(0);
        __builtin_prefetch(from + kRows * args.from_stride, 0, 2);
        __builtin_prefetch(from + (kRows + 1) * args.from_stride, 0, 2);
        sum = sum + first + second;
        V::store_pairs(first, second, reinterpret_cast<Pair*>(pairs[p]));
        lines[p] = pairs[p];
      }
      for (int64_t p = 0; p < kTileSize; p += kLanes)
        transpose_rows(lines + p, kLanes, columns, stride, to + p);
      to += apart;
    }
    sum = sum + load(args.sums + column);
    columns == kLanes ? sum.store(args.sums + column) : sum.store(args.sums + column, columns);
  }
}

template <typename T>
void transpose(const TransposeArgs<T>& args) {
  using V = Vec<T>;
  if constexpr (V::kPairs)
    if (is_pairs(args.format)) return transpose_pairs(args);
  // Blocks of a cache line by a cache line, from top to bottom. So few lines are written at a time
  // that they stay in L1 even if they fall into one set. The next block is prefetched.
  constexpr int64_t kRows = 16, kColumns = 16;
  static_assert(kColumns % V::kLanes == 0);
  for (int64_t column = 0; column < args.columns; column += kColumns) {
    const int64_t columns = std::min(kColumns, args.columns - column);
    V sums[kColumns / V::kLanes];
    for (V& sum : sums) sum = V::set(0);
    for (int64_t row = 0; row < args.rows; row += kRows) {
      const int64_t rows = std::min(kRows, args.rows - row);
      const T* const from = args.from + row * args.from_stride + column;
      T* const to = args.to + column * args.to_stride + row;
      for (int64_t r = 0; r < rows; ++r)
        __builtin_prefetch(from + (kRows + r) * args.from_stride, 0, 2);
      if constexpr (std::is_same_v<T, float>)
        for (int64_t r = 0; r < rows; r += V::kLanes) {
          const float* lines[V::kLanes];
          const int64_t lanes = std::min(V::kLanes, rows - r);
          for (int64_t lane = 0; lane < V::kLanes; ++lane)
            lines[lane] = from + (r + std::min(lane, lanes - 1)) * args.from_stride;
          transpose_rows(lines, lanes, columns, args.to_stride, to + r);
        }
      else
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < columns; ++c)
            to[c * args.to_stride + r] = from[r * args.from_stride + c];
      for (int64_t c = 0; c < columns; c += V::kLanes)
        for (int64_t r = 0; r < rows; ++r) {
          const T* const at = from + r * args.from_stride + c;
          V& sum = sums[c / V::kLanes];
          sum = sum + (columns - c >= V::kLanes ? V::load(at) : V::load(at, columns - c));
        }
    }
    for (int64_t c = 0; c < columns; c += V::kLanes) {
      T* const to = args.sums + column + c;
      const int64_t left = columns - c;
      if (left >= V::kLanes)
        (V::load(to) + sums[c / V::kLanes]).store(to);
      else
        (V::load(to, left) + sums[c / V::kLanes]).store(to, left);
    }
  }
}
