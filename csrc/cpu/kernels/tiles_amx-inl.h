// SPDX-License-Identifier: Apache-2.0
// Packed matrices multiplied by the tiles of AMX: 16 rows of 64 bytes each.

constexpr bool kHasTiles = true;

// All eight tiles whole: operands are filled up to that.
struct alignas(64) TileShapes {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// out = a @ b for Rows tiles of rows of `a` and Vectors vectors of columns of `b`, over `blocks`
// tiles along K; strides in bytes. With two of each, a tile that is loaded serves two products.
template <bool kIntegers, int Rows, int Vectors>
__attribute__((noinline)) void multiply_tiles(const char* a, int64_t a_stride, const char* b,
                                              int64_t b_stride, int64_t blocks, char* out,
                                              int64_t out_stride) {
  // GCC's tile intrinsics do not tell it that they read and write memory.
  __asm__ volatile("" ::: "memory");
  _tile_zero(0);
  if constexpr (Vectors == 2) _tile_zero(1);
  if constexpr (Rows == 2) _tile_zero(2);
  if constexpr (Rows == 2 && Vectors == 2) _tile_zero(3);
  for (int64_t i = 0; i < blocks; ++i, a += 64, b += kTileSize * b_stride) {
    _tile_loadd(6, b, b_stride);
    if constexpr (Vectors == 2) _tile_loadd(7, b + 64, b_stride);
    _tile_loadd(4, a, a_stride);
    if constexpr (Rows == 2) _tile_loadd(5, a + kTileSize * a_stride, a_stride);
    if constexpr (kIntegers) {  // unsigned times signed
      _tile_dpbusd(0, 4, 6);
      if constexpr (Vectors == 2) _tile_dpbusd(1, 4, 7);
      if constexpr (Rows == 2) _tile_dpbusd(2, 5, 6);
      if constexpr (Rows == 2 && Vectors == 2) _tile_dpbusd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (Vectors == 2) _tile_dpbf16ps(1, 4, 7);
      if constexpr (Rows == 2) _tile_dpbf16ps(2, 5, 6);
      if constexpr (Rows == 2 && Vectors == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, out_stride);
  if constexpr (Vectors == 2) _tile_stored(1, out + 64, out_stride);
  if constexpr (Rows == 2) _tile_stored(2, out + kTileSize * out_stride, out_stride);
  if constexpr (Rows == 2 && Vectors == 2)
    _tile_stored(3, out + kTileSize * out_stride + 64, out_stride);
  __asm__ volatile("" ::: "memory");
}

// The same with the numbers of tiles and vectors, 1 or 2, as constants.
template <bool kIntegers>
inline void multiply_tiles(int64_t rows, int64_t vectors, const void* a, int64_t a_stride,
                           const void* b, int64_t b_stride, int64_t blocks, void* out,
                           int64_t out_stride) {
  const auto multiply =
      rows == 1 ? vectors == 1 ? &multiply_tiles<kIntegers, 1, 1> : &multiply_tiles<kIntegers, 1, 2>
      : vectors == 1 ? &multiply_tiles<kIntegers, 2, 1>
                     : &multiply_tiles<kIntegers, 2, 2>;
  multiply(static_cast<const char*>(a), a_stride, static_cast<const char*>(b), b_stride, blocks,
           static_cast<char*>(out), out_stride);
}

// Format::kTiles: rows of Pairs, `pairs` of them, in the place of floats.
template <int kVectors>
struct PairTiles {
  const float* a;
  int64_t pairs;
  const void* panels;

  // The sums of 1 or 2 tiles of rows from `row` on, and of 1 or 2 vectors of a panel.
  void multiply(int64_t row, int64_t tiles, int64_t panel, int64_t vector, int64_t vectors,
                float* sums) const {
    constexpr int64_t kColumns = kPanelColumns<float, kVectors>;
    const Pair* const weights = static_cast<const Pair*>(panels) + panel * pairs * kColumns;
    multiply_tiles<false>(tiles, vectors, a + row * pairs, pairs * 4,
                          weights + vector * Vec<float>::kLanes, kColumns * 4, pairs / kTileSize,
                          sums, kColumns * 4);
  }
};

// Format::kInt8Tiles and kInt8FineTiles.
template <int kVectors>
struct Int8Tiles {
  const Int8Operand<kVectors>& operand;

  // As PairTiles::multiply.
  void multiply(int64_t row, int64_t tiles, int64_t panel, int64_t vector, int64_t vectors,
                float* sums) const {
    constexpr int64_t kLanes = Vec<float>::kLanes, kColumns = kPanelColumns<float, kVectors>;
    constexpr int64_t kDepth = Dot::kDepth;
    static_assert(kDepth == 4 && sizeof(Dot::Activation) == 1);
    const auto& [rows, groups, terms, spaced, scales, a, panels] = operand;
    const char* const weights = panels + panel * operand.panel_bytes(groups);
    const auto* const column_scales =
        reinterpret_cast<const float*>(weights + kColumns * groups * kDepth) + vector * kLanes;
    const auto* const initial = reinterpret_cast<const int32_t*>(column_scales + kColumns);
    const int64_t count = std::min(tiles * kTileSize, rows - row);
    for (int64_t term = 0; term < terms; ++term) {
      const float* const row_scales = scales + term * spaced + row;
      if (term == 1 && std::all_of(row_scales, row_scales + count, [](float s) { return s == 0; }))
        return;
      alignas(64) int32_t products[2 * kTileSize][2 * kTileSize];
      multiply_tiles<true>(tiles, vectors, a + (term * spaced + row) * groups * kDepth,
                           groups * kDepth, weights + vector * kLanes * kDepth, kColumns * kDepth,
                           groups / kTileSize, products, sizeof(products[0]));
      for (int64_t r = 0; r < count; ++r)
        for (int64_t v = 0; v < vectors; ++v) {
          const Dot sum = Dot::load(&products[r][v * kLanes]) + Dot::load(initial + v * kLanes);
          const Vec<float> product = sum.to_float() * Vec<float>::load(column_scales + v * kLanes) *
                                     Vec<float>::set(row_scales[r]);
          float* const to = sums + r * kColumns + v * kLanes;
          (term == 0 ? product : product + Vec<float>::load(to)).store(to);
        }
    }
  }
};

// As each_tile_of, by tiles of 16 rows and a vector of columns.
template <int kVectors, typename Operand, typename Prefetch, typename Finish>
inline void each_product(const Operand& operand, int64_t all_rows, int64_t columns,
                         PanelRange range, const Prefetch& prefetch, const Finish& finish) {
  constexpr int64_t kMost = kBlockRows / kTileSize * kTileSize;
  alignas(64) float sums[kSums<float, kVectors>];
  const TileShapes shapes;
  _tile_loadconfig(&shapes);
  for (int64_t start = 0; start < all_rows; start += kMost) {
    const int64_t rows = std::min(kMost, all_rows - start);
    for (int64_t done = range.begin; done < range.end; ++done) {
      const int64_t panel = range.backwards ? range.begin + range.end - 1 - done : done;
      const int64_t vectors =
          std::min<int64_t>(kVectors, vectors_from<float, kVectors>(panel, columns));
      for (int64_t r = 0; r < rows; r += 2 * kTileSize)
        for (int64_t v = 0; v < vectors; v += 2)
          operand.multiply(start + r, rows - r > kTileSize ? 2 : 1, panel, v,
                           std::min<int64_t>(2, vectors - v), sums + sum_at<float, kVectors>(r, v));
      prefetch(start, rows, panel, 1);
      finish(sums, start, rows, panel, int64_t{1});
    }
  }
  _tile_release();  // or a switch of threads would save them
}
