// SPDX-License-Identifier: Apache-2.0
// recurrent_forward and recurrent_backward on the CPU. bfloat16 computes in float32: activations are widened
// at the door, weights as they are loaded.

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/kernels/table.h"
#include "memory.h"
#include "cpu/weight_gradients.h"
#include "cpu/recurrence.h"
#include "cpu/team.h"
#include "host.h"

namespace iss {
namespace {

template <typename T>
T* data(const Tensor& t) {
  return t.numel() > 0 ? t.mutable_data_ptr<T>() : nullptr;
}

// In the type that the kernels compute in, row after row.
Tensor widened(const Tensor& t) { return t.to(wide_type(t.scalar_type())).contiguous(); }

// The same as a copy of its own. (Tensor::to takes a microsecond more.)
Tensor copied(const Tensor& t) {
  const Tensor from = widened(t), copy = recycled(from.sizes(), from.scalar_type());
  if (from.numel() > 0) std::memcpy(copy.mutable_data_ptr(), from.const_data_ptr(), from.nbytes());
  return copy;
}

ForwardResult recurrent_forward_cpu(
    std::string_view name, const Tensor& x, const OptionalTensor& batch_sizes,
    const OptionalTensor& resets, const Tensor& h0, const OptionalTensor& c_0, const Tensor& w_ih,
    const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
    const OptionalTensor& w_hr, bool reverse, bool save) {
  const NoAutocast no_autocast;
  const auto [cell, op] = check_cell(name, "forward");
  check_recurrent(op.c_str(), cell,
                  {name, x, batch_sizes, resets, h0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr});
  TORCH_CHECK(cell.kind == CellKind::kLstm && !resets, op, ": expected lstm without resets");
  const Tensor c0 = *c_0;
  const int64_t hidden = c0.size(1), output = h0.size(1);
  const Sequence sequence = sequence_of(x, batch_sizes, h0.size(0));

  const auto dtype = x.scalar_type();
  const auto wide = wide_type(dtype);
  std::vector<int64_t> y_shape = x.sizes().vec();
  y_shape.back() = output;
  const Tensor y = recycled(y_shape, wide);
  const Tensor h_n = recycled({h0.size(0), output}, wide);
  const Tensor c_n = copied(c0);
  const Tensor gates = recycled({save ? sequence.rows : 0, 4 * hidden}, wide);
  const Tensor cells = recycled({save ? sequence.rows : 0, hidden}, wide);
  const Tensor rows = widened(x), h_first = widened(h0);

  // When training, weights change before they are used again; w_ih may serve one product alone.
  const bool once = save && sequence.rows <= kBlockRows;
  const auto packed = [&](const Tensor& weight, bool gates) {
    const Layout layout{.transposed = true, .gates = gates};
    // To look whether w_hh is finite takes as long as to multiply a few states of zeros by it.
    const bool look = h0.size(0) > 4;
    return save ? pack(weight.contiguous(), layout, {}, look)
                : pack_once(weight.contiguous(), layout);
  };
  const Tensor bias = b_ih && b_hh ? widened(*b_ih) + widened(*b_hh)
                      : b_ih       ? widened(*b_ih)
                      : b_hh       ? widened(*b_hh)
                                   : Tensor();
  const Stack stack{{{.input = x.size(-1),
                      .hidden = hidden,
                      .output = output,
                      .reverse = reverse,
                      .w_ih = once ? Matrix() : packed(w_ih, false),
                      .w_hh = packed(w_hh, true),
                      .w_hr = w_hr ? packed(*w_hr, false) : Matrix(),
                      .bias = bias}}};
  AT_DISPATCH_FLOATING_TYPES(wide, "lstm_forward", [&] {
    if (once) {  // all of K in one part, for the sums of run_stack
      const int64_t terms = std::max<int64_t>(1, x.size(-1));
      const int64_t panel = terms * cpu_kernels().of<scalar_t>().panel_columns() * sizeof(scalar_t);
      const Tensor weight = w_ih.contiguous();
      multiply_once<scalar_t>({data<scalar_t>(rows), sequence.rows, x.size(-1)},
                              pack_args(weight, {.transposed = true, .gates = false}), terms,
                              bias.defined() ? data<scalar_t>(bias) : nullptr,
                              static_cast<scalar_t*>(scratch(available_threads() * panel)),
                              data<scalar_t>(gates));
    }
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

BackwardResult recurrent_backward_cpu(
    const Tensor& dy, const Tensor& dh_n, const OptionalTensor& dc_last, std::string_view name,
    const Tensor& x, const OptionalTensor& batch_sizes, const OptionalTensor& resets,
    const Tensor& h0, const OptionalTensor& c_0, const Tensor& w_ih, const Tensor& w_hh,
    const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensor& w_hr,
    const Tensor& y, const Tensor& gates, const Tensor& cells, bool reverse, bool need_dx,
    bool need_dh0, bool need_dw) {
  const NoAutocast no_autocast;
  const auto [cell_spec, op] = check_cell(name, "backward");
  const Inputs inputs{name, x, batch_sizes, resets, h0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr};
  check_recurrent(op.c_str(), cell_spec, inputs);
  check_recurrent_backward(op.c_str(), cell_spec, inputs, y, gates, cells, dy, dh_n, dc_last);
  TORCH_CHECK(cell_spec.kind == CellKind::kLstm && !resets, op, ": expected lstm without resets");
  const Tensor c0 = *c_0, dc_n = *dc_last;
  const int64_t hidden = c0.size(1), output = h0.size(1);
  const Sequence sequence = sequence_of(x, batch_sizes, h0.size(0));

  const auto dtype = x.scalar_type(), wide = wide_type(dtype);
  const Tensor outputs = widened(y), douts = widened(dy), rows = widened(x);
  const Tensor h_first = widened(h0), c_first = widened(c0), dh_last = widened(dh_n);
  const Tensor saved_gates = gates.contiguous(), saved_cells = cells.contiguous();
  const Tensor dh0 = need_dh0 ? copied(dh_n) : Tensor(), dc = copied(dc_n);
  const auto packed = [](const Tensor& weight) {
    return pack(weight.contiguous(), {.transposed = false, .gates = false});
  };
  const Cell cell{.input = x.size(-1),
                  .hidden = hidden,
                  .output = output,
                  .reverse = reverse,
                  .w_ih = Matrix(),
                  .w_hh = packed(w_hh),
                  .w_hr = w_hr ? packed(*w_hr) : Matrix(),
                  .bias = Tensor()};
  const bool once = sequence.rows <= kBlockRows;
  Tensor dx, dw_ih, dw_hh, db, dw_hr;
  AT_DISPATCH_FLOATING_TYPES(wide, "lstm_backward", [&] {
    using T = scalar_t;
    const Tensor weight = need_dx ? w_ih.contiguous() : Tensor();
    const PackArgs by_input =
        need_dx ? pack_args(weight, {.transposed = false, .gates = false}) : PackArgs();
    Backward<T> backward(cell, sequence, need_dw);
    T* blocks = nullptr;
    char *packed_input, *packed_rows, *packed_states, *packed_cells;
    const auto lay_out = [&](Arena arena) {
      const auto take = [&](bool needed, const auto&... of) {
        return arena.take<char>(needed ? Factor<T>::bytes(of...) : 0);
      };
      backward.lay_out(arena);
      blocks = arena.take<T>(available_threads() * kBlockElements);
      packed_input = take(need_dx && !once, by_input.k, by_input.columns, by_input.format);
      packed_rows = take(need_dw, backward.most_rows(), x.size(-1));
      packed_states = take(need_dw, backward.most_rows(), output);
      packed_cells = take(need_dw && w_hr, backward.most_rows(), hidden);
      return arena.used;
    };
    lay_out({static_cast<char*>(scratch(lay_out({nullptr})))});

    std::optional<Factor<T>> input;
    if (need_dx) {
      dx = recycled({sequence.rows, x.size(-1)}, wide);
      if (!once) input.emplace(by_input, packed_input);
    }
    Tensor unused;
    if (need_dw) {
      db = at::zeros({4 * hidden}, wide);
      dw_ih = recycled({4 * hidden, x.size(-1)}, wide);
      dw_hh = recycled({4 * hidden, output}, wide);
      if (w_hr) dw_hr = recycled({output, hidden}, wide), unused = at::zeros({output}, wide);
      if (sequence.rows == 0)
        for (const Tensor& dw : {dw_ih, dw_hh, dw_hr})
          if (dw.defined()) dw.zero_();
    }
    const auto products = [&](const StepGradients<T>& of, bool accumulate) {
      const StepRange& steps = of.steps;
      const Rows<T> dgates{of.dgates, steps.rows, 4 * hidden};
      if (need_dx) {
        T* const out = data<T>(dx) + steps.first_row * x.size(-1);
        if (once)
          multiply_once<T>(dgates, by_input, kTerms, nullptr, blocks, out);
        else
          multiply<T>(dgates, *input, out);
      }
      if (!need_dw) return;
      const Rows<T> inputs{data<T>(rows) + steps.first_row * x.size(-1), steps.rows, x.size(-1)};
      const Rows<T> states{of.h_prev, steps.rows, output};
      multiply_transposed<T>(
          dgates,
          {{Factor<T>(inputs.pack_args(), packed_rows), data<T>(dw_ih)},
           {Factor<T>::of_states(states, dgates, packed_states), data<T>(dw_hh)}},
          accumulate, blocks, data<T>(db));
      if (!w_hr) return;
      const auto of_steps = [&](const Tensor& t) {
        return t.narrow(0, steps.first_row, steps.rows);
      };
      const Tensor h =
          of_steps(saved_gates).narrow(1, 3 * hidden, hidden) * of_steps(saved_cells).tanh();
      const Rows<T> cell_outputs{data<T>(h), steps.rows, hidden};
      multiply_transposed<T>({of.outputs, steps.rows, output},
                             {{Factor<T>(cell_outputs.pack_args(), packed_cells), data<T>(dw_hr)}},
                             accumulate, blocks, data<T>(unused));
    };
    backward.run({.h0 = data<T>(h_first),
                  .c0 = data<T>(c_first),
                  .y = data<T>(outputs),
                  .gates = data<T>(saved_gates),
                  .cells = data<T>(saved_cells),
                  .dy = data<T>(douts),
                  .dh_n = data<T>(dh_last),
                  .dh0 = need_dh0 ? data<T>(dh0) : nullptr,
                  .dc = data<T>(dc)},
                 products);
    if (need_dx) dx = dx.view(x.sizes());
  });
  const auto or_empty = [&](const Tensor& t) {
    return t.defined() ? t.to(dtype) : at::empty({0}, x.options());
  };
  return {or_empty(dx),    or_empty(dh0), dc.to(dtype),   or_empty(dw_ih),
          or_empty(dw_hh), or_empty(db), at::empty({0}, x.options()), or_empty(dw_hr)};
}

TORCH_LIBRARY_IMPL(iss_kernels, CPU, library) {
  library.impl("recurrent_forward", &recurrent_forward_cpu);
  library.impl("recurrent_backward", &recurrent_backward_cpu);
}

}  // namespace
}  // namespace iss
