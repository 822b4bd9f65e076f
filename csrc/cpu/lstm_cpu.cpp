// SPDX-License-Identifier: Apache-2.0
// lstm_forward and lstm_backward on the CPU. bfloat16 computes in float32: activations are widened
// at the door, weights as they are loaded.

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
#include "cpu/stack.h"
#include "cpu/team.h"

namespace iss {
namespace {

constexpr auto kContiguous = at::MemoryFormat::Contiguous;

// The GEMMs below run in the dtype of their arguments, also where autocast is on.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

Sequence sequence_of(const Tensor& x, const OptionalTensor& batch_sizes, int64_t batch) {
  if (!batch_sizes) return {std::vector<int64_t>(x.size(0), batch), batch};
  const Tensor contiguous = batch_sizes->contiguous();
  const int64_t* first = contiguous.const_data_ptr<int64_t>();
  return {{first, first + contiguous.numel()}, batch};
}

template <typename T>
T* data(const Tensor& t) {
  return t.numel() > 0 ? t.mutable_data_ptr<T>() : nullptr;
}

template <typename T>
void copy_rows(const T* from, int64_t rows, int64_t columns, T* to) {
  if (rows * columns > 0) std::memcpy(to, from, rows * columns * sizeof(T));
}

template <typename T>
void backward(const Sequence& sequence, bool reverse, const Tensor& dy, const Tensor& h0,
              const Tensor& c0, const Tensor& w_hh, const OptionalTensor& w_hr, const Tensor& y,
              const Tensor& gates, const Tensor& cells, const Tensor& dh, const Tensor& dc,
              const Tensor& dgates, const Tensor& h_prev, const Tensor& doutputs) {
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  const int64_t hidden = dc.size(1), output = dh.size(1);
  const Matrix packed_w_hh = pack(w_hh, {.transposed = false, .gates = false});
  const Matrix packed_w_hr = w_hr ? pack(*w_hr, {.transposed = false, .gates = false}) : Matrix();
  const Tensor dunprojected = w_hr ? at::empty_like(dc) : Tensor();
  const T *dy_data = data<T>(dy), *y_data = data<T>(y), *cells_data = data<T>(cells);

  const int64_t by_work = sequence.rows * 4 * hidden * output / kWorthAThread;
  const int64_t shares = std::clamp<int64_t>(by_work, 1, at::get_num_threads());
  at::parallel_for(
      0, sequence.batch, (sequence.batch + shares - 1) / shares, [&](int64_t begin, int64_t end) {
        for (int64_t k = sequence.steps - 1; k >= 0; --k)
          sequence.each_piece(
              k, reverse, begin, end, [&](int64_t b, int64_t rows, int64_t row, int64_t previous) {
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
                                  .a_stride = output,
                                  .b = packed_w_hr.view(),
                                  .bias = nullptr,
                                  .out = out,
                                  .out_stride = hidden,
                                  .scratch = nullptr});
                  dh_cell = out;
                }
                T* dgates_rows = data<T>(dgates) + row * 4 * hidden;
                kernels.lstm_step_backward({.rows = rows,
                                            .hidden = hidden,
                                            .dh = dh_cell,
                                            .gates = data<T>(gates) + row * 4 * hidden,
                                            .cells = cells_data + row * hidden,
                                            .c_prev = previous < 0 ? data<T>(c0) + b * hidden
                                                                   : cells_data + previous * hidden,
                                            .dc = data<T>(dc) + b * hidden,
                                            .dgates = dgates_rows});
                kernels.matmul({.rows = rows,
                                .k = 4 * hidden,
                                .columns = output,
                                .panels = {0, kernels.panels(output, false)},
                                .a = dgates_rows,
                                .a_stride = 4 * hidden,
                                .b = packed_w_hh.view(),
                                .bias = nullptr,
                                .out = dh_rows,
                                .out_stride = output,
                                .scratch = nullptr});
                copy_rows(previous < 0 ? data<T>(h0) + b * output : y_data + previous * output,
                          rows, output, data<T>(h_prev) + row * output);
              });
      });
}

// What the kernels compute in: float32 for bfloat16.
at::ScalarType compute_type(at::ScalarType type) {
  return type == at::kBFloat16 ? at::kFloat : type;
}

// A contiguous copy of its own in the type that the kernels compute in.
Tensor copied(const Tensor& t) {
  return t.to(t.options().dtype(compute_type(t.scalar_type())), false, true, kContiguous);
}

Tensor widened(const Tensor& t) { return t.to(compute_type(t.scalar_type())).contiguous(); }
OptionalTensor widened(const OptionalTensor& t) {
  return t ? OptionalTensor(widened(*t)) : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_forward_cpu(
    const Tensor& x, const OptionalTensor& batch_sizes, const Tensor& h0, const Tensor& c0,
    const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
    const OptionalTensor& w_hr, bool reverse, bool save) {
  const NoAutocast no_autocast;
  check_lstm("lstm_forward", x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr);
  const int64_t hidden = c0.size(1), output = h0.size(1);
  const Sequence sequence = sequence_of(x, batch_sizes, h0.size(0));

  const auto dtype = x.scalar_type();
  const auto options = x.options().dtype(compute_type(dtype));
  std::vector<int64_t> y_shape = x.sizes().vec();
  y_shape.back() = output;
  const Tensor y = at::empty(y_shape, options);
  const Tensor h_n = at::empty({h0.size(0), output}, options);
  const Tensor c_n = copied(c0);
  const Tensor gates = at::empty({save ? sequence.rows : 0, 4 * hidden}, options);
  const Tensor cells = at::empty({save ? sequence.rows : 0, hidden}, options);
  const Tensor rows = widened(x), h_first = widened(h0);

  // When training, weights change before they are used again.
  const auto packed = [&](const Tensor& weight, bool gates) {
    const Layout layout{.transposed = true, .gates = gates};
    return save ? pack(weight.contiguous(), layout) : pack_once(weight.contiguous(), layout);
  };
  const Tensor bias = b_ih && b_hh ? widened(*b_ih) + widened(*b_hh)
                      : b_ih       ? widened(*b_ih)
                      : b_hh       ? widened(*b_hh)
                                   : Tensor();
  const Stack stack{{{.input = x.size(-1),
                      .hidden = hidden,
                      .output = output,
                      .reverse = reverse,
                      .w_ih = packed(w_ih, false),
                      .w_hh = packed(w_hh, true),
                      .w_hr = w_hr ? packed(*w_hr, false) : Matrix(),
                      .bias = bias}}};
  AT_DISPATCH_FLOATING_TYPES(options.dtype().toScalarType(), "lstm_forward", [&] {
    run_stack<scalar_t>(stack, sequence, data<scalar_t>(rows),
                        {{.h0 = data<scalar_t>(h_first),
                          .c = data<scalar_t>(c_n),
                          .h_n = data<scalar_t>(h_n),
                          .gates = data<scalar_t>(gates),
                          .cells = data<scalar_t>(cells)}},
                        data<scalar_t>(y));
  });
  return {y.to(dtype), h_n.to(dtype), c_n.to(dtype), gates, cells};
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
  const Sequence sequence = sequence_of(x, batch_sizes, h0.size(0));
  check_shape("lstm_backward", "dy", dy, "that of y", y.sizes());
  check_shape("lstm_backward", "dh_n", dh_n, "[B, P]", h0.sizes());
  check_shape("lstm_backward", "dc_n", dc_n, "[B, H]", c0.sizes());
  check_shape("lstm_backward", "gates", gates, "[N, 4H]", {sequence.rows, 4 * hidden});
  check_shape("lstm_backward", "cells", cells, "[N, H]", {sequence.rows, hidden});

  const auto dtype = x.scalar_type();
  const auto options = x.options().dtype(compute_type(dtype));
  const Tensor dh = copied(dh_n), dc = copied(dc_n);
  const Tensor dgates = at::empty({sequence.rows, 4 * hidden}, options);
  const Tensor h_prev = at::empty({sequence.rows, output}, options);
  const Tensor doutputs = at::empty({w_hr ? sequence.rows : 0, output}, options);
  AT_DISPATCH_FLOATING_TYPES(options.dtype().toScalarType(), "lstm_backward", [&] {
    backward<scalar_t>(sequence, reverse, widened(dy), widened(h0), widened(c0), widened(w_hh),
                       widened(w_hr), widened(y), gates.contiguous(), cells.contiguous(), dh, dc,
                       dgates, h_prev, doutputs);
  });

  const Tensor rows = widened(x).reshape({sequence.rows, x.size(-1)});
  const Tensor dw_hr =
      w_hr ? at::mm(doutputs.t(), gates.narrow(1, 3 * hidden, hidden) * cells.tanh())
           : at::empty({0}, options);
  return {at::mm(dgates, widened(w_ih)).view(x.sizes()).to(dtype),
          dh.to(dtype),
          dc.to(dtype),
          at::mm(dgates.t(), rows).to(dtype),
          at::mm(dgates.t(), h_prev).to(dtype),
          dgates.sum(0).to(dtype),
          dw_hr.to(dtype)};
}

TORCH_LIBRARY_IMPL(iss_kernels, CPU, library) {
  library.impl("lstm_forward", &lstm_forward_cpu);
  library.impl("lstm_backward", &lstm_backward_cpu);
}

}  // namespace
}  // namespace iss
