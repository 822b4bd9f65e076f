// SPDX-License-Identifier: Apache-2.0
// One time step of a cell, forward and backward. The forward product leaves all gates of the same
// units in one tile, and its finish computes the cell from them, so the sums need not be stored.
// The backward product leaves dh in a tile, and its finish computes the gradients of the gates.

// Loads and stores whole vectors, or the first `left` lanes where fewer units are left.
template <typename T>
struct Whole {
  static ISS_CELL Vec<T> load(const T* from) { return Vec<T>::load(from); }
  static ISS_CELL void store(Vec<T> value, T* to) { value.store(to); }
  static constexpr int64_t apart() { return Vec<T>::kLanes; }
};
template <typename T>
struct Part {
  int64_t left;
  ISS_CELL Vec<T> load(const T* from) const { return Vec<T>::load(from, left); }
  ISS_CELL void store(Vec<T> value, T* to) const { value.store(to, left); }
  int64_t apart() const { return left; }  // the gates of a last block stand close together
};

template <typename Cell, typename T>
void step(const StepArgs<T>& args) {
  constexpr int kGates = Cell::kGates, kVectors = panel_vectors(kGates);
  constexpr int64_t kLanes = Vec<T>::kLanes, kBlocks = kVectors / kGates;
  const int64_t hidden = args.hidden;
  const auto prefetch = [&](int64_t first_row, int64_t rows, int64_t panel, int64_t panels) {
    if (rows == 1) return;
    for (int64_t row = first_row; row < first_row + rows; ++row) {
      const int64_t last = std::min((panel + panels) * kBlocks * kLanes, hidden) - 1;
      for (int64_t k = 0; k < kGates && args.inputs_stride > 0; ++k)
        __builtin_prefetch(args.inputs + row * args.inputs_stride + k * hidden + last, 0, 2);
      __builtin_prefetch(args.before + row * args.before_stride + last, 0, 2);
    }
  };
  // V: Vec<T>, or Rough with activations of its own.
  const auto finish_as = [&]<typename V>(V, const T* sums, auto first_row, auto rows, int64_t panel,
                                         auto panels) __attribute__((noinline)) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = first_row + r;
      const bool reset = args.resets != nullptr && args.resets[row];
      for (int64_t b = 0; b < panels * kBlocks; ++b) {
        const int64_t unit = (panel * kBlocks + b) * kLanes, left = hidden - unit;
        if (kBlocks > 1 && left <= 0) break;
        const T* const sum = sums + sum_at<T, kVectors>(r, b * kGates);
        const T* const inputs = args.inputs + row * args.inputs_stride + unit;
        const auto finish_block = [&](const auto& lanes) __attribute__((always_inline)) {
          V gates[kGates], input[kGates];
          V before = lanes.load(args.before + row * args.before_stride + unit);
#pragma GCC unroll 4
          for (int64_t k = 0; k < kGates; ++k) {
            gates[k] = lanes.load(sum + k * lanes.apart());
            input[k] = lanes.load(inputs + k * hidden);
          }
          if (reset) {  // the state is zero, and so is its product
            before = V::set(0);
            if (args.initial == nullptr)  // else the product of this row was with zeros
              for (V& gate : gates) gate = V::set(0);
          }
          V bias = V::set(Cell::kMasked ? 1 : 0), saved, h;
          if (Cell::kProductBias && args.product_bias != nullptr)
            bias = lanes.load(args.product_bias + row * args.product_bias_stride + unit);
          if (Cell::kMasked && args.mask != nullptr)
            bias = lanes.load(args.mask + row * hidden + unit);
          Cell::forward(gates, input, before, bias, saved, h);
          if constexpr (Cell::kHasC) lanes.store(saved, args.c + row * hidden + unit);
          lanes.store(h, args.h + row * args.h_stride + unit);
          if (Cell::kMasked && args.state_mask != nullptr)
            lanes.store(h * lanes.load(args.state_mask + row * hidden + unit),
                        args.masked + row * hidden + unit);
          if constexpr (Cell::kSavedGates > 0) {
            if (args.gates == nullptr) return;
            T* const to = args.gates + row * args.gates_stride + unit;
#pragma GCC unroll 4
            for (int64_t k = 0; k < Cell::kSavedGates; ++k) lanes.store(gates[k], to + k * hidden);
            if constexpr (Cell::kSavedState) lanes.store(saved, args.saved + row * hidden + unit);
          }
        };
        if (left >= kLanes)
          finish_block(Whole<T>());
        else
          finish_block(Part<T>{left});
      }
    }
  };
  const auto finish = [&](const auto&... tile) {
    if constexpr (requires { typename Vec<T>::Rough; })
      if (args.rough) return finish_as(typename Vec<T>::Rough(), tile...);
    finish_as(Vec<T>(), tile...);
  };
  const auto place = [&](int64_t row, int64_t, int64_t panel, float* buffer) -> TileSums {
    constexpr int64_t kColumns = kPanelColumns<T, kVectors>;
    if (args.initial == nullptr) return {nullptr, buffer, kColumns};
    return {
        reinterpret_cast<const float*>(args.initial) + (panel * args.initial_rows + row) * kColumns,
        buffer, kColumns};
  };
  each_tile<T, kVectors>(args.h_prev, args.h_prev_stride, args.rows, args.k, args.w_hh,
                         kGates * hidden, args.panels, args.scratch, prefetch, finish, place,
                         Elements::kFloats, args.initial == nullptr ? nullptr : args.resets);
}

template <typename Cell, typename T>
void step_backward(const StepBackwardArgs<T>& args) {
  using V = Vec<T>;
  constexpr int kGates = Cell::kGates, kVectors = panel_vectors(1);
  constexpr int64_t kLanes = V::kLanes, kColumns = kPanelColumns<T, kVectors>;
  const int64_t hidden = args.hidden;
  const auto prefetch = [&](int64_t first_row, int64_t rows, int64_t panel, int64_t panels) {
    const int64_t begin = panel * kColumns, end = std::min(begin + panels * kColumns, hidden);
    for (int64_t row = first_row; row < first_row + rows; ++row)
      for (int64_t unit = begin; unit < end; unit += 64 / sizeof(T)) {
        const int64_t at_unit = row * hidden + unit;
        if constexpr (Cell::kSavedGates > 0)
          for (int64_t k = 0; k < kGates; ++k)
            __builtin_prefetch(args.gates + row * args.gates_stride + k * hidden + unit, 0, 2);
        for (int64_t k = 0; k < kGates; ++k) {
          const int64_t at_gate = row * args.gates_stride + k * hidden + unit;
          __builtin_prefetch(args.dinputs + at_gate, 1, 2);
          if constexpr (Cell::kSplit) __builtin_prefetch(args.dproducts + at_gate, 1, 2);
        }
        if constexpr (Cell::kSavedState) __builtin_prefetch(args.saved + at_unit, 0, 2);
        if constexpr (Cell::kCarries) {
          __builtin_prefetch(args.before + row * args.before_stride + unit, 0, 2);
          __builtin_prefetch(args.carried + at_unit, 1, 2);
        } else {
          __builtin_prefetch(args.y + row * args.y_stride + unit, 0, 2);
        }
        if (args.dy != nullptr) __builtin_prefetch(args.dy + at_unit, 0, 2);
      }
  };
  const auto finish = [&](const T* sums, auto first_row, auto rows, int64_t panel,
                          auto panels) __attribute__((noinline)) {
    const int64_t begin = panel * kColumns, end = std::min(begin + panels * kColumns, hidden);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = first_row + r;
      const bool reset = args.resets != nullptr && args.resets[row];
      const bool reset_after = args.resets_after != nullptr && args.resets_after[row];
      for (int64_t unit = begin; unit < end; unit += kLanes) {
        const int64_t left = hidden - unit;
        const auto load = [&](const T* from) {
          return left >= kLanes ? V::load(from) : V::load(from, left);
        };
        const auto store = [&](V value, T* to) {
          left >= kLanes ? value.store(to) : value.store(to, left);
        };
        const int64_t at_unit = row * hidden + unit, at_gate = row * args.gates_stride + unit;
        const V zero = V::set(0);
        V gates[kGates], saved = zero, before = zero, carried = zero, y = zero;
        if constexpr (Cell::kSavedGates > 0)
#pragma GCC unroll 4
          for (int64_t k = 0; k < kGates; ++k) gates[k] = load(args.gates + at_gate + k * hidden);
        if constexpr (Cell::kSavedState) saved = load(args.saved + at_unit);
        if constexpr (Cell::kMasked)
          saved = args.mask == nullptr ? V::set(1) : load(args.mask + at_unit);
        if constexpr (Cell::kCarries) {
          if (!reset) before = load(args.before + row * args.before_stride + unit);
          carried = load(args.carried + at_unit);
        } else {
          y = load(args.y + row * args.y_stride + unit);
        }
        V dh = reset_after ? zero : V::load(sums + sum_at<T, kVectors>(r, (unit - begin) / kLanes));
        if (Cell::kMasked && args.state_mask != nullptr) dh = dh * load(args.state_mask + at_unit);
        if (args.dy != nullptr) dh = dh + load(args.dy + at_unit);
        if (args.dh_n != nullptr) dh = dh + load(args.dh_n + at_unit);
        if constexpr (Cell::kCarries && !Cell::kHasC) dh = dh + carried;
        V dinputs[kGates], dproducts[kGates], dbefore = zero;
        Cell::backward(dh, carried, gates, saved, before, y, dinputs, dproducts, dbefore);
#pragma GCC unroll 4
        for (int64_t k = 0; k < kGates; ++k) {
          store(dinputs[k], args.dinputs + at_gate + k * hidden);
          if constexpr (Cell::kSplit) store(dproducts[k], args.dproducts + at_gate + k * hidden);
        }
        if constexpr (Cell::kCarries) store(reset ? zero : dbefore, args.carried + at_unit);
      }
    }
  };
  each_tile<T, kVectors>(args.a, args.a_stride, args.rows, args.k, args.b, hidden, args.panels,
                         args.scratch, prefetch, finish, InBuffer{kColumns});
}
