// SPDX-License-Identifier: Apache-2.0
// Packed matrices multiplied by the tiles of AMX: 16 rows of 64 bytes each.

constexpr bool kHasTiles = true;

// All eight tiles whole: operands are filled up to that. A product of fewer rows has lower tiles of
// sums and of rows, and touches less memory.
struct alignas(64) TileShapes {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

  explicit TileShapes(int64_t of_product) {
    for (int tile = 0; tile <= 4; ++tile)
      rows[tile] = static_cast<uint8_t>(std::clamp<int64_t>(of_product, 1, kTileSize));
  }
};

// A product of tiles, a @ b, over blocks [begin, end) of K. Its `blocks` tiles lie one after the
// other; the next tile of rows is a_to_next bytes away, the next vector of columns to_next. The
// sums begin with `initial`, or with zeros where it is nullptr, and stay in registers until the
// last block: then they go to out. Both have `stride` bytes from row to row.
struct TileProduct {
  const char* a;
  int64_t a_to_next;
  const char* b;
  int64_t to_next, begin, end, blocks;
  const void* initial;
  void* out;
  int64_t stride;
};

constexpr int64_t kTileBytes = kTileSize * 64;
// The hardware's prefetcher stops at the end of a page. Touching one kAhead pages before its turn
// keeps it going, where weights come from beyond the L2 cache.
constexpr int64_t kTilesOfPage = 4096 / kTileBytes, kAhead = 2;

// For Rows tiles of rows (1 or 2) and Vectors vectors of columns: up to 2, or 4 for one tile of
// rows. Each tile that is loaded serves as many products as the eight registers allow.
template <bool kIntegers, int Rows, int Vectors>
__attribute__((noinline)) void multiply_tiles(const TileProduct& of) {
  // GCC's tile intrinsics do not tell it that they read and write memory.
  __asm__ volatile("" ::: "memory");
  static_assert(Rows * Vectors <= 4 && Rows <= 2);
#define ISS_MULTIPLY(sum, a, b) /* unsigned times signed integers */ \
  do {                                                               \
    if constexpr (kIntegers)                                         \
      _tile_dpbusd(sum, a, b);                                       \
    else                                                             \
      _tile_dpbf16ps(sum, a, b);                                     \
  } while (false)
  const int64_t stride = of.stride, next_rows = kTileSize * stride;
  if (of.begin == 0 && of.initial != nullptr) {
    const char* const from = static_cast<const char*>(of.initial);
    _tile_loadd(0, from, stride);
    if constexpr (Vectors > 1) _tile_loadd(1, from + 64, stride);
    if constexpr (Vectors > 2) _tile_loadd(2, from + 128, stride);
    if constexpr (Vectors > 3) _tile_loadd(3, from + 192, stride);
    if constexpr (Rows == 2) _tile_loadd(2, from + next_rows, stride);
    if constexpr (Rows == 2 && Vectors == 2) _tile_loadd(3, from + next_rows + 64, stride);
  } else if (of.begin == 0) {
    _tile_zero(0);
    if constexpr (Vectors > 1) _tile_zero(1);
    if constexpr (Vectors > 2 || Rows == 2) _tile_zero(2);
    if constexpr (Vectors > 3 || (Rows == 2 && Vectors == 2)) _tile_zero(3);
  }
  const int64_t to_next = of.to_next;
  const char *a = of.a + of.begin * kTileBytes, *b = of.b + of.begin * kTileBytes;
  for (int64_t i = of.begin; i < of.end; ++i, a += kTileBytes, b += kTileBytes) {
    if (i % kTilesOfPage == 0)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v)
        __builtin_prefetch(b + v * to_next + kAhead * kTilesOfPage * kTileBytes, 0, 2);
    _tile_stream_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    ISS_MULTIPLY(0, 4, 6);
    if constexpr (Vectors > 1) {
      _tile_loadd(7, b + to_next, 64);
      ISS_MULTIPLY(1, 4, 7);
    }
    if constexpr (Rows == 2) {
      _tile_stream_loadd(5, a + of.a_to_next, 64);
      ISS_MULTIPLY(2, 5, 6);
      if constexpr (Vectors > 1) ISS_MULTIPLY(3, 5, 7);
    }
    if constexpr (Vectors > 2) {
      _tile_loadd(5, b + 2 * to_next, 64);
      ISS_MULTIPLY(2, 4, 5);
    }
    if constexpr (Vectors > 3) {
      _tile_loadd(6, b + 3 * to_next, 64);
      ISS_MULTIPLY(3, 4, 6);
    }
  }
#undef ISS_MULTIPLY
  if (of.end == of.blocks) {
    char* const out = static_cast<char*>(of.out);
    _tile_stored(0, out, stride);
    if constexpr (Vectors > 1) _tile_stored(1, out + 64, stride);
    if constexpr (Vectors > 2) _tile_stored(2, out + 128, stride);
    if constexpr (Vectors > 3) _tile_stored(3, out + 192, stride);
    if constexpr (Rows == 2) _tile_stored(2, out + next_rows, stride);
    if constexpr (Rows == 2 && Vectors == 2) _tile_stored(3, out + next_rows + 64, stride);
  }
  __asm__ volatile("" ::: "memory");
}

// The same with the numbers of tiles and vectors as constants.
template <bool kIntegers>
inline void multiply_tiles(int64_t rows, int64_t vectors, const TileProduct& of) {
  constexpr decltype(&multiply_tiles<kIntegers, 1, 1>) kOfOne[] = {
      &multiply_tiles<kIntegers, 1, 1>, &multiply_tiles<kIntegers, 1, 2>,
      &multiply_tiles<kIntegers, 1, 3>, &multiply_tiles<kIntegers, 1, 4>};
  const auto multiply = rows == 1      ? kOfOne[vectors - 1]
                        : vectors == 1 ? &multiply_tiles<kIntegers, 2, 1>
                                       : &multiply_tiles<kIntegers, 2, 2>;
  multiply(of);
}

// Format::kTiles. a: rows of Pairs in tiles (round_rows), a_pairs from row to row.
template <int kVectors>
struct PairTiles {
  static constexpr int64_t kColumns = kPanelColumns<float, kVectors>;
  const float* a;
  int64_t a_pairs, pairs;
  const void* panels;

  int64_t blocks() const { return pairs / kTileSize; }

  // Blocks [begin, end) of the sums of 1 or 2 tiles of rows from `row` on, and of some vectors of a
  // panel. `sums` says where the sums of the panel begin and go.
  void multiply(int64_t row, int64_t tiles, int64_t panel, int64_t vector, int64_t vectors,
                int64_t begin, int64_t end, const TileSums& sums) const {
    const int64_t to_next = pairs * kTileSize * sizeof(Pair);
    const char* const weights =
        static_cast<const char*>(panels) + panel * pairs * kColumns * sizeof(Pair);
    multiply_tiles<false>(tiles, vectors,
                          {reinterpret_cast<const char*>(a + row * a_pairs),
                           a_pairs * kTileSize * 4, weights + vector * to_next, to_next, begin, end,
                           blocks(), sums.initial ? sums.initial + vector * kTileSize : nullptr,
                           sums.out + vector * kTileSize, sums.stride * int64_t{sizeof(float)}});
  }
};

// Format::kInt8Tiles and kInt8FineTiles.
template <int kVectors>
struct Int8Tiles {
  static constexpr int64_t kLanes = Vec<float>::kLanes, kColumns = kPanelColumns<float, kVectors>;
  static constexpr int64_t kDepth = Dot::kDepth;
  static_assert(kDepth == 4 && sizeof(Dot::Activation) == 1);
  const Int8Operand<kVectors>& operand;

  int64_t blocks() const { return operand.groups / kTileSize; }

  // As PairTiles::multiply; the sums begin with zeros.
  void multiply(int64_t row, int64_t tiles, int64_t panel, int64_t vector, int64_t vectors,
                int64_t begin, int64_t end, const TileSums& to_sums) const {
    float* const sums = to_sums.out + vector * kLanes;
    const auto& [rows, groups, terms, spaced, scales, a, panels] = operand;
    const int64_t to_next = groups * kDepth * kTileSize;
    const char* const weights = panels + panel * operand.panel_bytes(groups);
    const auto* const column_scales =
        reinterpret_cast<const float*>(weights + kColumns * groups * kDepth) + vector * kLanes;
    const auto* const initial = reinterpret_cast<const int32_t*>(column_scales + kColumns);
    const int64_t count = std::min(tiles * kTileSize, rows - row);
    alignas(64) int32_t products[kTileSize * 4 * kTileSize];  // of four tiles at most
    const int64_t stride = vectors * kLanes;
    const auto multiply_term = [&](int64_t term, int64_t begin, int64_t end) {
      multiply_tiles<true>(
          tiles, vectors,
          {reinterpret_cast<const char*>(a + (term * spaced + row) * groups * kDepth), to_next,
           weights + vector * to_next, to_next, begin, end, blocks(), nullptr, products,
           stride * int64_t{sizeof(int32_t)}});
    };
    multiply_term(0, begin, end);
    if (end < blocks()) return;
    for (int64_t term = 0; term < terms; ++term) {
      const float* const row_scales = scales + term * spaced + row;
      if (term == 1) {
        if (std::all_of(row_scales, row_scales + count, [](float s) { return s == 0; })) return;
        multiply_term(1, 0, end);
      }
      for (int64_t r = 0; r < count; ++r)
        for (int64_t v = 0; v < vectors; ++v) {
          const Dot sum =
              Dot::load(products + r * stride + v * kLanes) + Dot::load(initial + v * kLanes);
          const Vec<float> product = sum.to_float() * Vec<float>::load(column_scales + v * kLanes) *
                                     Vec<float>::set(row_scales[r]);
          float* const to = sums + r * kColumns + v * kLanes;
          (term == 0 ? product : product + Vec<float>::load(to)).store(to);
        }
    }
  }
};

// As each_tile_of, by two tiles of rows at a time. While their tiles are multiplied, the vector
// units finish the sums of those before: a few rows after every kSegment blocks, so that both find
// work in the instructions that the CPU looks at together. place(row, rows, panel, buffer) says
// where the sums of `rows` rows begin and go (TileSums); those that do not go to `buffer` are not
// finished.
template <int kVectors, typename Operand, typename Prefetch, typename Finish, typename Place>
inline void each_product(const Operand& operand, int64_t all_rows, int64_t columns,
                         PanelRange range, const Prefetch& prefetch, const Finish& finish,
                         const Place& place) {
  constexpr int64_t kRows = 2 * kTileSize, kSegment = 4;
  constexpr int64_t kColumns = kPanelColumns<float, kVectors>;
  alignas(64) float sums[2][kRows * kColumns];
  const int64_t blocks = operand.blocks();
  // Each pass over K is cut into segments. Where K is 0 there is one, which sets the sums to 0.
  const int64_t segments = std::max<int64_t>(1, (blocks + kSegment - 1) / kSegment);
  struct {
    float* sums;
    int64_t row, rows = 0, panel;
  } ready;
  const auto finish_rows = [&](int64_t rows) {
    rows = std::min(rows, ready.rows);
    if (rows == 0) return;
    finish(ready.sums, ready.row, rows, ready.panel, int64_t{1});
    ready.sums += rows * kColumns;
    ready.row += rows;
    ready.rows -= rows;
  };
  const TileShapes shapes(all_rows);
  _tile_loadconfig(&shapes);
  int now = 0;
  for (int64_t done = range.begin; done < range.end; ++done) {
    const int64_t panel = range.backwards ? range.begin + range.end - 1 - done : done;
    const int64_t vectors =
        std::min<int64_t>(kVectors, vectors_from<float, kVectors>(panel, columns));
    for (int64_t row = 0; row < all_rows; row += kRows, now = 1 - now) {
      const int64_t rows = std::min(kRows, all_rows - row), tiles = rows > kTileSize ? 2 : 1;
      const int64_t most = tiles == 1 ? 4 : 2;
      const int64_t passes = (vectors + most - 1) / most;
      const int64_t each = (ready.rows + passes * segments - 1) / (passes * segments);
      const TileSums to = place(row, rows, panel, sums[now]);
      prefetch(row, rows, panel, 1);
      for (int64_t v = 0; v < vectors; v += most) {
        int64_t begin = 0;
        do {
          const int64_t end = std::min(begin + kSegment, blocks);
          operand.multiply(row, tiles, panel, v, std::min(most, vectors - v), begin, end, to);
          finish_rows(each);
          begin = end;
        } while (begin < blocks);
      }
      finish_rows(kRows);
      if (to.out == sums[now]) ready = {sums[now], row, rows, panel};
    }
  }
  finish_rows(kRows);
  _tile_release();  // or a switch of threads would save them
}
