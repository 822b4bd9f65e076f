// SPDX-License-Identifier: Apache-2.0
// recurrent_forward, recurrent_backward and lstm_step_ on CUDA. The products with w_ih, and those that make
// the gradients of weights, are torch's GEMMs, one each for all steps; what happens from step to
// step is one kernel (plan.h), or for Tier::kSteps a GEMM and a fused cell per step. A single step
// of few rows is one launch with both products in it, that of lstm_step_. Nothing here waits for
// the device.

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "checks.h"
#include "cuda/device.h"
#include "cuda/launches.h"
#include "host.h"
#include "cpu/kernels/args.h"

namespace iss {
namespace {

constexpr auto kContiguous = at::MemoryFormat::Contiguous;

template <typename T>
T* data(const Tensor& t) {
  return t.numel() > 0 ? mutable_values<T>(t) : nullptr;
}

// A contiguous copy of its own.
Tensor copied(const Tensor& t, at::ScalarType type) {
  return t.to(t.options().dtype(type), false, true, kContiguous);
}

// Exact float32 unless torch's own products are let off it (torch.backends.cuda.matmul).
Math math_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return Math::kFloat64;
    case at::kBFloat16:
      return Math::kBfloat16;
    case at::kHalf:
      return Math::kFloat16;
    default:
      return at::globalContext().float32Precision(
                 at::Float32Backend::CUDA, at::Float32Op::MATMUL) == at::Float32Precision::TF32
                 ? Math::kTf32
                 : Math::kFloat32;
  }
}

template <typename T>
LstmPlan plan_for(const Tensor& c0, at::ScalarType type, int64_t steps, bool projected,
                  bool backward) {
  if (steps == 0 || c0.size(0) == 0)
    return {.tier = Tier::kSteps, .math = math_of(type), .backward = backward};
  const LstmProblem problem = {.hidden = c0.size(1),
                               .batch = c0.size(0),
                               .projected = projected,
                               .math = math_of(type),
                               .backward = backward,
                               .steps = steps};
  DeviceLimits limits = device_limits(c0.device());
  LstmPlan plan = plan_lstm(problem, limits);
  // The limits do not say all: a large cluster needs neighbours that are free, and another process
  // may hold part of the device.
  while (plan.blocks > 0 && !can_launch<T>(plan)) {
    limits = less_than(plan, limits);
    plan = plan_lstm(problem, limits);
  }
  return plan;
}

// Where a packed sequence's steps begin, on the device: [T + 1]. Undefined for a padded one.
Tensor step_offsets(const Sequence& sequence, const OptionalTensor& batch_sizes, const Tensor& x) {
  if (!batch_sizes) return {};
  const Tensor offsets = at::empty({sequence.steps + 1}, at::kLong);
  int64_t* const to = offsets.mutable_data_ptr<int64_t>();
  std::copy(sequence.offsets.begin(), sequence.offsets.end(), to);
  to[sequence.steps] = sequence.rows;
  return to_device(offsets, x);
}

Steps steps_of(const Sequence& sequence, const Tensor& offsets, bool reverse) {
  return {.steps = sequence.steps,
          .batch = sequence.batch,
          .offsets = offsets.defined() ? offsets.const_data_ptr<int64_t>() : nullptr,
          .reverse = reverse};
}

// Memory that the blocks of a group share beside their own (Tier::kGrid).
struct GroupMemory {
  Tensor arrivals, exchange;

  GroupMemory(const LstmPlan& plan, const at::TensorOptions& options)
      : arrivals(at::zeros({plan.tier == Tier::kGrid ? plan.groups : 0}, options.dtype(at::kInt))),
        exchange(at::empty({plan.exchange_bytes}, options.dtype(at::kByte))) {}
};

// The output before each step, [N, P]: that of the step before, or h0 where a row begins.
Tensor outputs_before(const Sequence& sequence, bool padded, const Tensor& y, const Tensor& h0,
                      bool reverse) {
  if (sequence.rows == 0) return y;
  if (sequence.steps == 1) return h0;
  if (padded) {
    const int64_t others = sequence.rows - sequence.batch;
    return reverse ? at::cat({y.narrow(0, sequence.batch, others), h0})
                   : at::cat({h0, y.narrow(0, 0, others)});
  }
  const Tensor index = at::empty({sequence.rows}, at::kLong);
  int64_t* const to = index.mutable_data_ptr<int64_t>();
  for (int64_t k = 0; k < sequence.steps; ++k)
    sequence.each_piece(k, reverse, 0, sequence.batch,
                        [&](int64_t batch_row, int64_t rows, int64_t row, int64_t previous) {
                          const int64_t from = previous < 0 ? batch_row : sequence.batch + previous;
                          for (int64_t i = 0; i < rows; ++i) to[row + i] = from + i;
                        });
  return at::cat({h0, y}).index_select(0, to_device(index, y));
}

// What lstm_step is always told. W: how the weights are stored, as x or in 16 bits.
template <typename T, typename W = T>
LstmStreamStepArgs<T, W> step_args(const Tensor& x, const Tensor& h, const Tensor& w_ih,
                                   const Tensor& w_hh, const Tensor& out) {
  return {.rows = x.size(0),
          .input = x.size(1),
          .hidden = out.size(1),
          .output = h.size(1),
          .x = data<T>(x),
          .x_stride = x.stride(0),
          .h_prev = data<T>(h),
          .h_prev_stride = h.stride(0),
          .w_ih = data<W>(w_ih),
          .w_ih_stride = w_ih.stride(0),
          .w_hh = data<W>(w_hh),
          .w_hh_stride = w_hh.stride(0),
          .h = data<T>(out),
          .h_stride = out.stride(0)};
}

Tensor with_adjacent_columns(const Tensor& t) { return t.stride(1) == 1 ? t : t.contiguous(); }

// Tier::kOneStep. y, h_n [B, P] and c_n [B, H] are written, gates and cells where they have rows.
template <typename T>
void forward_one_step(const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& w_ih,
                      const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                      const OptionalTensor& w_hr, const Tensor& y, const Tensor& h_n,
                      const Tensor& c_n, const Tensor& gates, const Tensor& cells) {
  const Tensor x_rows = with_adjacent_columns(x), h_rows = with_adjacent_columns(h0),
               w_ih_rows = with_adjacent_columns(w_ih), w_hh_rows = with_adjacent_columns(w_hh);
  const Tensor c_first = c0.contiguous(), bias_ih = b_ih ? b_ih->contiguous() : Tensor(),
               bias_hh = b_hh ? b_hh->contiguous() : Tensor();
  const Tensor out = w_hr ? at::empty_like(c_n) : y;
  auto args = step_args<T>(x_rows, h_rows, w_ih_rows, w_hh_rows, out);
  args.c0 = data<T>(c_first);
  args.b_ih = b_ih ? data<T>(bias_ih) : nullptr;
  args.b_hh = b_hh ? data<T>(bias_hh) : nullptr;
  args.h_n = w_hr ? nullptr : data<T>(h_n);
  args.c = data<Wide<T>>(cells);
  args.c_n = data<T>(c_n);
  args.gates = data<Wide<T>>(gates);
  check_launch("lstm_forward", launch_lstm_step<T, T>(args, current_stream(x)));
  if (w_hr) {
    Tensor to = y;
    at::mm_out(to, out, w_hr->t());
    h_n.copy_(y);
  }
}

// Tier::kSteps. gates_x is overwritten. c [B, H] in Wide<T>: c0 in, c_n out; h_n [B, P] is written.
template <typename T>
void forward_by_steps(const Sequence& sequence, const Tensor& gates_x, const Tensor& w_hh,
                      const OptionalTensor& w_hr, const Tensor& h0, const Tensor& c,
                      const Tensor& y, const Tensor& h_n, const Tensor& gates, const Tensor& cells,
                      bool reverse) {
  const int64_t hidden = c.size(1), output = h0.size(1);
  const bool save = gates.numel() > 0;
  const Tensor by_gate = w_hh.t();
  const Tensor cell_out = w_hr ? at::empty({sequence.batch, hidden}, gates_x.options()) : Tensor();
  for (int64_t k = 0; k < sequence.steps; ++k) {
    const int64_t now = sequence.step(k, reverse);
    const int64_t first = sequence.offsets[now], running = sequence.sizes[now];
    sequence.each_piece(
        k, reverse, 0, sequence.batch,
        [&](int64_t batch_row, int64_t rows, int64_t row, int64_t previous) {
          gates_x.narrow(0, row, rows)
              .addmm_(previous < 0 ? h0.narrow(0, batch_row, rows) : y.narrow(0, previous, rows),
                      by_gate);
        });
    check_launch(
        "lstm_forward",
        launch_lstm_cell<T>({.rows = running,
                             .hidden = hidden,
                             .gates_in = data<T>(gates_x) + first * 4 * hidden,
                             .c_prev = data<Wide<T>>(c),
                             .c = data<Wide<T>>(c),
                             .h = w_hr ? data<T>(cell_out) : data<T>(y) + first * output,
                             .h_stride = hidden,
                             .gates = save ? data<Wide<T>>(gates) + first * 4 * hidden : nullptr,
                             .cells = save ? data<Wide<T>>(cells) + first * hidden : nullptr},
                            current_stream(c)));
    if (w_hr) {
      Tensor to = y.narrow(0, first, running);
      at::mm_out(to, cell_out.narrow(0, 0, running), w_hr->t());
    }
    // Rows that run no further.
    const int64_t next = k + 1 < sequence.steps ? sequence.sizes[sequence.step(k + 1, reverse)] : 0;
    if (next < running)
      h_n.narrow(0, next, running - next).copy_(y.narrow(0, first + next, running - next));
  }
}

// Tier::kSteps. dc [B, H] (in Wide<T>): the gradient of c_n in, of c0 out. douts [N, P]: that of y
// in, with what comes from h_n and from the steps after it out. dh0 [B, P] is written.
template <typename T>
void backward_by_steps(const Sequence& sequence, const Tensor& w_hh, const OptionalTensor& w_hr,
                       const Tensor& gates, const Tensor& cells, const Tensor& c0,
                       const Tensor& dh_n, const Tensor& douts, const Tensor& dh0, const Tensor& dc,
                       const Tensor& dgates, bool reverse, bool need_dh0) {
  const int64_t hidden = dc.size(1), output = dh0.size(1);
  const Tensor dcell = w_hr ? at::empty({sequence.batch, hidden}, dh0.options()) : Tensor();
  for (int64_t k = sequence.steps - 1; k >= 0; --k) {
    const int64_t now = sequence.step(k, reverse);
    const int64_t first = sequence.offsets[now], running = sequence.sizes[now];
    const int64_t after =
        k + 1 < sequence.steps ? sequence.sizes[sequence.step(k + 1, reverse)] : 0;
    if (after < running)  // rows that run no further
      douts.narrow(0, first + after, running - after).add_(dh_n.narrow(0, after, running - after));
    if (w_hr) {
      Tensor to = dcell.narrow(0, 0, running);
      at::mm_out(to, douts.narrow(0, first, running), *w_hr);
    }
    sequence.each_piece(
        k, reverse, 0, sequence.batch,
        [&](int64_t batch_row, int64_t rows, int64_t row, int64_t previous) {
          check_launch(
              "lstm_backward",
              launch_lstm_cell_backward<T>(
                  {.rows = rows,
                   .hidden = hidden,
                   .dh = w_hr ? data<T>(dcell) + batch_row * hidden : data<T>(douts) + row * output,
                   .gates = data<Wide<T>>(gates) + row * 4 * hidden,
                   .cells = data<Wide<T>>(cells) + row * hidden,
                   .c_prev = previous < 0 ? data<Wide<T>>(c0) + batch_row * hidden
                                          : data<Wide<T>>(cells) + previous * hidden,
                   .dc = data<Wide<T>>(dc) + batch_row * hidden,
                   .dgates = data<T>(dgates) + row * 4 * hidden},
                  current_stream(dc)));
          const Tensor of_rows = dgates.narrow(0, row, rows);
          if (previous >= 0) {
            douts.narrow(0, previous, rows).addmm_(of_rows, w_hh);
          } else if (need_dh0) {
            Tensor to = dh0.narrow(0, batch_row, rows);
            at::mm_out(to, of_rows, w_hh);
          }
        });
  }
}

ForwardResult recurrent_forward_cuda(
    std::string_view name, const Tensor& x, const OptionalTensor& batch_sizes,
    const OptionalTensor& resets, const Tensor& h0, const OptionalTensor& c_0, const Tensor& w_ih,
    const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
    const OptionalTensor& w_hr, const OptionalTensor& masks, bool reverse, bool save) {
  const NoAutocast no_autocast;
  const auto [cell, op] = check_cell(name, "forward");
  check_recurrent(op.c_str(), cell,
                  {name, x, batch_sizes, resets, h0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr, masks});
  TORCH_CHECK(cell.kind == CellKind::kLstm && !resets, op, ": expected lstm without resets");
  const Tensor c0 = *c_0;
  const DeviceGuard guard(x.device());
  const int64_t hidden = c0.size(1), output = h0.size(1);
  const Sequence sequence = sequence_of(x, batch_sizes, h0.size(0));

  const auto dtype = x.scalar_type(), wide = wide_type(dtype);
  const auto options = x.options();
  std::vector<int64_t> y_shape = x.sizes().vec();
  y_shape.back() = output;
  const Tensor y = at::empty(y_shape, options);
  const Tensor gates = at::empty({save ? sequence.rows : 0, 4 * hidden}, options.dtype(wide));
  const Tensor cells = at::empty({save ? sequence.rows : 0, hidden}, options.dtype(wide));
  if (sequence.rows == 0) return {y, copied(h0, dtype), copied(c0, dtype), gates, cells};

  const Tensor rows = x.reshape({sequence.rows, x.size(-1)});
  const Tensor outputs = y.view({sequence.rows, output});
  const Tensor h_n = at::empty({sequence.batch, output}, options);
  Tensor c_n;
  ISS_DISPATCH(dtype, "lstm_forward", [&] {
    using T = Stored<scalar_t>;
    const LstmPlan plan = plan_for<T>(c0, dtype, sequence.steps, w_hr.has_value(), false);
    if (plan.tier == Tier::kOneStep) {
      c_n = at::empty({sequence.batch, hidden}, options);
      forward_one_step<T>(rows, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, outputs, h_n, c_n, gates,
                          cells);
      return;
    }
    const Tensor gates_x = b_ih && b_hh ? at::addmm(*b_ih + *b_hh, rows, w_ih.t())
                           : b_ih       ? at::addmm(*b_ih, rows, w_ih.t())
                           : b_hh       ? at::addmm(*b_hh, rows, w_ih.t())
                                        : at::mm(rows, w_ih.t());
    const Tensor weight = w_hh.contiguous(), h_first = h0.contiguous();
    if (plan.tier == Tier::kSteps) {
      c_n = copied(c0, wide);
      forward_by_steps<T>(sequence, gates_x, weight, w_hr, h_first, c_n, outputs, h_n, gates, cells,
                          reverse);
      c_n = c_n.to(dtype);
      return;
    }
    const Tensor c_first = c0.contiguous(), offsets = step_offsets(sequence, batch_sizes, x);
    c_n = at::empty({sequence.batch, hidden}, options);
    const GroupMemory shared(plan, options);
    check_launch("lstm_forward",
                 launch_lstm_forward<T>(plan,
                                        {.sequence = steps_of(sequence, offsets, reverse),
                                         .hidden = hidden,
                                         .gates_x = data<T>(gates_x),
                                         .w_hh = data<T>(weight),
                                         .h0 = data<T>(h_first),
                                         .c0 = data<T>(c_first),
                                         .y = data<T>(y),
                                         .h_n = data<T>(h_n),
                                         .c_n = data<T>(c_n),
                                         .gates = data<Wide<T>>(gates),
                                         .cells = data<Wide<T>>(cells),
                                         .arrivals = data<uint32_t>(shared.arrivals),
                                         .exchange = data<void>(shared.exchange)},
                                        current_stream(x)));
  });
  return {y, h_n, c_n, gates, cells};
}

BackwardResult recurrent_backward_cuda(
    const Tensor& dy, const Tensor& dh_n, const OptionalTensor& dc_last, std::string_view name,
    const Tensor& x, const OptionalTensor& batch_sizes, const OptionalTensor& resets,
    const Tensor& h0, const OptionalTensor& c_0, const Tensor& w_ih, const Tensor& w_hh,
    const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensor& w_hr,
    const OptionalTensor& masks, const Tensor& y, const Tensor& gates, const Tensor& cells,
    bool reverse, bool need_dx, bool need_dh0, bool need_dw) {
  const NoAutocast no_autocast;
  const auto [cell_spec, op] = check_cell(name, "backward");
  const Inputs inputs{name, x, batch_sizes, resets, h0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr, masks};
  check_recurrent(op.c_str(), cell_spec, inputs);
  check_recurrent_backward(op.c_str(), cell_spec, inputs, y, gates, cells, dy, dh_n, dc_last);
  TORCH_CHECK(cell_spec.kind == CellKind::kLstm && !resets, op, ": expected lstm without resets");
  const Tensor c0 = *c_0, dc_n = *dc_last;
  const DeviceGuard guard(x.device());
  const int64_t hidden = c0.size(1), output = h0.size(1);
  const Sequence sequence = sequence_of(x, batch_sizes, h0.size(0));

  const auto dtype = x.scalar_type(), wide = wide_type(dtype);
  const auto options = x.options();
  const Tensor rows = x.reshape({sequence.rows, x.size(-1)});
  const Tensor outputs = y.reshape({sequence.rows, output});
  const Tensor weight = w_hh.contiguous(), h_first = h0.contiguous();
  const Tensor saved_gates = gates.contiguous(), saved_cells = cells.contiguous();
  const Tensor dgates = at::empty({sequence.rows, 4 * hidden}, options);
  Tensor douts = dy.reshape({sequence.rows, output}), dh, dc;
  ISS_DISPATCH(dtype, "lstm_backward", [&] {
    using T = Stored<scalar_t>;
    const LstmPlan plan = plan_for<T>(c0, dtype, sequence.steps, w_hr.has_value(), true);
    if (plan.tier == Tier::kSteps) {
      douts = copied(douts, dtype);
      dh = sequence.rows == 0 ? copied(dh_n, dtype) : at::empty({sequence.batch, output}, options);
      dc = copied(dc_n, wide);
      backward_by_steps<T>(sequence, weight, w_hr, saved_gates, saved_cells,
                           c0.to(wide).contiguous(), dh_n, douts, dh, dc, dgates, reverse,
                           need_dh0);
      dc = dc.to(dtype);
      return;
    }
    const Tensor c_first = c0.contiguous(), offsets = step_offsets(sequence, batch_sizes, x);
    const Tensor dy_rows = douts.contiguous(), dh_last = dh_n.contiguous(),
                 dc_last = dc_n.contiguous();
    dh = at::empty({sequence.batch, hidden}, options);
    dc = at::empty({sequence.batch, hidden}, options);
    const GroupMemory shared(plan, options);
    check_launch("lstm_backward",
                 launch_lstm_backward<T>(plan,
                                         {.sequence = steps_of(sequence, offsets, reverse),
                                          .hidden = hidden,
                                          .w_hh = data<T>(weight),
                                          .gates = data<Wide<T>>(saved_gates),
                                          .cells = data<Wide<T>>(saved_cells),
                                          .c0 = data<T>(c_first),
                                          .dy = data<T>(dy_rows),
                                          .dh_n = data<T>(dh_last),
                                          .dc_n = data<T>(dc_last),
                                          .dgates = data<T>(dgates),
                                          .dh0 = data<T>(dh),
                                          .dc0 = data<T>(dc),
                                          .arrivals = data<uint32_t>(shared.arrivals),
                                          .exchange = data<void>(shared.exchange)},
                                         current_stream(x)));
  });
  const auto none = [&] { return at::empty({0}, options); };
  const Tensor dx = need_dx ? at::mm(dgates, w_ih).view(x.sizes()) : none();
  if (!need_dh0) dh = none();
  if (!need_dw) return {dx, dh, dc, none(), none(), none(), none(), none()};
  const Tensor by_gate = dgates.t();
  const Tensor before = outputs_before(sequence, !batch_sizes, outputs, h_first, reverse);
  const Tensor dw_hr =
      w_hr ? at::mm(douts.t(),
                    (saved_gates.narrow(1, 3 * hidden, hidden) * saved_cells.tanh()).to(dtype))
           : none();
  return {dx, dh, dc, at::mm(by_gate, rows), at::mm(by_gate, before), dgates.sum(0), none(), dw_hr};
}

template <typename T, typename W>
void run_step(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& w_ih,
              const Tensor& w_hh, const Tensor& bias, const Tensor& out) {
  auto args = step_args<T, W>(x, h, w_ih, w_hh, out);
  args.c_prev = args.c = data<Wide<T>>(c);
  args.b_ih = bias.defined() ? data<T>(bias) : nullptr;
  check_launch("lstm_step_", launch_lstm_step<T, W>(args, current_stream(x)));
}

void lstm_step_cuda_(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& w_ih,
                     const Tensor& w_hh, const OptionalTensor& bias, const Tensor& out) {
  check_lstm_step("lstm_step_", x, h, c, w_ih, w_hh, bias, out, wide_type(x.scalar_type()));
  const DeviceGuard guard(x.device());
  const Tensor b = bias ? bias->contiguous() : Tensor();
  if (w_ih.scalar_type() == x.scalar_type()) {
    ISS_DISPATCH(x.scalar_type(), "lstm_step_", [&] {
      run_step<Stored<scalar_t>, Stored<scalar_t>>(x, h, c, w_ih, w_hh, b, out);
    });
  } else if (w_ih.scalar_type() == at::kHalf) {
    run_step<float, Float16>(x, h, c, w_ih, w_hh, b, out);
  } else {
    run_step<float, Bfloat16>(x, h, c, w_ih, w_hh, b, out);
  }
}

TORCH_LIBRARY_IMPL(ISS_NAMESPACE, ISS_DEVICE, library) {
  library.impl("recurrent_forward", &recurrent_forward_cuda);
  library.impl("recurrent_backward", &recurrent_backward_cuda);
  library.impl("lstm_step_", &lstm_step_cuda_);
}

}  // namespace
}  // namespace iss
