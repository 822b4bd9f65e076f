// SPDX-License-Identifier: Apache-2.0
// The register tile under every matrix product here: Rows rows of `a` times Panels packed panels.
// Each sum runs over k in order with one accumulator, so a result depends neither on the other rows
// of the batch nor on how work is split: batch 1 and batch 64 give the same bits.

constexpr int kPanelVectors = 4;
// So many rows are worked on together: a multiple of every tile.
constexpr int64_t kMostRows = 66;
// A single row takes up to two panels at a time, where one has too few sums to keep in flight.
constexpr int kMostPanels = 2;

template <typename T>
constexpr int64_t kPanelColumns = kPanelVectors * Vec<T>::kLanes;

// The sums of some rows and of up to two panels: [panel][row][kPanelColumns]. A last panel that is
// partly empty leaves the end of its rows as it was.
template <typename T>
constexpr int64_t kSums = kMostPanels * kMostRows * kPanelColumns<T>;

// Where the j-th vector of row r is, counted over both panels.
template <typename T>
constexpr int64_t sum_at(int64_t r, int64_t j) {
  return (j / kPanelVectors * kMostRows + r) * kPanelColumns<T> +
         j % kPanelVectors * Vec<T>::kLanes;
}

// B stored as W: T, or what a vector of T is widened from. kHalves: as Vec<T>::halves has it.
template <typename T, typename W, bool kHalves = false>
struct Stored {
  // Several tiles of rows go over this many bytes of B while they are in the L1 cache. Tall tiles
  // take 11 bytes a cycle, which the L2 cache gives too: longer blocks then save reading sums
  // again.
  static constexpr int64_t kBlockBytes = Vec<T>::kTileRows < 6 ? 1 << 14 : 1 << 16;
  // A matrix of more bytes than kCacheBytes comes from L3 or memory, where the hardware's
  // prefetcher falls behind what several rows can use: more than two tiles ask for the next block
  // together, which paces the requests. One or two ask later, on processors that have tall tiles,
  // whose own prefetcher does better up to kFarBytes (by 0.86 to 0.95 of the time at 373 to 650
  // units): a tile that is alone for what comes kAhead bytes later, the first of two, which come
  // back to each block, for what comes kNear later.
  static constexpr int64_t kCacheBytes = 1 << 21, kAhead = 1 << 16, kNear = 1 << 13;
  static constexpr int64_t kFarBytes = Vec<T>::kTileRows < 6 ? kCacheBytes : 1 << 23;
  static constexpr int64_t kStepBytes = kPanelColumns<T> * sizeof(W);

  const T* a;
  int64_t stride, k;
  const W* panels;
  int64_t most_rows, tiles;
  bool beyond_cache, far;

  Stored(const T* a, int64_t stride, int64_t rows, int64_t k, PanelRange range, const void* packed)
      : a(a),
        stride(stride),
        k(k),
        panels(static_cast<const W*>(packed)),
        most_rows(std::min(rows, kMostRows)),
        tiles((most_rows + Vec<T>::kTileRows - 1) / Vec<T>::kTileRows),
        beyond_cache(bytes(range) > kCacheBytes),
        far(rows > 1 && bytes(range) > (tiles > 2 ? kCacheBytes : kFarBytes)) {}

  int64_t bytes(PanelRange range) const { return (range.end - range.begin) * k * kStepBytes; }

  // Rows of one panel to take at a time.
  int64_t block() const { return kBlockBytes / kStepBytes; }

  // Panels that a single row takes at a time: two where weights are widened, which the cache is
  // fast enough for, or come from afar, where the hardware's prefetcher follows both.
  int row_panels() const {
    return std::is_same_v<T, W> && !beyond_cache ? Vec<T>::kRowPanels : kMostPanels;
  }

  // The j-th vector of a step.
  template <int Rows>
  static auto load(const W* at, int j) {
    if constexpr (std::is_same_v<W, Float16>)
      return Vec<T>::template load<kHalves>(at);
    else if constexpr (std::is_same_v<W, Bfloat16>)
      return j % 2 == 0 ? Vec<T>::load_even(at)
                        : Vec<T>::template load_odd<Rows>(at - Vec<T>::kLanes);
    else
      return Vec<T>::load(at);
  }

  // sums += the products of rows [begin, end) of B; = where begin is 0. Vectors: from the panel's
  // first on, those of the next panel included.
  template <int Rows, int Vectors>
  void multiply(int64_t row, int64_t panel, int64_t begin, int64_t end, T* sums) const {
    far ? multiply_as<true, Rows, Vectors>(row, panel, begin, end, sums)
        : multiply_as<false, Rows, Vectors>(row, panel, begin, end, sums);
  }

  // Not inlined: next to the code that finishes a tile, the compiler would keep that code's
  // constants in registers and the sums in memory.
  template <bool kFar, int Rows, int Vectors>
  __attribute__((noinline)) void multiply_as(int64_t row, int64_t panel, int64_t begin, int64_t end,
                                             T* sums) const {
    const T* const x_rows = a + row * stride + begin;
    const W* const weights = panels + (panel * k + begin) * kPanelColumns<T>;
    const int64_t x_stride = stride, steps = end - begin, to_next = k * kPanelColumns<T>;
    const int64_t tile = row % kMostRows * tiles / most_rows;
    const int64_t share = kStepBytes / tiles;
    const bool together = tiles > 2, ahead = !together && tile == 0;
    const int64_t distance = tiles == 1 ? kAhead : kNear;
    const char* const here = reinterpret_cast<const char*>(weights);
    const char* next = here + steps * (kStepBytes + tile * share);
    using V = decltype(load<Rows>(weights, 0));
    V sum[Rows][Vectors];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
      for (int j = 0; j < Vectors; ++j)
        sum[r][j] = begin == 0 ? V::set(0) : V::load(sums + sum_at<T>(r, j));
    for (int64_t i = 0; i < steps; ++i) {
      V x[Rows];
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) x[r] = V::set(x_rows[r * x_stride + i]);
      const W* const of_step = weights + i * kPanelColumns<T>;
      if constexpr (kFar) {
        if (together) __builtin_prefetch(next, 0, 2);
        if (ahead)
#pragma GCC unroll 4
          for (int64_t line = 0; line < kStepBytes; line += 64)
            __builtin_prefetch(here + i * kStepBytes + distance + line, 0, 2);
        next += share;
      }
#pragma GCC unroll 16
      for (int j = 0; j < Vectors; ++j) {
        const W* const at =
            of_step + j / kPanelVectors * to_next + j % kPanelVectors * Vec<T>::kLanes;
        const V w = load<Rows>(at, j);
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) sum[r][j] = fma(x[r], w, sum[r][j]);
        // Keeps the compiler from holding both vectors of a pair: there is no register for that.
        if constexpr (std::is_same_v<W, Bfloat16> && Rows > 1) __asm__ volatile("" ::: "memory");
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
      for (int j = 0; j < Vectors; ++j) sum[r][j].store(sums + sum_at<T>(r, j));
  }
};

// B in 8 bits with a scale per column, times rows quantised to 8 bits (7 on AVX2) with a scale
// each; or to two such terms, of which the second holds what the first has rounded away. A row has
// a second term only where its elements differ widely in size, so that small ones would be lost.
// The sums of a term are integers: exact, in any order.
struct Quantised {
  using Activation = Dot::Activation;
  static constexpr int64_t kColumns = kPanelColumns<float>;
  // A larger element, also an infinite one, counts as this: gates saturate as they do for an
  // infinite sum, where 0 * inf would be NaN.
  static constexpr float kLargest = 0x1p127f;
  // A row without a larger element counts as zeros: kLevels / smaller elements would overflow.
  static constexpr float kSmallest = 0x1p-112f;
  // A row has a second term where its largest element is on average so many times the size of those
  // that are not zero, in powers of two; normal features stay below. With few elements it always
  // has.
  static constexpr float kWide = 3.5;
  static constexpr int64_t kFew = 32;

  int64_t rows, groups, terms;
  const float* scales;  // [terms, rows]; the second is 0 for a row of one term
  const Activation* a;  // [terms, rows, groups * kDepth]
  const char* panels;

  static constexpr int64_t panel_bytes(int64_t groups) {
    return kColumns * (groups * Dot::kDepth + 8);
  }

  Quantised(const float* rows_of_a, int64_t rows, int64_t stride, int64_t k, int64_t terms,
            const void* packed, void* scratch)
      : rows(rows),
        groups((k + Dot::kDepth - 1) / Dot::kDepth),
        terms(terms),
        panels(static_cast<const char*>(packed)) {
    float* const row_scales = static_cast<float*>(scratch);
    Activation* const activations = reinterpret_cast<Activation*>(row_scales + terms * rows);
    scales = row_scales;
    a = activations;
    for (int64_t r = 0; r < rows; ++r) {
      const float* const from = rows_of_a + r * stride;
      // Of floats without their sign, the larger has the larger bits; NaN's are the largest.
      uint32_t largest = 0, exponents = 0, count = 0;
      for (int64_t i = 0; i < k; ++i) {
        const uint32_t bits = std::bit_cast<uint32_t>(from[i]) & 0x7fffffffu;
        largest = std::max(largest, bits);
        exponents += bits >> 23;
        count += bits != 0;
      }
      const float size = std::bit_cast<float>(largest);
      const float mean = static_cast<float>(exponents) / std::max(count, 1u);
      const bool wide = terms == 2 && (k <= kFew || (largest >> 23) - mean > kWide);
      const auto quantise = [&](float size, const auto& element) {
        const float scale = size / Dot::kLevels;
        const float inverse = size > kSmallest ? Dot::kLevels / size : 0;
        const auto put = [&](int64_t term, float its_scale, const auto& steps) {
          row_scales[term * rows + r] = its_scale;
          Activation* const to = activations + (term * rows + r) * groups * Dot::kDepth;
          // Adding 1.5 * 2^23 has left the rounded integer in the low bits.
          for (int64_t i = 0; i < k; ++i)
            to[i] = static_cast<Activation>(std::bit_cast<int32_t>(steps(i)) -
                                            std::bit_cast<int32_t>(kShift) + Dot::kZero);
          for (int64_t i = k; i < groups * Dot::kDepth; ++i) to[i] = 0;  // the weights there are 0
        };
        put(0, scale, [&](int64_t i) { return element(i) * inverse + kShift; });
        if (terms == 2) row_scales[rows + r] = 0;
        if (!wide) return;
        constexpr float kFiner = 2 * Dot::kLevels;  // the rest is at most half a step
        put(1, scale / kFiner, [&](int64_t i) {
          const float x = element(i), rounded = x * inverse + kShift - kShift;
          return (x - rounded * scale) * (inverse * kFiner) + kShift;
        });
      };
      if (size > kLargest)
        quantise(kLargest, [&](int64_t i) { return std::clamp(from[i], -kLargest, kLargest); });
      else
        quantise(size, [&](int64_t i) { return from[i]; });
    }
  }

  int row_panels() const { return Vec<float>::kRowPanels; }

  int64_t block() const {
    return int64_t{1} << 40;
  }  // in one go: only its end turns sums to floats

  template <int Rows, int Vectors>
  __attribute__((noinline)) void multiply(int64_t row, int64_t panel, int64_t, int64_t,
                                          float* sums) const {
    constexpr int kLanes = Vec<float>::kLanes;
    const int64_t steps = groups, bytes = panel_bytes(groups);
    const int8_t* const weights = reinterpret_cast<const int8_t*>(panels + panel * bytes);
    const auto* const tail =
        reinterpret_cast<const float*>(weights + kColumns * steps * Dot::kDepth);
    const auto of_vector = [&](const auto* at, int j) {
      const int next = j / kPanelVectors, vector = j % kPanelVectors;
      return reinterpret_cast<decltype(at)>(reinterpret_cast<const char*>(at) + next * bytes) +
             vector * kLanes;
    };
    for (int64_t term = 0; term < terms; ++term) {
      if (term == 1) {
        bool wide = false;
        for (int r = 0; r < Rows; ++r) wide |= scales[rows + row + r] != 0;
        if (!wide) return;
      }
      const Activation* const x = a + (term * rows + row) * steps * Dot::kDepth;
      const float* const x_scales = scales + term * rows + row;
      Dot sum[Rows][Vectors];
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
        for (int j = 0; j < Vectors; ++j)
          sum[r][j] = Dot::load(reinterpret_cast<const int32_t*>(of_vector(tail + kColumns, j)));
      for (int64_t i = 0; i < steps; ++i) {
        const int8_t* const group = weights + i * kColumns * Dot::kDepth;
#pragma GCC unroll 16
        for (int j = 0; j < Vectors; ++j) {
          const int8_t* const at =
              group + j / kPanelVectors * bytes + j % kPanelVectors * kLanes * Dot::kDepth;
#pragma GCC unroll 16
          for (int r = 0; r < Rows; ++r)
            sum[r][j] = sum[r][j].plus(x + (r * steps + i) * Dot::kDepth, at);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
        for (int j = 0; j < Vectors; ++j) {
          float* const to = sums + sum_at<float>(r, j);
          const Vec<float> product = sum[r][j].to_float() * Vec<float>::load(of_vector(tail, j)) *
                                     Vec<float>::set(x_scales[r]);
          (term == 0 ? product : product + Vec<float>::load(to)).store(to);
        }
    }
  }

 private:
  static constexpr float kShift = 0x1.8p23f;
};

// multiply() for up to Rows rows, 0 included, and up to Vectors vectors.
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

// How many vectors of columns there are from `panel` on, where the last panel may be partly empty.
template <typename T>
inline int64_t vectors_from(int64_t panel, int64_t columns) {
  return (columns - panel * kPanelColumns<T> + Vec<T>::kLanes - 1) / Vec<T>::kLanes;
}

// A single row: each_tile_of without its loops, also within finish, which is compiled for one row.
// That much counts where a panel's product takes a few hundred cycles.
template <typename T, int kPanels, typename Operands, typename Ask, typename Finish>
inline void each_panel_of(const Operands& operands, int64_t k, int64_t columns, PanelRange range,
                          const Ask& ask, const Finish& finish) {
  constexpr std::integral_constant<int64_t, 0> kFirst;
  constexpr std::integral_constant<int64_t, 1> kOne;
  alignas(64) T sums[kSums<T>];
  for (int64_t done = range.begin; done < range.end; done += kPanels) {
    const int64_t panels = std::min<int64_t>(kPanels, range.end - done);
    // Backwards, it finds those panels in the cache that the last call came to last.
    const int64_t panel = range.backwards ? range.begin + range.end - done - panels : done;
    const int64_t vectors = std::min(panels * kPanelVectors, vectors_from<T>(panel, columns));
    ask(0, 1, panel, panels);
    tile<1, kPanels * kPanelVectors>(operands, 0, 1, panel, vectors, 0, k, sums);
    if constexpr (kPanels == 1)
      finish(sums, kFirst, kOne, panel, kOne);
    else
      finish(sums, kFirst, kOne, panel, panels);
  }
}

// Calls finish(sums, first_row, rows, first_panel, panels) until it has had all rows and panels;
// ask(first_row, rows, first_panel, panels) before the last part of those sums, to ask the cache
// for what finish reads and writes: earlier, the weights would drive it out of there again. Tiles
// are as few as registers allow, of heights as even as can be, since one of two or three rows runs
// at 0.8 of the speed; and as wide as a panel, of which the last may be partly empty. A single row
// that would be left over is a tile of its own, two panels wide.
template <typename T, typename Operands, typename Ask, typename Finish>
inline void each_tile_of(const Operands& operands, int64_t all_rows, int64_t k, int64_t columns,
                         PanelRange range, const Ask& ask, const Finish& finish) {
  if (all_rows == 1)
    return operands.row_panels() == 1
               ? each_panel_of<T, 1>(operands, k, columns, range, ask, finish)
               : each_panel_of<T, kMostPanels>(operands, k, columns, range, ask, finish);
  constexpr int kTileRows = Vec<T>::kTileRows;
  alignas(64) T sums[kSums<T>];
  for (int64_t start = 0; start < all_rows; start += kMostRows) {
    const int64_t rows = std::min(kMostRows, all_rows - start);
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    const bool single = rows % kTileRows == 1 && rows <= 4 * kTileRows;
    const int64_t most_panels = single ? kMostPanels : 1;
    const int64_t height = single ? kTileRows : rows / tiles, higher = single ? 0 : rows % tiles;
    const auto row_of = [&](int64_t t) {  // a tile's first
      return start + std::min(rows, t * height + std::min(t, higher));
    };
    const int64_t block = tiles == 1 ? k : operands.block() / most_panels;
    const int64_t group = k <= block ? 1 : tiles;
    for (int64_t panel = range.begin; panel < range.end; panel += most_panels) {
      const int64_t panels = std::min(most_panels, range.end - panel);
      const int64_t vectors = std::min(panels * kPanelVectors, vectors_from<T>(panel, columns));
      for (int64_t of = 0; of < tiles; of += group) {
        const int64_t first = row_of(of), last = row_of(of + group);
        int64_t begin = 0;
        do {
          const int64_t end = std::min(begin + block, k);
          if (end == k) ask(first, last - first, panel, panels);
          for (int64_t t = of; t < of + group; ++t) {
            const int64_t row = row_of(t), rows_here = row_of(t + 1) - row;
            T* const to = sums + sum_at<T>(row - first, 0);
            if (rows_here == 1 && single)
              tile<1, kMostPanels * kPanelVectors>(operands, row, 1, panel, vectors, begin, end,
                                                   to);
            else
              for (int64_t p = 0; p < panels; ++p)
                tile<kTileRows, kPanelVectors>(operands, row, rows_here, panel + p,
                                               vectors - p * kPanelVectors, begin, end,
                                               to + sum_at<T>(0, p * kPanelVectors));
          }
          begin = end;
        } while (begin < k);
        finish(sums, first, last - first, panel, panels);
      }
    }
  }
}

// The tiles of a [rows, k] @ b [k, columns].
template <typename T, typename Ask, typename Finish>
inline void each_tile(const T* a, int64_t stride, int64_t rows, int64_t k, Packed b,
                      int64_t columns, PanelRange panels, void* scratch, const Ask& ask,
                      const Finish& finish) {
  const auto stored = [&]<typename W>(const W* weights) {
    each_tile_of<T>(Stored<T, W>(a, stride, rows, k, panels, weights), rows, k, columns, panels,
                    ask, finish);
  };
  if constexpr (std::is_same_v<T, float>) {
    if (b.format == Format::kFloat16 && rows == 1 && Vec<T>::halves())
      return each_panel_of<T, kMostPanels>(
          Stored<T, Float16, true>(a, stride, rows, k, panels, b.panels), k, columns, panels, ask,
          finish);
    if (b.format == Format::kFloat16) return stored(static_cast<const Float16*>(b.panels));
    if (b.format == Format::kBfloat16) return stored(static_cast<const Bfloat16*>(b.panels));
    if (b.format == Format::kInt8 || b.format == Format::kInt8Fine) {
      const int64_t terms = b.format == Format::kInt8 ? 1 : 2;
      return each_tile_of<T>(Quantised(a, rows, stride, k, terms, b.panels, scratch), rows, k,
                             columns, panels, ask, finish);
    }
  }
  stored(static_cast<const T*>(b.panels));
}

// Calls visit(panel, slot, column) for each column of args.panels, -1 where there is none. Slot s
// holds column first + s; with gates, gate s / n of unit first + s % n, where n is the number of
// the panel's units: a vector's lanes, fewer in the last.
template <typename T, typename Visit>
inline void each_column(const PackArgs& args, const Visit& visit) {
  constexpr int64_t kLanes = Vec<T>::kLanes;
  const int64_t units = args.gates ? args.columns / kPanelVectors : args.columns;
  const int64_t per_panel = args.gates ? kLanes : kPanelColumns<T>;
  for (int64_t panel = args.panels.begin; panel < args.panels.end; ++panel)
    for (int64_t slot = 0; slot < kPanelColumns<T>; ++slot) {
      const int64_t first = panel * per_panel, count = std::min(per_panel, units - first);
      const int64_t column =
          args.gates ? slot / count * units + first + slot % count : first + slot;
      visit(panel, slot, column < args.columns && slot < 4 * count ? column : -1);
    }
}

// to[i * stride + s] = rows[s][i] for i < count and s < lanes. There are Vec::kLanes rows to read.
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

template <typename T, typename W>
inline void pack_as(const PackArgs& args) {
  // So many rows of a panel at a time that both they and the lines they come from stay in L1.
  constexpr int64_t kRows = 64, kColumns = kPanelColumns<T>, kLanes = Vec<T>::kLanes;
  static constexpr W kZeros[kRows] = {};
  const W* from[kColumns];
  int64_t to[kColumns];
  each_column<T>(args, [&](int64_t panel, int64_t slot, int64_t column) {
    from[slot] = column < 0 ? nullptr : static_cast<const W*>(args.b) + column * args.stride_column;
    to[slot] = slot;
    if constexpr (std::is_same_v<W, Bfloat16>) {  // two vectors interleaved: Vec::load_even
      const int64_t vector = slot / kLanes, lane = slot % kLanes;
      to[slot] = vector / 2 * 2 * kLanes + 2 * lane + vector % 2;
    }
    if (slot + 1 < kColumns) return;
    // The panel's last column: all are known.
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

// B as it is, row by row: nothing to gather.
template <typename T>
inline void pack_rows(const PackArgs& args) {
  constexpr int64_t kColumns = kPanelColumns<T>;
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

inline void pack_int8(const PackArgs& args) {
  const int64_t groups = (args.k + Dot::kDepth - 1) / Dot::kDepth;
  each_column<float>(args, [&](int64_t panel, int64_t slot, int64_t column) {
    char* const base = static_cast<char*>(args.packed) + panel * Quantised::panel_bytes(groups);
    const int8_t* from = static_cast<const int8_t*>(args.b) + column * args.stride_column;
    int32_t sum = 0;
    for (int64_t i = 0; i < groups * Dot::kDepth; ++i) {
      const int8_t weight = column < 0 || i >= args.k ? 0 : from[i * args.stride_k];
      base[(i / Dot::kDepth * Quantised::kColumns + slot) * Dot::kDepth + i % Dot::kDepth] = weight;
      sum += weight;
    }
    float* const tail = reinterpret_cast<float*>(base + Quantised::kColumns * groups * Dot::kDepth);
    tail[slot] = column < 0 ? 0 : args.scales[column];
    reinterpret_cast<int32_t*>(tail + Quantised::kColumns)[slot] = -Dot::kZero * sum;
  });
}

template <typename T>
void transpose(const TransposeArgs<T>& args) {
  using V = Vec<T>;
  // A block that is a line wide and a line high at a time, down all rows, so that the lines which
  // are written stay in L1 though they may fall into one set of it. The block below is asked for
  // ahead.
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

template <typename T>
void pack(const PackArgs& args) {
  switch (args.format) {
    case Format::kSame:
      return !args.gates && args.stride_column == 1 ? pack_rows<T>(args) : pack_as<T, T>(args);
    case Format::kFloat16:
      return pack_as<T, Float16>(args);
    case Format::kBfloat16:
      return pack_as<T, Bfloat16>(args);
    case Format::kInt8:
    case Format::kInt8Fine:
      return pack_int8(args);
  }
}

template <typename T>
void matmul(const MatmulArgs<T>& args) {
  constexpr int64_t kLanes = Vec<T>::kLanes;
  const auto ask = [&](int64_t row, int64_t rows, int64_t panel, int64_t panels) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t at = panel * kPanelColumns<T>; at < (panel + panels) * kPanelColumns<T>;
           at += 64 / sizeof(T))
        __builtin_prefetch(args.out + (row + r) * args.out_stride + at, 1, 2);
  };
  const auto finish = [&](const T* sums, auto row, auto rows, int64_t panel,
                          auto panels) __attribute__((noinline)) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t column = (panel + p) * kPanelColumns<T>;
        const int64_t left = args.columns - column;
        const T* const sum = sums + sum_at<T>(r, p * kPanelVectors);
        T* const out = args.out + (row + r) * args.out_stride + column;
        const T* const bias = args.bias == nullptr ? nullptr : args.bias + column;
        const auto put = [&](int64_t at, int64_t lanes) {
          Vec<T> value = Vec<T>::load(sum + at);
          if (bias != nullptr)
            value = value +
                    (lanes >= kLanes ? Vec<T>::load(bias + at) : Vec<T>::load(bias + at, lanes));
          if (args.accumulate)
            value =
                value + (lanes >= kLanes ? Vec<T>::load(out + at) : Vec<T>::load(out + at, lanes));
          lanes >= kLanes ? value.store(out + at) : value.store(out + at, lanes);
        };
        if (left >= kPanelColumns<T>)
#pragma GCC unroll 4
          for (int64_t at = 0; at < kPanelColumns<T>; at += kLanes) put(at, kLanes);
        else
          for (int64_t at = 0; at < left; at += kLanes) put(at, left - at);
      }
  };
  each_tile<T>(args.a, args.a_stride, args.rows, args.k, args.b, args.columns, args.panels,
               args.scratch, ask, finish);
}
