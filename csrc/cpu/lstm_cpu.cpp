// SPDX-License-Identifier: Apache-2.0
// lstm_forward and lstm_backward on the CPU. One product projects the inputs of all steps; then
// each thread takes its share of the batch, or of the units, through all steps in one parallel
// region. A padded batch is a packed one whose steps all have B rows: there is one path.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/packed.h"
#include "cpu/team.h"

namespace iss {
namespace {

constexpr auto kContiguous = at::MemoryFormat::Contiguous;

// The GEMMs below run in the dtype of their arguments, also where autocast is on.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// Which rows of the [N, ...] buffers belong to which step, in the order that the direction takes.
struct Sequence {
  int64_t steps, batch, rows;
  bool reverse;
  std::vector<int64_t> sizes, offsets;  // per step: how many rows of the batch still run; first row

  Sequence(const Tensor& x, const OptionalTensor& batch_sizes, int64_t batch, bool reverse)
      : batch(batch), reverse(reverse) {
    if (batch_sizes) {
      const Tensor contiguous = batch_sizes->contiguous();
      const int64_t* first = contiguous.const_data_ptr<int64_t>();
      sizes.assign(first, first + contiguous.numel());
    } else {
      sizes.assign(x.size(0), batch);
    }
    steps = static_cast<int64_t>(sizes.size());
    rows = 0;
    for (const int64_t size : sizes) {
      offsets.push_back(rows);
      rows += size;
    }
  }

  int64_t step(int64_t k) const { return reverse ? steps - 1 - k : k; }

  // The rows [begin, end) of the batch at the k-th step taken, in at most two pieces: those that
  // come from the step before (previous: their row there) and those that start here (previous: -1).
  // visit(batch_row, rows, row, previous)
  template <typename Visit>
  void each_piece(int64_t k, int64_t begin, int64_t end, const Visit& visit) const {
    const int64_t now = step(k), before = k > 0 ? step(k - 1) : -1;
    end = std::min(end, sizes[now]);
    const int64_t middle =
        before < 0 ? begin : std::clamp(sizes[before], begin, std::max(begin, end));
    if (begin < middle) visit(begin, middle - begin, offsets[now] + begin, offsets[before] + begin);
    if (middle < end) visit(middle, end - middle, offsets[now] + middle, int64_t{-1});
  }

  // The row of the last step that batch row b takes; -1 if there is none.
  int64_t last_row(int64_t b) const {
    for (int64_t k = steps - 1; k >= 0; --k)
      if (b < sizes[step(k)]) return offsets[step(k)] + b;
    return -1;
  }
};

template <typename T>
T* data(const Tensor& t) {
  return t.numel() > 0 ? t.mutable_data_ptr<T>() : nullptr;
}

template <typename T>
void copy_rows(const T* from, int64_t rows, int64_t columns, T* to) {
  if (rows * columns > 0) std::memcpy(to, from, rows * columns * sizeof(T));
}

// Multiplies that take about 10 us: what it costs to wake a thread.
constexpr int64_t kWorthAThread = 1 << 18;

// A share of the work: rows [begin, end) of the batch, and member `member` of the `members` threads
// that divide the units of those rows among themselves and meet at barrier().
template <typename Barrier>
struct Share {
  int64_t begin, end, member, members;
  const Barrier& barrier;

  PanelRange of(int64_t panels) const {
    return {panels * member / members, panels * (member + 1) / members};
  }
};

// Calls body(share) on as many threads as have enough to do. First choice: rows are divided, and no
// step waits for another thread. Where there are too few rows to fill the register tile of every
// thread, the units are divided instead (panels of them; 0: not at all), among as many threads as
// one step gives enough to do between two barriers.
template <typename T, typename Body>
void divide(const Sequence& sequence, int64_t multiplies_per_row, int64_t panels,
            const Body& body) {
  constexpr int64_t kWorthABarrier = 1 << 15;  // multiplies that take about 1 us
  const int64_t rows = sequence.batch, threads = at::get_num_threads();
  const int64_t work = sequence.rows * multiplies_per_row;
  const int64_t tile = cpu_kernels().of<T>().tile_rows;
  const int64_t by_work = std::min(threads, work / kWorthAThread);
  const int64_t per_step = work / std::max<int64_t>(1, sequence.steps);
  const int64_t members = std::min({by_work, panels, per_step / kWorthABarrier});
  if (members > 1 && rows < threads * tile) {
    run_team(members, [&](int64_t member, int64_t members, const auto& barrier) {
      body(Share<std::decay_t<decltype(barrier)>>{0, rows, member, members, barrier});
    });
    return;
  }
  const int64_t fewest_rows = panels > 0 ? tile : 1;
  const int64_t shares = std::clamp<int64_t>(std::min(by_work, rows / fewest_rows), 1, threads);
  at::parallel_for(0, rows, (rows + shares - 1) / shares, [&](int64_t begin, int64_t end) {
    const auto alone = [] {};
    body(Share<decltype(alone)>{begin, end, 0, 1, alone});
  });
}

// gates_x = x @ w_ih.T + bias for all rows at once: [N, I] -> [N, 4H].
template <typename T>
void project(const Tensor& x, const Tensor& w_ih, const Tensor& bias, bool keep,
             const Tensor& gates_x) {
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  const int64_t rows = x.size(0), k = x.size(1), columns = gates_x.size(1);
  const Tensor packed_w_ih = packed(w_ih, {.transposed = true, .gates = false}, keep);
  const int64_t panels = kernels.panels(columns, false);
  // Few enough rows that they stay in the cache while the panels pass by; a multiple of every tile.
  constexpr int64_t kBlockRows = 60;
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  // Where there are fewer blocks than threads, each block's columns are divided.
  const int64_t threads =
      std::clamp<int64_t>(rows * k * columns / kWorthAThread, 1, at::get_num_threads());
  const int64_t parts = blocks == 0 ? 1 : std::min(panels, (threads + blocks - 1) / blocks);
  const int64_t grain = (blocks * parts + threads - 1) / threads;
  at::parallel_for(0, blocks * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / parts * kBlockRows, part = task % parts;
      kernels.matmul({.rows = std::min(kBlockRows, rows - row),
                      .k = k,
                      .columns = columns,
                      .panels = {panels * part / parts, panels * (part + 1) / parts},
                      .a = data<T>(x) + row * k,
                      .packed = data<T>(packed_w_ih),
                      .bias = bias.defined() ? data<T>(bias) : nullptr,
                      .out = data<T>(gates_x) + row * columns});
    }
  });
}

template <typename T>
void forward(const Sequence& sequence, const Tensor& gates_x, const Tensor& h0, const Tensor& w_hh,
             const OptionalTensor& w_hr, const Tensor& y, const Tensor& h_n, const Tensor& c_n,
             const Tensor& gates, const Tensor& cells) {
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  const int64_t hidden = c_n.size(1), output = h_n.size(1);
  const bool save = gates.numel() > 0;  // training: weights change before they are used again
  const Tensor packed_w_hh = packed(w_hh, {.transposed = true, .gates = true}, !save);
  const Tensor packed_w_hr =
      w_hr ? packed(*w_hr, {.transposed = true, .gates = false}, !save) : Tensor();
  const Tensor unprojected = w_hr ? at::empty_like(c_n) : Tensor();
  const T* h0_data = data<T>(h0);
  T *y_data = data<T>(y), *h_data = data<T>(h_n), *c_data = data<T>(c_n);

  divide<T>(sequence, 4 * hidden * output, kernels.panels(hidden, true), [&](const auto& share) {
    for (int64_t k = 0; k < sequence.steps; ++k) {
      sequence.each_piece(
          k, share.begin, share.end, [&](int64_t b, int64_t rows, int64_t row, int64_t previous) {
            kernels.lstm_step(
                {.rows = rows,
                 .hidden = hidden,
                 .k = output,
                 .panels = share.of(kernels.panels(hidden, true)),
                 .h_prev = previous < 0 ? h0_data + b * output : y_data + previous * output,
                 .c_prev = c_data + b * hidden,
                 .packed_w_hh = data<T>(packed_w_hh),
                 .gates_x = data<T>(gates_x) + row * 4 * hidden,
                 .c = c_data + b * hidden,
                 .h = w_hr ? data<T>(unprojected) + b * hidden : y_data + row * output,
                 .gates = save ? data<T>(gates) + row * 4 * hidden : nullptr,
                 .cells = save ? data<T>(cells) + row * hidden : nullptr});
          });
      share.barrier();
      if (!w_hr) continue;
      sequence.each_piece(k, share.begin, share.end,
                          [&](int64_t b, int64_t rows, int64_t row, int64_t) {
                            kernels.matmul({.rows = rows,
                                            .k = hidden,
                                            .columns = output,
                                            .panels = share.of(kernels.panels(output, false)),
                                            .a = data<T>(unprojected) + b * hidden,
                                            .packed = data<T>(packed_w_hr),
                                            .bias = nullptr,
                                            .out = y_data + row * output});
                          });
      share.barrier();
    }
    if (share.member > 0) return;
    for (int64_t b = share.begin; b < share.end; ++b) {
      const int64_t last = sequence.last_row(b);
      copy_rows(last < 0 ? h0_data + b * output : y_data + last * output, 1, output,
                h_data + b * output);
    }
  });
}

template <typename T>
void backward(const Sequence& sequence, const Tensor& dy, const Tensor& h0, const Tensor& c0,
              const Tensor& w_hh, const OptionalTensor& w_hr, const Tensor& y, const Tensor& gates,
              const Tensor& cells, const Tensor& dh, const Tensor& dc, const Tensor& dgates,
              const Tensor& h_prev, const Tensor& doutputs) {
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  const int64_t hidden = dc.size(1), output = dh.size(1);
  const Tensor packed_w_hh = packed(w_hh, {.transposed = false, .gates = false}, false);
  const Tensor packed_w_hr =
      w_hr ? packed(*w_hr, {.transposed = false, .gates = false}, false) : Tensor();
  const Tensor dunprojected = w_hr ? at::empty_like(dc) : Tensor();
  const T *dy_data = data<T>(dy), *y_data = data<T>(y), *cells_data = data<T>(cells);

  divide<T>(sequence, 4 * hidden * output, 0, [&](const auto& share) {
    for (int64_t k = sequence.steps - 1; k >= 0; --k)
      sequence.each_piece(
          k, share.begin, share.end, [&](int64_t b, int64_t rows, int64_t row, int64_t previous) {
            // On entry dh and dc hold what later steps (or dh_n, dc_n) ask of these rows.
            T* dh_rows = data<T>(dh) + b * output;
            for (int64_t e = 0; e < rows * output; ++e) dh_rows[e] += dy_data[row * output + e];
            const T* dh_cell = dh_rows;
            if (w_hr) {
              copy_rows(dh_rows, rows, output, data<T>(doutputs) + row * output);
              T* out = data<T>(dunprojected) + b * hidden;
              kernels.matmul({.rows = rows,
                              .k = output,
                              .columns = hidden,
                              .panels = {0, kernels.panels(hidden, false)},
                              .a = dh_rows,
                              .packed = data<T>(packed_w_hr),
                              .bias = nullptr,
                              .out = out});
              dh_cell = out;
            }
            T* dgates_rows = data<T>(dgates) + row * 4 * hidden;
            kernels.lstm_step_backward(
                {.rows = rows,
                 .hidden = hidden,
                 .dh = dh_cell,
                 .gates = data<T>(gates) + row * 4 * hidden,
                 .cells = cells_data + row * hidden,
                 .c_prev = previous < 0 ? data<T>(c0) + b * hidden : cells_data + previous * hidden,
                 .dc = data<T>(dc) + b * hidden,
                 .dgates = dgates_rows});
            kernels.matmul({.rows = rows,
                            .k = 4 * hidden,
                            .columns = output,
                            .panels = {0, kernels.panels(output, false)},
                            .a = dgates_rows,
                            .packed = data<T>(packed_w_hh),
                            .bias = nullptr,
                            .out = dh_rows});
            copy_rows(previous < 0 ? data<T>(h0) + b * output : y_data + previous * output, rows,
                      output, data<T>(h_prev) + row * output);
          });
  });
}

OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(t->contiguous()) : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_forward_cpu(
    const Tensor& x, const OptionalTensor& batch_sizes, const Tensor& h0, const Tensor& c0,
    const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
    const OptionalTensor& w_hr, bool reverse, bool save) {
  const NoAutocast no_autocast;
  check_lstm("lstm_forward", x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr);
  const int64_t hidden = c0.size(1), output = h0.size(1);
  const Sequence sequence(x, batch_sizes, h0.size(0), reverse);

  std::vector<int64_t> y_shape = x.sizes().vec();
  y_shape.back() = output;
  const Tensor y = at::empty(y_shape, x.options());
  const Tensor h_n = at::empty({h0.size(0), output}, x.options());
  const Tensor c_n = c0.clone(kContiguous);
  const Tensor cells = at::empty({save ? sequence.rows : 0, hidden}, x.options());

  // The activated gates replace the projected inputs in place.
  const Tensor gates_x = at::empty({sequence.rows, 4 * hidden}, x.options());
  const Tensor gates = save ? gates_x : at::empty({0, 4 * hidden}, x.options());
  const Tensor rows = x.reshape({sequence.rows, x.size(-1)}).contiguous();
  const Tensor bias = b_ih && b_hh ? *b_ih + *b_hh : b_ih ? *b_ih : b_hh ? *b_hh : Tensor();

  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "lstm_forward", [&] {
    project<scalar_t>(rows, w_ih.contiguous(), bias.defined() ? bias.contiguous() : bias, !save,
                      gates_x);
    forward<scalar_t>(sequence, gates_x, h0.contiguous(), w_hh.contiguous(), contiguous(w_hr), y,
                      h_n, c_n, gates, cells);
  });
  return {y, h_n, c_n, gates, cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward_cpu(
    const Tensor& dy, const Tensor& dh_n, const Tensor& dc_n, const Tensor& x,
    const OptionalTensor& batch_sizes, const Tensor& h0, const Tensor& c0, const Tensor& w_ih,
    const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
    const OptionalTensor& w_hr, const Tensor& y, const Tensor& gates, const Tensor& cells,
    bool reverse) {
  const NoAutocast no_autocast;
  check_lstm("lstm_backward", x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr);
  const int64_t hidden = c0.size(1), output = h0.size(1);
  const Sequence sequence(x, batch_sizes, h0.size(0), reverse);
  check_shape("lstm_backward", "dy", dy, "that of y", y.sizes());
  check_shape("lstm_backward", "dh_n", dh_n, "[B, P]", h0.sizes());
  check_shape("lstm_backward", "dc_n", dc_n, "[B, H]", c0.sizes());
  check_shape("lstm_backward", "gates", gates, "[N, 4H]", {sequence.rows, 4 * hidden});
  check_shape("lstm_backward", "cells", cells, "[N, H]", {sequence.rows, hidden});

  const Tensor dh = dh_n.clone(kContiguous);
  const Tensor dc = dc_n.clone(kContiguous);
  const Tensor dgates = at::empty({sequence.rows, 4 * hidden}, x.options());
  const Tensor h_prev = at::empty({sequence.rows, output}, x.options());
  const Tensor doutputs = at::empty({w_hr ? sequence.rows : 0, output}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "lstm_backward", [&] {
    backward<scalar_t>(sequence, dy.contiguous(), h0.contiguous(), c0.contiguous(),
                       w_hh.contiguous(), contiguous(w_hr), y.contiguous(), gates.contiguous(),
                       cells.contiguous(), dh, dc, dgates, h_prev, doutputs);
  });

  const Tensor rows = x.reshape({sequence.rows, x.size(-1)});
  const Tensor dw_hr =
      w_hr ? at::mm(doutputs.t(), gates.narrow(1, 3 * hidden, hidden) * cells.tanh())
           : at::empty({0}, x.options());
  return {at::mm(dgates, w_ih).view(x.sizes()),
          dh,
          dc,
          at::mm(dgates.t(), rows),
          at::mm(dgates.t(), h_prev),
          dgates.sum(0),
          dw_hr};
}

TORCH_LIBRARY_IMPL(iss_kernels, CPU, library) {
  library.impl("lstm_forward", &lstm_forward_cpu);
  library.impl("lstm_backward", &lstm_backward_cpu);
}

}  // namespace
}  // namespace iss
