// SPDX-License-Identifier: Apache-2.0
// The derivative of recurrent_forward, on every device. It is not registered from Python, as the
// rest are in iss_kernels/ops.py, because that took longer than all kernels of a small network.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "recurrent.h"

namespace iss {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <typename Op>
c10::TypedOperatorHandle<Op> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Op>();
}

const auto& forward_op() {
  static const auto op = find<RecurrentForward>("iss_kernels::recurrent_forward");
  return op;
}

const auto& backward_op() {
  static const auto op = find<RecurrentBackward>("iss_kernels::recurrent_backward");
  return op;
}

struct Recurrent : torch::autograd::Function<Recurrent> {
  static variable_list forward(AutogradContext* context, std::string_view cell, const Tensor& x,
                               const OptionalTensor& batch_sizes, const OptionalTensor& resets,
                               const Tensor& h0, const OptionalTensor& c0, const Tensor& w_ih,
                               const Tensor& w_hh, const OptionalTensor& b_ih,
                               const OptionalTensor& b_hh, const OptionalTensor& w_hr,
                               const OptionalTensor& masks, bool reverse, bool save) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [y, h_n, c_n, gates, cells] = forward_op().call(
        cell, x, batch_sizes, resets, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, masks, reverse, save);
    const auto given = [](const OptionalTensor& t) { return t.value_or(Tensor()); };
    variable_list constant = {gates, cells};
    if (!c0) constant.push_back(c_n);
    context->mark_non_differentiable(constant);
    context->set_materialize_grads(false);
    context->save_for_backward({x, given(batch_sizes), given(resets), h0, given(c0), w_ih, w_hh,
                                given(b_ih), given(b_hh), given(w_hr), given(masks), y, gates,
                                cells});
    // One entry: each costs as much as an op's checks.
    context->saved_data["options"] =
        static_cast<int64_t>(find_cell(cell) - kCells) * 4 + reverse * 2 + save;
    return {y, h_n, c_n, gates, cells};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    const auto &x = saved[0], &h0 = saved[3], &w_ih = saved[5], &w_hh = saved[6], &y = saved[11];
    const auto given = [&](size_t i) {
      return saved[i].defined() ? OptionalTensor(saved[i]) : std::nullopt;
    };
    const OptionalTensor batch_sizes = given(1), resets = given(2), c0 = given(4), b_ih = given(7),
                         b_hh = given(8), w_hr = given(9), masks = given(10);
    Tensor gates = saved[12], cells = saved[13];
    const int64_t options = context->saved_data["options"].toInt();
    const CellSpec& spec = kCells[options / 4];
    const std::string_view cell = spec.name;
    const bool reverse = options & 2, saves = options & 1;
    for (const Tensor& gradient : gradients)  // its tangent would be lost
      TORCH_CHECK(
          !gradient.defined() || !gradient._fw_grad(/*level=*/0).defined(), cell,
          ": expected gradients without a tangent, got one of a dual_level that the forward "
          "ran outside of: run it inside");
    // recurrent_backward has a derivative of its own, for which nothing is recorded unless asked
    // for.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!at::GradMode::is_enabled()) below.emplace();
    if (!saves)
      std::tie(std::ignore, std::ignore, std::ignore, gates, cells) = forward_op().call(
          cell, x, batch_sizes, resets, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, masks, reverse, true);
    const auto or_zeros = [&](size_t i, const Tensor& like) {
      return gradients[i].defined() ? gradients[i] : at::zeros_like(like);
    };
    const Tensor dh_n = or_zeros(1, h0);
    const bool same = !gradients[1].defined() && !gradients[2].defined() && !w_hr;
    const OptionalTensor dc_n = !c0    ? std::nullopt
                                : same ? OptionalTensor(dh_n)
                                       : OptionalTensor(or_zeros(2, *c0));
    // Inputs are counted without those that are not given: x, batch_sizes, resets, h0, c0, weights.
    const size_t state = 1 + batch_sizes.has_value() + resets.has_value();
    const size_t weights = state + 1 + c0.has_value();
    const size_t end = weights + 2 + b_ih.has_value() + b_hh.has_value() + w_hr.has_value();
    const bool need_dx = context->needs_input_grad(0);
    const bool need_dh0 = context->needs_input_grad(state);
    const bool need_dw = context->needs_input_grad({{weights, end}});
    const auto [dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr] = backward_op().call(
        or_zeros(0, y), dh_n, dc_n, cell, x, batch_sizes, resets, h0, c0, w_ih, w_hh, b_ih, b_hh,
        w_hr, masks, y, gates, cells, reverse, need_dx, need_dh0, need_dw);
    const auto if_needed = [](bool needed, const Tensor& t) { return needed ? t : Tensor(); };
    return {{},
            if_needed(need_dx, dx),
            {},
            {},
            if_needed(need_dh0, dh0),
            if_needed(c0.has_value(), dc0),
            if_needed(need_dw, dw_ih),
            if_needed(need_dw, dw_hh),
            if_needed(need_dw && b_ih, db_ih),
            // A tensor of its own: what changes one gradient in place leaves the other alone.
            if_needed(need_dw && b_hh, spec.bias_parts ? db_hh
                                       : b_ih          ? db_ih.clone()
                                                       : db_ih),
            if_needed(need_dw && w_hr, dw_hr),
            {},
            {},
            {}};
  }
};

ForwardResult recurrent_forward_autograd(std::string_view cell, const Tensor& x,
                                         const OptionalTensor& batch_sizes,
                                         const OptionalTensor& resets, const Tensor& h0,
                                         const OptionalTensor& c0, const Tensor& w_ih,
                                         const Tensor& w_hh, const OptionalTensor& b_ih,
                                         const OptionalTensor& b_hh, const OptionalTensor& w_hr,
                                         const OptionalTensor& masks, bool reverse, bool save) {
  if (!at::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return forward_op().call(cell, x, batch_sizes, resets, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr,
                             masks, reverse, save);
  }
  const variable_list outputs = Recurrent::apply(cell, x, batch_sizes, resets, h0, c0, w_ih, w_hh,
                                                 b_ih, b_hh, w_hr, masks, reverse, save);
  return {outputs[0], outputs[1], outputs[2], outputs[3], outputs[4]};
}

TORCH_LIBRARY_IMPL(iss_kernels, Autograd, library) {
  library.impl("recurrent_forward", &recurrent_forward_autograd);
}

}  // namespace
}  // namespace iss
