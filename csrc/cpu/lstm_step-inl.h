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
  const auto finish = [&](const V* sums, int64_t row, int64_t rows, int64_t panel,
                          int64_t panels) __attribute__((noinline)) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t unit = (panel + p) * kLanes;
        const int64_t left = hidden - unit;  // the last panel may be partly empty
        const auto load = [&](const T* from) {
          return left >= kLanes ? V::load(from) : V::load(from, left);
        };
        const auto store = [&](V value, T* to) {
          left >= kLanes ? value.store(to) : value.store(to, left);
        };
        const V* sum = sums + r * kSumVectors + p * kPanelVectors;
        const int64_t at_unit = (row + r) * hidden + unit;
        const int64_t at_gate = (row + r) * 4 * hidden + unit;
        const V i = sigmoid(sum[0] + load(args.gates_x + at_gate));
        const V f = sigmoid(sum[1] + load(args.gates_x + at_gate + hidden));
        const V g = tanh(sum[2] + load(args.gates_x + at_gate + 2 * hidden));
        const V o = sigmoid(sum[3] + load(args.gates_x + at_gate + 3 * hidden));
        const V c = fma(f, load(args.c_prev + at_unit), i * g);
        store(c, args.c + at_unit);
        store(o * tanh(c), args.h + (row + r) * args.h_stride + unit);
        if (args.gates != nullptr) {
          store(i, args.gates + at_gate);
          store(f, args.gates + at_gate + hidden);
          store(g, args.gates + at_gate + 2 * hidden);
          store(o, args.gates + at_gate + 3 * hidden);
          store(c, args.cells + at_unit);
        }
      }
  };
  each_tile<T>(args.h_prev, args.h_prev_stride, args.rows, args.k, args.w_hh, args.panels,
               args.scratch, finish);
}

template <typename T>
void lstm_step_backward(const LstmStepBackwardArgs<T>& args) {
  using V = Vec<T>;
  constexpr int64_t kLanes = V::kLanes;
  const int64_t hidden = args.hidden;
  const auto finish = [&](const V* sums, int64_t first_row, int64_t rows, int64_t panel,
                          int64_t panels) __attribute__((noinline)) {
    const V one = V::set(1);
    const int64_t begin = panel * kPanelColumns<T>;
    const int64_t end = std::min(begin + panels * kPanelColumns<T>, hidden);
    for (int64_t r = 0; r < rows; ++r)
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
        const V sum = sums[r * kSumVectors + (unit - begin) / kLanes];
        const V dh = args.dy == nullptr ? sum : sum + load(args.dy + at_unit);
        const V tanh_c = tanh(load(args.cells + at_unit));
        const V dc = fma(dh * o, one - tanh_c * tanh_c, load(args.dc + at_unit));
        store(dc * g * i * (one - i), args.dgates + at_gate);
        store(dc * load(args.c_prev + at_unit) * f * (one - f), args.dgates + at_gate + hidden);
        store(dc * i * (one - g * g), args.dgates + at_gate + 2 * hidden);
        store(dh * tanh_c * o * (one - o), args.dgates + at_gate + 3 * hidden);
        store(dc * f, args.dc + at_unit);
      }
  };
  each_tile<T>(args.a, args.a_stride, args.rows, args.k, args.b, args.panels, nullptr, finish);
}
