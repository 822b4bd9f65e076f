// SPDX-License-Identifier: Apache-2.0
// recurrent_forward and recurrent_backward on the CPU. Where a CPU multiplies bfloat16, products of
// bfloat16 cells round their rows and are summed in float32; elsewhere weights are widened as they
// are loaded. All else is float32: activations are widened when the op begins.

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "checks.h"
#include "cpu/kernels/table.h"
#include "memory.h"
#include "cpu/recurrence.h"
#include "cpu/step.h"
#include "cpu/weight_gradients.h"
#include "cpu/team.h"
#include "host.h"

namespace iss {
namespace {

template <typename T>
T* data(const Tensor& t) {
  return t.numel() > 0 ? t.mutable_data_ptr<T>() : nullptr;
}

// Contiguous, in the type that the kernels compute in.
Tensor widened(const Tensor& t) { return converted(t, wide_type(t.scalar_type())); }

// The same, always as a copy. (Tensor::to takes a microsecond longer.)
Tensor copied(const Tensor& t) {
  const Tensor from = widened(t), copy = recycled(from.sizes(), from.scalar_type());
  if (from.numel() > 0) std::memcpy(copy.mutable_data_ptr(), from.const_data_ptr(), from.nbytes());
  return copy;
}

ForwardResult recurrent_forward_cpu(std::string_view name, const Tensor& x,
                                    const OptionalTensor& batch_sizes, const OptionalTensor& resets,
                                    const Tensor& h0, const OptionalTensor& c0, const Tensor& w_ih,
                                    const Tensor& w_hh, const OptionalTensor& b_ih,
                                    const OptionalTensor& b_hh, const OptionalTensor& w_hr,
                                    const OptionalTensor& masks, bool reverse, bool save) {
  const NoAutocast no_autocast;
  const auto [spec, op] = check_cell(name, "forward");
  const Inputs given{name, x, batch_sizes, resets, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, masks};
  check_recurrent(op.c_str(), spec, given);
  if (is_single_step(given)) {
    const auto [h, c, gates, saved] = step_forward_cpu(spec, given, save);
    const auto or_empty = [&](const Tensor& t, at::IntArrayRef shape, at::ScalarType type) {
      return t.defined() ? t : at::empty(shape, type);
    };
    const auto wide = wide_type(x.scalar_type());
    const int64_t hidden = h0.size(1);
    return {h, h.clone(), or_empty(c, {0}, x.scalar_type()),
            or_empty(gates, {0, spec.saved_gates * hidden}, wide),
            or_empty(saved, {0, spec.saved_states * hidden}, wide)};
  }
  const int64_t input = x.size(-1), output = h0.size(1), hidden = w_ih.size(0) / spec.gates;
  const int64_t depth = depth_of(spec, w_hh, hidden);
  Sequence sequence = sequence_of(x, batch_sizes, h0.size(0));
  const Tensor reset_rows = resets ? resets->contiguous() : Tensor();
  if (resets) sequence.resets = data<bool>(reset_rows);

  const auto dtype = x.scalar_type();
  const auto wide = wide_type(dtype);
  std::vector<int64_t> y_shape = x.sizes().vec();
  y_shape.back() = output;
  const Tensor y = recycled(y_shape, wide);
  const Tensor h_n = recycled({h0.size(0), output}, wide);
  const Tensor c_n = c0 ? copied(*c0) : at::empty({0}, x.options());
  const int64_t saved_rows = save ? sequence.rows : 0;
  const Tensor gates = recycled({saved_rows, spec.gates_kept(depth) * hidden}, wide);
  const Tensor cells = recycled({saved_rows, spec.states_kept(depth) * hidden}, wide);
  const Tensor rows = widened(x), h_first = widened(h0);
  const Tensor wide_masks = masks ? widened(*masks) : Tensor();

  // When training, weights change before they are used again, so w_ih serves this call only.
  const bool once = save && sequence.rows <= kBlockRows;
  const bool begins_with_inputs = !save && can_begin_with_inputs(spec, w_ih.scalar_type());
  // Looking whether w_hh is finite takes as long as multiplying a few rows of zeros by it.
  const bool look = h0.size(0) > 4 || resets;
  const auto packed = [&](const Tensor& weight, int gates, int64_t parts, bool look) {
    const Layout layout{.transposed = true, .gates = gates, .parts = parts};
    return save ? pack(weight.contiguous(), layout, {}, look)
                : pack_once(weight.contiguous(), layout, look);
  };
  const auto [bias, product_bias] = merged_biases(spec, b_ih ? widened(*b_ih) : Tensor(),
                                                  b_hh ? widened(*b_hh) : Tensor(), depth);
  const Stack stack{
      {{.spec = &spec,
        .input = input,
        .hidden = hidden,
        .output = output,
        .reverse = reverse,
        .w_ih = once ? Matrix() : packed(w_ih, begins_with_inputs ? spec.gates : 1, 1, false),
        .w_hh = packed(w_hh, spec.gates, depth, save ? look : true),
        .w_hr = w_hr ? packed(*w_hr, 1, 1, false) : Matrix(),
        .bias = bias,
        .product_bias = product_bias,
        .depth = depth,
        .begins_with_inputs = begins_with_inputs}}};
  // Activated gates replace the projected inputs in place.
  const Tensor inputs = spec.saved_gates == spec.gates && save && depth == 1 ? gates
                        : once ? recycled({sequence.rows, spec.gates * hidden}, wide)
                               : Tensor();
  AT_DISPATCH_FLOATING_TYPES(wide, "recurrent_forward", [&] {
    using T = scalar_t;
    const auto if_saved = [&](const Tensor& t) { return save ? data<T>(t) : nullptr; };
    if (once) {  // K is not cut into parts, so that sums have the bits of run_stack's
      const int64_t terms = std::max<int64_t>(1, input);
      const Tensor weight = w_ih.contiguous();
      const PackArgs by_input = pack_args(weight, {.transposed = true});
      const int64_t bytes = available_threads() * once_bytes<T>(terms, by_input.format);
      multiply_once<T>({data<T>(rows), sequence.rows, input}, by_input, terms,
                       bias.defined() ? data<T>(bias) : nullptr, static_cast<char*>(scratch(bytes)),
                       data<T>(inputs));
    }
    run_stack<T>(stack, sequence, data<T>(rows),
                 {{.h0 = data<T>(h_first),
                   .c = c0 ? data<T>(c_n) : nullptr,
                   .h_n = data<T>(h_n),
                   .inputs = inputs.defined() ? data<T>(inputs) : nullptr,
                   .gates = if_saved(gates),
                   .saved = if_saved(cells),
                   .masks = masks ? data<T>(wide_masks) : nullptr}},
                 data<T>(y));
  });
  return {converted(y, dtype), converted(h_n, dtype), converted(c_n, dtype), gates, cells};
}

BackwardResult recurrent_backward_cpu(
    const Tensor& dy, const Tensor& dh_n, const OptionalTensor& dc_n, std::string_view name,
    const Tensor& x, const OptionalTensor& batch_sizes, const OptionalTensor& resets,
    const Tensor& h0, const OptionalTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
    const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensor& w_hr,
    const OptionalTensor& masks, const Tensor& y, const Tensor& gates, const Tensor& cells,
    bool reverse, bool need_dx, bool need_dh0, bool need_dw) {
  const NoAutocast no_autocast;
  const auto [spec, op] = check_cell(name, "backward");
  const Inputs inputs{name, x, batch_sizes, resets, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, masks};
  check_recurrent(op.c_str(), spec, inputs);
  check_recurrent_backward(op.c_str(), spec, inputs, y, gates, cells, dy, dh_n, dc_n);
  if (is_single_step(inputs))
    return step_backward_cpu(spec, inputs, dy, dh_n, dc_n, y, gates, cells, need_dx, need_dh0,
                             need_dw);
  const int64_t input = x.size(-1), output = h0.size(1), hidden = w_ih.size(0) / spec.gates;
  const int64_t depth = depth_of(spec, w_hh, hidden);
  Sequence sequence = sequence_of(x, batch_sizes, h0.size(0));
  const Tensor reset_rows = resets ? resets->contiguous() : Tensor();
  if (resets) sequence.resets = data<bool>(reset_rows);

  const auto dtype = x.scalar_type(), wide = wide_type(dtype);
  const Tensor outputs = widened(y), douts = widened(dy), rows = widened(x);
  const Tensor h_first = widened(h0), dh_last = widened(dh_n);
  const Tensor c_first = c0 ? widened(*c0) : Tensor();
  const Tensor saved_gates = gates.contiguous(), saved_cells = cells.contiguous();
  const Tensor wide_masks = masks ? widened(*masks) : Tensor();
  Tensor dh0 = need_dh0 || spec.carries_h ? copied(dh_n) : Tensor();
  const Tensor dc = spec.has_c ? copied(*dc_n) : Tensor();
  const auto packed = [](const Tensor& weight, int64_t parts) {
    return pack(weight.contiguous(), {.transposed = false, .parts = parts});
  };
  const PackedCell cell{.spec = &spec,
                        .input = input,
                        .hidden = hidden,
                        .output = output,
                        .reverse = reverse,
                        .w_ih = Matrix(),
                        .w_hh = packed(w_hh, depth),
                        .w_hr = w_hr ? packed(*w_hr, 1) : Matrix(),
                        .bias = Tensor(),
                        .product_bias = Tensor(),
                        .depth = depth};
  const Tensor weight = need_dx ? w_ih.contiguous() : Tensor();
  const int64_t gate_rows = spec.gates * hidden;
  Tensor dx, dw_ih, dw_hh, db_ih, db_hh, dw_hr;
  if (need_dx) dx = recycled(x.sizes(), wide);
  if (need_dw) {
    dw_ih = recycled({gate_rows, input}, wide);
    dw_hh = recycled({depth * gate_rows, output}, wide);
    db_ih = at::zeros({gate_rows}, wide);
    if (spec.bias_parts) db_hh = at::zeros({depth * gate_rows}, wide);
    if (w_hr) dw_hr = recycled({output, hidden}, wide);
    if (sequence.rows == 0)
      for (const Tensor& dw : {dw_ih, dw_hh, dw_hr})
        if (dw.defined()) dw.zero_();
  }
  AT_DISPATCH_FLOATING_TYPES(wide, "recurrent_backward", [&] {
    using T = scalar_t;
    const auto if_given = [](const Tensor& t) { return t.defined() ? data<T>(t) : nullptr; };
    Backward<T> backward(cell, sequence, need_dw);
    WeightGradients<T> weights(cell, sequence, weight, data<T>(rows), data<T>(saved_gates),
                               data<T>(saved_cells),
                               {.dx = if_given(dx),
                                .dw_ih = if_given(dw_ih),
                                .dw_hh = if_given(dw_hh),
                                .dw_hr = if_given(dw_hr),
                                .db_ih = if_given(db_ih),
                                .db_hh = if_given(db_hh)});
    const auto lay_out = [&](Arena arena) {
      backward.lay_out(arena);
      weights.lay_out(arena, backward.most_rows());
      return arena.used;
    };
    lay_out({static_cast<char*>(scratch(lay_out({nullptr})))});
    weights.start();
    backward.run({.h0 = data<T>(h_first),
                  .c0 = if_given(c_first),
                  .y = data<T>(outputs),
                  .gates = data<T>(saved_gates),
                  .saved = data<T>(saved_cells),
                  .dy = data<T>(douts),
                  .dh_n = data<T>(dh_last),
                  .dh0 = need_dh0 ? data<T>(dh0) : nullptr,
                  .carried = spec.has_c       ? data<T>(dc)
                             : spec.carries_h ? data<T>(dh0)
                                              : nullptr,
                  .masks = if_given(wide_masks)},
                 [&](const StepGradients<T>& of, bool accumulate) { weights.add(of, accumulate); });
  });
  if (spec.deep && need_dw) db_ih.copy_(db_hh.narrow(0, 0, gate_rows));
  const auto or_empty = [&](const Tensor& t) {
    return t.defined() ? converted(t, dtype) : at::empty({0}, x.options());
  };
  if (!need_dh0) dh0 = Tensor();
  return {or_empty(dx),    or_empty(dh0),   or_empty(dc),    or_empty(dw_ih),
          or_empty(dw_hh), or_empty(db_ih), or_empty(db_hh), or_empty(dw_hr)};
}

TORCH_LIBRARY_IMPL(iss_kernels, CPU, library) {
  library.impl("recurrent_forward", &recurrent_forward_cpu);
  library.impl("recurrent_backward", &recurrent_backward_cpu);
}

}  // namespace
}  // namespace iss
