// SPDX-License-Identifier: Apache-2.0
// A packed matrix of floats: T as it is, 16 bits that are widened as a vector is loaded, or Pairs.

// B stored as W: T, a 16-bit type, or Pair. With Pair, `a` and K count Pairs too: a Pair travels in
// the place of a float, and only `plus` knows of it. kHalves: as in Vec<T>::halves().
template <typename T, int kVectors, typename W, bool kHalves = false>
struct FloatOperand {
  // A panel of three vectors leaves registers for taller tiles. The tallest of AVX-512 keep one of
  // the vectors in a register and load the others again for each row: worth it only where one tile
  // takes all rows, and then from L2 on, since the weights are read once.
  static constexpr int kTileRows =
      kVectors == 3 && sizeof(T) == sizeof(W) ? Vec<T>::kTallRows : Vec<T>::kTileRows;
  static constexpr int kManyRows = std::min(kTileRows, 6);
  // The bytes of a K block, which several tiles of rows use while it is in the L1 cache. Tall tiles
  // read 11 bytes a cycle, which the L2 cache delivers too; so their blocks are longer, and sums
  // are stored and loaded less often.
  static constexpr int64_t kBlockBytes = Vec<T>::kTileRows < 6 ? 1 << 14 : 1 << 16;
  // A matrix of more than kCacheBytes comes from L3 or memory, where the hardware prefetcher is too
  // slow for several rows. More than two tiles prefetch the next K block together, which spreads
  // the requests. One or two tiles prefetch only from kFarBytes on: on processors with tall tiles
  // the hardware does better below. A single tile prefetches kAhead bytes ahead; the first of two,
  // which use each block twice, kNear.
  static constexpr int64_t kCacheBytes = 1 << 21, kAhead = 1 << 16, kNear = 1 << 13;
  static constexpr int64_t kFarBytes = Vec<T>::kTileRows < 6 ? kCacheBytes : 1 << 23;
  static constexpr int64_t kStepBytes = kPanelColumns<T, kVectors> * sizeof(W);

  const T* a;
  int64_t stride, k;
  const W* panels;
  int64_t most_rows;
  bool beyond_cache;
  int64_t tile_rows, tiles;
  bool far;

  FloatOperand(const T* a, int64_t stride, int64_t rows, int64_t k, PanelRange range,
               const void* packed)
      : a(a),
        stride(stride),
        k(k),
        panels(static_cast<const W*>(packed)),
        most_rows(std::min(rows, kBlockRows)),
        beyond_cache(bytes(range) > kCacheBytes),
        tile_rows(most_rows < kTileRows || (most_rows == kTileRows && beyond_cache) ? kTileRows
                                                                                    : kManyRows),
        tiles((most_rows + tile_rows - 1) / tile_rows),
        far(rows > 1 && bytes(range) > (tiles > 2 ? kCacheBytes : kFarBytes)) {}

  int64_t bytes(PanelRange range) const { return (range.end - range.begin) * k * kStepBytes; }

  // Rows of a K block.
  int64_t block() const { return kBlockBytes / kStepBytes; }

  // Panels that a tile of a single row covers: two where weights are widened, since the cache is
  // fast enough, and where they come from L3 or memory, since the hardware prefetcher follows both.
  int row_panels() const {
    return std::is_same_v<T, W> && !beyond_cache ? Vec<T>::kRowPanels : kMostPanels;
  }

  // The j-th vector of a row of B, counted over both panels.
  template <int Rows>
  static auto load(const W* at, int j) {
    const int in_panel = j % kVectors;
    if constexpr (std::is_same_v<W, Float16>)
      return Vec<T>::template load<kHalves>(at);
    else if constexpr (std::is_same_v<W, Bfloat16>)
      return in_panel == 2 && kVectors == 3 ? Vec<T>::load(at)
             : in_panel % 2 == 0            ? Vec<T>::load_even(at)
                                            : Vec<T>::template load_odd<Rows>(at - Vec<T>::kLanes);
    else
      return Vec<T>::load(at);
  }

  template <typename V>
  static V plus(V x, V w, V sum) {
    if constexpr (std::is_same_v<W, Pair>)
      return V::dot(x, w, sum);
    else
      return fma(x, w, sum);
  }

  // The micro-kernel: sums += a @ rows [begin, end) of B; sums = where begin is 0. Vectors counts
  // from the first of the panel on, and may go on into the next panel.
  template <int Rows, int Vectors>
  void multiply(int64_t row, int64_t panel, int64_t begin, int64_t end, T* sums) const {
    far ? multiply_as<true, Rows, Vectors>(row, panel, begin, end, sums)
        : multiply_as<false, Rows, Vectors>(row, panel, begin, end, sums);
  }

  // Not inlined: the compiler would keep the constants of the finish in registers and the sums in
  // memory.
  template <bool kFar, int Rows, int Vectors>
  __attribute__((noinline)) void multiply_as(int64_t row, int64_t panel, int64_t begin, int64_t end,
                                             T* sums) const {
    const T* const x_rows = a + row * stride + begin;
    const W* const weights = panels + (panel * k + begin) * kPanelColumns<T, kVectors>;
    const int64_t x_stride = stride, steps = end - begin, to_next = k * kPanelColumns<T, kVectors>;
    const int64_t tile = row % kBlockRows * tiles / most_rows;
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
        sum[r][j] = begin == 0 ? V::set(0) : V::load(sums + sum_at<T, kVectors>(r, j));
    const auto prefetch = [&](int64_t i) {
      if constexpr (kFar) {
        if (together) __builtin_prefetch(next, 0, 2);
        if (ahead)
#pragma GCC unroll 4
          for (int64_t line = 0; line < kStepBytes; line += 64)
            __builtin_prefetch(here + i * kStepBytes + distance + line, 0, 2);
        next += share;
      }
    };
    // Vector j of row i of B.
    const auto at = [&](int64_t i, int j) {
      return weights + i * kPanelColumns<T, kVectors> + j / kVectors * to_next +
             j % kVectors * Vec<T>::kLanes;
    };
    int64_t i = 0;
    if constexpr (Rows > 1 && std::is_same_v<W, Pair> && requires { typename V::TwoRows; }) {
      const auto x = [&](int64_t r, int64_t i) { return x_rows + r * x_stride + i; };
      i = by_two_rows<typename V::TwoRows>(sum, steps, x, at, prefetch);
    }
    for (; i < steps; ++i) {
      prefetch(i);
      if constexpr (Rows > Vec<T>::kTileRows) {
        const V first = V::load(at(i, 0));
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
          const V x = V::set(x_rows[r * x_stride + i]);
          // Keeps the compiler from loading all vectors at once, as in a tile of fewer rows.
          if constexpr (Rows == 10) __asm__ volatile("" ::: "memory");
          sum[r][0] = plus(x, first, sum[r][0]);
#pragma GCC unroll 4
          for (int j = 1; j < Vectors; ++j) sum[r][j] = plus(x, V::load(at(i, j)), sum[r][j]);
        }
      } else {
        V x[Rows];
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) x[r] = V::set(x_rows[r * x_stride + i]);
#pragma GCC unroll 16
        for (int j = 0; j < Vectors; ++j) {
          const V w = load<Rows>(at(i, j), j);
#pragma GCC unroll 16
          for (int r = 0; r < Rows; ++r) sum[r][j] = plus(x[r], w, sum[r][j]);
          // Keeps the compiler from loading both vectors of a pair at once: registers are too few.
          if constexpr (std::is_same_v<W, Bfloat16> && Rows > 1) __asm__ volatile("" ::: "memory");
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
      for (int j = 0; j < Vectors; ++j) sum[r][j].store(sums + sum_at<T, kVectors>(r, j));
  }
};
