// SPDX-License-Identifier: Apache-2.0
// A packed matrix of 8-bit integers, times rows that are quantised on the fly.

// B has 8 bits and a scale for each column. Rows of `a` are quantised to 8 bits (7 on AVX2) with a
// scale each, or to two such terms; the second term holds what the first has rounded away. A row
// has a second term only where its elements differ widely in size: small ones would be lost. The
// sums of a term are integers, so they are exact in any order.
template <int kVectors>
struct Int8Operand {
  static constexpr int kTileRows = Vec<float>::kTileRows, tile_rows = kTileRows;
  using Activation = Dot::Activation;
  static constexpr int64_t kColumns = kPanelColumns<float, kVectors>;
  // A larger element counts as this. Gates then saturate, as they do for an infinite sum; with inf
  // itself, 0 * inf would be NaN.
  static constexpr float kLargest = kInt8Largest;
  // A row without a larger element counts as zeros: kLevels / size would overflow.
  static constexpr float kSmallest = 0x1p-112f;
  // A row has a second term where its largest element is this much larger than its mean nonzero
  // element, in powers of two; normally distributed features stay below. A row of up to kFew
  // elements always has one.
  static constexpr float kWide = 3.5;
  static constexpr int64_t kFew = 32;

  int64_t rows, groups, terms;
  int64_t spaced;       // rows, or as many as whole tiles have
  const float* scales;  // [terms, spaced]; the second is 0 for a row of one term
  const Activation* a;  // [terms, spaced, groups * kDepth], a row of tiles in lines (round_rows)
  const char* panels;

  static constexpr int64_t panel_bytes(int64_t groups) {
    return kColumns * (groups * Dot::kDepth + 8);
  }

  Int8Operand(const float* rows_of_a, int64_t rows, int64_t stride, int64_t k, Packed b,
              void* scratch)
      : rows(rows),
        groups(groups_of(b.format, k, Dot::kDepth)),
        terms(is_fine(b.format) ? 2 : 1),
        spaced(in_tiles(b.format) ? whole_tiles(rows) : rows),
        panels(static_cast<const char*>(b.panels)) {
    float* const row_scales = static_cast<float*>(scratch);
    Activation* const activations = reinterpret_cast<Activation*>(row_scales + terms * spaced);
    scales = row_scales;
    a = activations;
    // Rows are written in lines, which are side by side but in tiles.
    constexpr int64_t kLine = kTileSize * Dot::kDepth;
    const bool tiles = in_tiles(b.format);
    for (int64_t r = 0; r < rows; ++r) {
      const float* const from = rows_of_a + r * stride;
      // Without their signs, floats compare as their bits do; NaN has the largest.
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
          row_scales[term * spaced + r] = its_scale;
          const auto [first, apart] =
              lines_of(tiles, term * spaced + r, groups * Dot::kDepth, kLine);
          Activation* line = activations + first;
          for (int64_t begin = 0; begin < k; begin += kLine, line += apart) {
            const int64_t count = std::min(kLine, k - begin);
            // steps(i) has 1.5 * 2^23 added, so the rounded integer is in its low bits.
            for (int64_t i = 0; i < count; ++i)
              line[i] = static_cast<Activation>(std::bit_cast<int32_t>(steps(begin + i)) -
                                                std::bit_cast<int32_t>(kShift) + Dot::kZero);
            const int64_t filled = std::min(kLine, groups * Dot::kDepth - begin);
            for (int64_t i = count; i < filled; ++i) line[i] = 0;  // the weights there are 0
          }
        };
        put(0, scale, [&](int64_t i) { return element(i) * inverse + kShift; });
        if (terms == 2) row_scales[spaced + r] = 0;
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

  template <int Rows, int Vectors, typename D = Dot>
  __attribute__((noinline)) void multiply(int64_t row, int64_t panel, int64_t, int64_t,
                                          float* sums) const {
    constexpr int kLanes = Vec<float>::kLanes;
    const int64_t steps = groups, bytes = panel_bytes(groups);
    const int8_t* const weights = reinterpret_cast<const int8_t*>(panels + panel * bytes);
    const auto* const tail =
        reinterpret_cast<const float*>(weights + kColumns * steps * Dot::kDepth);
    const auto of_vector = [&](const auto* at, int j) {
      const int next = j / kVectors, vector = j % kVectors;
      return reinterpret_cast<decltype(at)>(reinterpret_cast<const char*>(at) + next * bytes) +
             vector * kLanes;
    };
    for (int64_t term = 0; term < terms; ++term) {
      if (term == 1) {
        bool wide = false;
        for (int r = 0; r < Rows; ++r) wide |= scales[spaced + row + r] != 0;
        if (!wide) return;
      }
      const Activation* const x = a + (term * spaced + row) * steps * Dot::kDepth;
      const float* const x_scales = scales + term * spaced + row;
      Dot sum[Rows][Vectors];
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
        for (int j = 0; j < Vectors; ++j)
          sum[r][j] = Dot::load(reinterpret_cast<const int32_t*>(of_vector(tail + kColumns, j)));
      const auto group = [&](int64_t r, int64_t i) { return x + (r * steps + i) * Dot::kDepth; };
      const auto at = [&](int64_t i, int j) {
        return weights + i * kColumns * Dot::kDepth + j / kVectors * bytes +
               j % kVectors * kLanes * Dot::kDepth;
      };
      int64_t i = 0;
      if constexpr (Rows > 1 && requires { typename D::TwoRows; })
        i = by_two_rows<typename D::TwoRows>(sum, steps, group, at, [](int64_t) {});
      for (; i < steps; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < Vectors; ++j)
#pragma GCC unroll 16
          for (int r = 0; r < Rows; ++r) sum[r][j] = sum[r][j].plus(group(r, i), at(i, j));
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
        for (int j = 0; j < Vectors; ++j) {
          float* const to = sums + sum_at<float, kVectors>(r, j);
          const Vec<float> product = sum[r][j].to_float() * Vec<float>::load(of_vector(tail, j)) *
                                     Vec<float>::set(x_scales[r]);
          (term == 0 ? product : product + Vec<float>::load(to)).store(to);
        }
    }
  }

 private:
  static constexpr float kShift = 0x1.8p23f;
};
