// SPDX-License-Identifier: Apache-2.0
// One LSTM time step, forward and backward. The forward product leaves i, f, g, o of the same units
// in one register tile, so the cell is finished there and the gates never travel through memory
// (unless training wants them saved). The backward product leaves dh there, and the gates' gradient
// follows from it.

template <typename T>
void lstm_step(const LstmStepArgs<T>& args) {
  using V = Vec<T>;
  constexpr int64_t kLanes = V::kLanes;
  const int64_t hidden = args.hidden;
  const auto ask = [&](int64_t first_row, int64_t rows, int64_t panel, int64_t panels) {
    if (rows == 1) return;
    for (int64_t row = first_row; row < first_row + rows; ++row) {
      const int64_t last = std::min((panel + panels) * kLanes, hidden) - 1;
      for (int64_t k = 0; k < 4; ++k)
        __builtin_prefetch(args.gates_x + (4 * row + k) * hidden + last, 0, 2);
      __builtin_prefetch(args.c_prev + row * hidden + last, 0, 2);
    }
  };
  const auto finish = [&](const T* sums, auto first_row, auto rows, int64_t panel,
                          auto panels) __attribute__((noinline)) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t unit = (panel + p) * kLanes, row = first_row + r;
        const int64_t left = hidden - unit;
        const T* const sum = sums + sum_at<T>(r, p * kPanelVectors);
        const int64_t at_unit = row * hidden + unit;
        const int64_t at_gate = row * 4 * hidden + unit;
        V gate[4], c_prev;
        const auto load_all = [&](int64_t apart, const auto& load) __attribute__((always_inline)) {
          c_prev = load(args.c_prev + at_unit);
#pragma GCC unroll 4
          for (int64_t k = 0; k < 4; ++k)
            gate[k] = load(sum + k * apart) + load(args.gates_x + at_gate + k * hidden);
        };
        if (left >= kLanes)
          load_all(kLanes, [](const T* from) { return V::load(from); });
        else  // the last panel: its gates stand close together
          load_all(left, [&](const T* from) { return V::load(from, left); });
        activate<T>(gate);
        const V i = gate[0], f = gate[1], g = gate[2], o = gate[3];
        const V c = fma(f, c_prev, i * g);
        const V h = o * tanh(c);
        const auto store_all = [&](const auto& store) __attribute__((always_inline)) {
          store(c, args.c + at_unit);
          store(h, args.h + row * args.h_stride + unit);
          if (args.gates == nullptr) return;
          store(i, args.gates + at_gate);
          store(f, args.gates + at_gate + hidden);
          store(g, args.gates + at_gate + 2 * hidden);
          store(o, args.gates + at_gate + 3 * hidden);
          store(c, args.cells + at_unit);
        };
        if (left >= kLanes)
          store_all([](V value, T* to) { value.store(to); });
        else
          store_all([&](V value, T* to) { value.store(to, left); });
      }
  };
  each_tile<T>(args.h_prev, args.h_prev_stride, args.rows, args.k, args.w_hh, 4 * hidden,
               args.panels, args.scratch, ask, finish);
}

template <typename T>
void lstm_step_backward(const LstmStepBackwardArgs<T>& args) {
  using V = Vec<T>;
  constexpr int64_t kLanes = V::kLanes;
  const int64_t hidden = args.hidden;
  const auto ask = [&](int64_t first_row, int64_t rows, int64_t panel, int64_t panels) {
    const int64_t begin = panel * kPanelColumns<T>;
    const int64_t end = std::min(begin + panels * kPanelColumns<T>, hidden);
    for (int64_t row = first_row; row < first_row + rows; ++row)
      for (int64_t unit = begin; unit < end; unit += 64 / sizeof(T)) {
        const int64_t at_unit = row * hidden + unit, at_gate = row * 4 * hidden + unit;
        for (int64_t k = 0; k < 4; ++k) {
          __builtin_prefetch(args.gates + at_gate + k * hidden, 0, 2);
          __builtin_prefetch(args.dgates + at_gate + k * hidden, 1, 2);
        }
        __builtin_prefetch(args.cells + at_unit, 0, 2);
        __builtin_prefetch(args.c_prev + at_unit, 0, 2);
        __builtin_prefetch(args.dc + at_unit, 1, 2);
        if (args.dy != nullptr) __builtin_prefetch(args.dy + at_unit, 0, 2);
      }
  };
  const auto finish = [&](const T* sums, auto first_row, auto rows, int64_t panel,
                          auto panels) __attribute__((noinline)) {
    const V one = V::set(1);
    const int64_t begin = panel * kPanelColumns<T>;
    const int64_t end = std::min(begin + panels * kPanelColumns<T>, hidden);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t unit = begin; unit < end; unit += kLanes) {
        const int64_t left = hidden - unit;
        const auto load = [&](const T* from) {
          return left >= kLanes ? V::load(from) : V::load(from, left);
        };
        const auto store = [&](V value, T* to) {
          left >= kLanes ? value.store(to) : value.store(to, left);
        };
        const int64_t at_unit = (first_row + r) * hidden + unit;
        const int64_t at_gate = (first_row + r) * 4 * hidden + unit;
        const V i = load(args.gates + at_gate);
        const V f = load(args.gates + at_gate + hidden);
        const V g = load(args.gates + at_gate + 2 * hidden);
        const V o = load(args.gates + at_gate + 3 * hidden);
        V dh = V::load(sums + sum_at<T>(r, (unit - begin) / kLanes));
        if (args.dy != nullptr) dh = dh + load(args.dy + at_unit);
        if (args.dh_n != nullptr) dh = dh + load(args.dh_n + at_unit);
        const V tanh_c = tanh(load(args.cells + at_unit));
        const V dc = fma(dh * o, one - tanh_c * tanh_c, load(args.dc + at_unit));
        store(dc * g * i * (one - i), args.dgates + at_gate);
        store(dc * load(args.c_prev + at_unit) * f * (one - f), args.dgates + at_gate + hidden);
        store(dc * i * (one - g * g), args.dgates + at_gate + 2 * hidden);
        store(dh * tanh_c * o * (one - o), args.dgates + at_gate + 3 * hidden);
        store(dc * f, args.dc + at_unit);
      }
    }
  };
  each_tile<T>(args.a, args.a_stride, args.rows, args.k, args.b, hidden, args.panels, nullptr, ask,
               finish);
}
