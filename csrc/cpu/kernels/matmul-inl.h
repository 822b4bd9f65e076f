// SPDX-License-Identifier: Apache-2.0
// A product with a matrix, by the tiles of its operand.

// The tiles of a [rows, k] @ b [k, columns], in panels of kVectors.
template <typename T, int kVectors, typename Prefetch, typename Finish>
inline void each_tile(const T* a, int64_t stride, int64_t rows, int64_t k, Packed b,
                      int64_t columns, PanelRange panels, void* scratch, const Prefetch& prefetch,
                      const Finish& finish) {
  const auto floats = [&]<typename W>(const W* weights) {
    each_tile_of<T, kVectors>(FloatOperand<T, kVectors, W>(a, stride, rows, k, panels, weights),
                              rows, k, columns, panels, prefetch, finish);
  };
  if constexpr (std::is_same_v<T, float>) {
    if (b.format == Format::kFloat16 && rows == 1 && Vec<T>::halves())
      return each_panel_of<T, kVectors, kMostPanels>(
          FloatOperand<T, kVectors, Float16, true>(a, stride, rows, k, panels, b.panels), k,
          columns, panels, prefetch, finish);
    if (b.format == Format::kFloat16) return floats(static_cast<const Float16*>(b.panels));
    if (b.format == Format::kBfloat16) return floats(static_cast<const Bfloat16*>(b.panels));
    if (b.format == Format::kInt8 || b.format == Format::kInt8Fine) {
      const int64_t terms = b.format == Format::kInt8 ? 1 : 2;
      return each_tile_of<T, kVectors>(
          Int8Operand<kVectors>(a, rows, stride, k, terms, b.panels, scratch), rows, k, columns,
          panels, prefetch, finish);
    }
  }
  floats(static_cast<const T*>(b.panels));
}

template <typename T>
void matmul(const MatmulArgs<T>& args) {
  constexpr int kVectors = panel_vectors(1);
  constexpr int64_t kLanes = Vec<T>::kLanes, kColumns = kPanelColumns<T, kVectors>;
  const auto prefetch = [&](int64_t row, int64_t rows, int64_t panel, int64_t panels) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t at = panel * kColumns; at < (panel + panels) * kColumns; at += 64 / sizeof(T))
        __builtin_prefetch(args.out + (row + r) * args.out_stride + at, 1, 2);
  };
  const auto finish = [&](const T* sums, auto row, auto rows, int64_t panel,
                          auto panels) __attribute__((noinline)) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t column = (panel + p) * kColumns;
        const int64_t left = args.columns - column;
        const T* const sum = sums + sum_at<T, kVectors>(r, p * kVectors);
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
        if (left >= kColumns)
#pragma GCC unroll 4
          for (int64_t at = 0; at < kColumns; at += kLanes) put(at, kLanes);
        else
          for (int64_t at = 0; at < left; at += kLanes) put(at, left - at);
      }
  };
  if (args.b.order == Order::kPanels)
    return each_tile<T, kVectors>(args.a, args.a_stride, args.rows, args.k, args.b, args.columns,
                                  args.panels, args.scratch, prefetch, finish);
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
