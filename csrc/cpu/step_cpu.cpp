// SPDX-License-Identifier: Apache-2.0
// A single step uses each weight once for a few rows, so the products read weights where torch
// keeps them: packing them, or only making sure that packed ones are still valid, would take longer
// than the step itself.

#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <cstring>

#include "checks.h"
#include "cpu/kernels/table.h"
#include "cpu/recurrence.h"
#include "cpu/step.h"
#include "cpu/team.h"
#include "cpu/weight_gradients.h"
#include "memory.h"

namespace iss {
namespace {

// Multiplies that take as long as one unit's mathematics.
constexpr int64_t kPointwise = 32;

// at::empty, without the dispatcher.
Tensor made(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::detail::empty_cpu(sizes, dtype, std::nullopt, std::nullopt, std::nullopt,
                               std::nullopt);
}

// A tensor, or a copy of it. A tensor that is lent costs no reference counting, which would take a
// tenth of a small step.
using Lent = c10::MaybeOwned<Tensor>;

// In the type that the kernels compute in, row after row.
Lent widened(const Tensor& t) {
  const auto wide = wide_type(t.scalar_type());
  if (t.scalar_type() == wide) return t.expect_contiguous();
  return Lent::owned(t.to(wide).contiguous());
}

Lent widened(const OptionalTensor& t) { return t ? widened(*t) : Lent::owned(Tensor()); }

Tensor copied(const Tensor& t) {
  const Lent from = widened(t);
  const Tensor copy = made(from->sizes(), from->scalar_type());
  if (copy.numel() > 0) std::memcpy(copy.mutable_data_ptr(), from->const_data_ptr(), copy.nbytes());
  return copy;
}

template <typename T>
T* data(const Tensor& t) {
  return t.numel() > 0 ? t.mutable_data_ptr<T>() : nullptr;
}

// A contiguous weight from row `first` on, in place.
Packed in_place(const Tensor& weight, Order order, int64_t first = 0) {
  const char* const begin = static_cast<const char*>(weight.const_data_ptr());
  return {weight.scalar_type() == at::kBFloat16 ? Format::kBfloat16 : Format::kSame,
          begin + first * weight.size(1) * static_cast<int64_t>(weight.itemsize()), order};
}

// kernels.matmul on as many threads as it is worth.
template <typename T>
void multiply_in_place(const MatmulArgs<T>& args) {
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  each_part(kernels.panels(args.columns),
            args.rows * (args.k + args.k_more) * kernels.panel_units(),
            [&](int64_t begin, int64_t end) {
              MatmulArgs<T> part = args;
              part.panels = {begin, end};
              kernels.matmul(part);
            });
}

// What a step's forward reads and writes.
template <typename T>
struct Forward {
  const CellSpec& spec;
  int64_t rows, input, hidden;
  const T *x, *h0, *c0;       // [B, I], [B, H]
  const Tensor &w_ih, &w_hh;  // [G H, I], [G H, H], contiguous
  const T *b_ih, *b_hh;       // [G H], or nullptr
  T *h, *c, *gates, *saved;   // as in StepArgs

  void run() const {
    const Call call;
    const Kernels<T>& kernels = cpu_kernels().of<T>();
    // The product of the last gate is kept apart from its input where the cell says so.
    const int64_t columns = spec.gates * hidden;
    const int64_t apart = spec.bias_parts ? hidden : 0, joint = columns - apart;
    T *inputs, *product, *bias;
    const auto lay_out = [&](Arena arena) {
      inputs = arena.take<T>(rows * columns);
      product = arena.take<T>(rows * apart);
      bias = arena.take<T>(joint);
      return arena.used;
    };
    lay_out({static_cast<char*>(scratch(lay_out({nullptr})))});
    const T* const joint_bias = b_ih && b_hh ? bias : b_ih ? b_ih : b_hh;
    if (b_ih && b_hh)
      for (int64_t i = 0; i < joint; ++i) bias[i] = b_ih[i] + b_hh[i];

    const MatmulArgs<T> of_x{.rows = rows,
                             .k = input,
                             .columns = joint,
                             .panels = {},
                             .a = x,
                             .a_stride = input,
                             .b = in_place(w_ih, Order::kTransposed),
                             .bias = joint_bias,
                             .accumulate = false,
                             .out = inputs,
                             .out_stride = columns,
                             .scratch = nullptr};
    MatmulArgs<T> of_both = of_x;
    of_both.a_more = h0;
    of_both.a_more_stride = of_both.k_more = hidden;
    of_both.b_more = in_place(w_hh, Order::kTransposed);
    multiply_in_place(of_both);
    if (apart > 0) {
      MatmulArgs<T> last = of_x;
      last.columns = apart;
      last.b = in_place(w_ih, Order::kTransposed, joint);
      last.bias = b_ih ? b_ih + joint : nullptr;
      last.out = inputs + joint;
      multiply_in_place(last);
      last.k = last.a_stride = hidden;
      last.a = h0;
      last.b = in_place(w_hh, Order::kTransposed, joint);
      last.bias = b_hh ? b_hh + joint : nullptr;
      last.out = product;
      last.out_stride = hidden;
      multiply_in_place(last);
    }
    const T* const before = spec.has_c ? c0 : h0;
    each_part(kernels.panels(hidden, spec.gates),
              rows * kPointwise * kernels.panel_units(spec.gates), [&](int64_t begin, int64_t end) {
                kernels.of(spec.kind).step({.rows = rows,
                                            .hidden = hidden,
                                            .k = 0,
                                            .panels = {begin, end},
                                            .h_prev = h0,
                                            .h_prev_stride = hidden,
                                            .before = before,
                                            .before_stride = hidden,
                                            .resets = nullptr,
                                            .w_hh = {},
                                            .inputs = inputs,
                                            .inputs_stride = columns,
                                            .product_bias = apart > 0 ? product : nullptr,
                                            .c = c,
                                            .h = h,
                                            .h_stride = hidden,
                                            .gates = gates,
                                            .gates_stride = spec.saved_gates * hidden,
                                            .saved = saved,
                                            .scratch = nullptr,
                                            .product_bias_stride = hidden});
              });
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> step_forward_cpu(const CellSpec& spec, const Inputs& in_,
                                                            bool save) {
  const int64_t rows = in_.x.size(0), input = in_.x.size(1), hidden = in_.h0.size(1);
  const auto dtype = in_.x.scalar_type(), wide = wide_type(dtype);
  const Lent x = widened(in_.x), h0 = widened(in_.h0), c0 = widened(in_.c0);
  const Lent w_ih = in_.w_ih.expect_contiguous(), w_hh = in_.w_hh.expect_contiguous();
  const Lent b_ih = widened(in_.b_ih), b_hh = widened(in_.b_hh);
  Tensor y = made({rows, hidden}, wide);
  Tensor c = in_.c0 ? made({rows, hidden}, wide) : Tensor();
  Tensor gates, saved;
  if (save) {
    gates = made({rows, spec.saved_gates * hidden}, wide);
    saved = made({rows, spec.saved_states * hidden}, wide);
  }
  AT_DISPATCH_FLOATING_TYPES(wide, "recurrent_forward", [&] {
    using T = scalar_t;
    const auto if_given = [](const Tensor& t) { return t.defined() ? data<T>(t) : nullptr; };
    Forward<T>{spec,
               rows,
               input,
               hidden,
               data<T>(*x),
               data<T>(*h0),
               if_given(*c0),
               *w_ih,
               *w_hh,
               if_given(*b_ih),
               if_given(*b_hh),
               data<T>(y),
               if_given(c),
               if_given(gates),
               if_given(saved)}
        .run();
  });
  if (dtype != wide) {
    y = y.to(dtype);
    if (c.defined()) c = c.to(dtype);
  }
  return {std::move(y), std::move(c), std::move(gates), std::move(saved)};
}

BackwardResult step_backward_cpu(const CellSpec& spec, const Inputs& in_, const Tensor& dy_,
                                 const Tensor& dh_n_, const OptionalTensor& dc_n, const Tensor& y_,
                                 const Tensor& gates_, const Tensor& saved_, bool need_dx,
                                 bool need_dh0, bool need_dw) {
  const int64_t rows = in_.x.size(0), input = in_.x.size(1), hidden = in_.h0.size(1);
  const int64_t columns = spec.gates * hidden;
  const auto dtype = in_.x.scalar_type(), wide = wide_type(dtype);
  const Lent x = widened(in_.x), h0 = widened(in_.h0), c0 = widened(in_.c0), y = widened(y_);
  const Lent w_ih = in_.w_ih.expect_contiguous(), w_hh = in_.w_hh.expect_contiguous();
  const Lent gates = gates_.expect_contiguous(), saved = saved_.expect_contiguous();
  const Lent dy = widened(dy_), dh_n = widened(dh_n_);
  const Tensor dc = spec.has_c ? copied(*dc_n) : Tensor();
  const bool carries_h = spec.carries_h;
  const Tensor dh0 = carries_h ? copied(*dh_n) : need_dh0 ? made({rows, hidden}, wide) : Tensor();
  const Tensor dx = need_dx ? made({rows, input}, wide) : Tensor();
  Tensor dw_ih, dw_hh, db_ih, db_hh;
  if (need_dw) {
    dw_ih = recycled({columns, input}, wide);
    dw_hh = recycled({columns, hidden}, wide);
    db_ih = made({columns}, wide);
    if (spec.bias_parts) db_hh = made({columns}, wide);
  }
  const PackedCell cell{.spec = &spec,
                        .input = input,
                        .hidden = hidden,
                        .output = hidden,
                        .reverse = false,
                        .w_ih = {},
                        .w_hh = {},
                        .w_hr = {},
                        .bias = {},
                        .product_bias = {}};
  const Sequence one_step({rows}, rows);
  AT_DISPATCH_FLOATING_TYPES(wide, "recurrent_backward", [&] {
    using T = scalar_t;
    const Call call;
    const Kernels<T>& kernels = cpu_kernels().of<T>();
    T nothing;  // an empty gradient has no address, and nullptr stands for one that is not needed
    const auto if_given = [&](const Tensor& t) {
      return !t.defined() ? nullptr : t.numel() > 0 ? data<T>(t) : &nothing;
    };
    WeightGradients<T> weights(cell, one_step, *w_ih, data<T>(*x), data<T>(*gates), data<T>(*saved),
                               {.dx = nullptr,
                                .dw_ih = if_given(dw_ih),
                                .dw_hh = if_given(dw_hh),
                                .dw_hr = nullptr,
                                .db_ih = if_given(db_ih),
                                .db_hh = if_given(db_hh)});
    T *dinputs, *dproducts;
    const auto lay_out = [&](Arena arena) {
      dinputs = dproducts = arena.take<T>(rows * columns);
      if (spec.bias_parts) dproducts = arena.take<T>(rows * columns);
      weights.lay_out(arena, rows);
      return arena.used;
    };
    lay_out({static_cast<char*>(scratch(lay_out({nullptr})))});
    T* const carried = spec.has_c ? data<T>(dc) : carries_h ? data<T>(dh0) : nullptr;
    each_part(
        kernels.panels(hidden), rows * kPointwise * kernels.panel_units(),
        [&](int64_t begin, int64_t end) {
          kernels.of(spec.kind).step_backward({.rows = rows,
                                               .hidden = hidden,
                                               .k = 0,
                                               .panels = {begin, end},
                                               .a = dproducts,
                                               .a_stride = columns,
                                               .b = {},
                                               .resets = nullptr,
                                               .resets_after = nullptr,
                                               .dy = data<T>(*dy),
                                               .dh_n = carries_h ? nullptr : data<T>(*dh_n),
                                               .gates = data<T>(*gates),
                                               .gates_stride = columns,
                                               .saved = data<T>(*saved),
                                               .before = spec.has_c ? data<T>(*c0) : data<T>(*h0),
                                               .before_stride = hidden,
                                               .y = data<T>(*y),
                                               .y_stride = hidden,
                                               .carried = carried,
                                               .dinputs = dinputs,
                                               .dproducts = dproducts,
                                               .scratch = nullptr});
        });
    // out = or += d @ w, a weight in place.
    const auto through = [&](const T* d, const Tensor& w, bool accumulate, const Tensor& out) {
      multiply_in_place<T>({.rows = rows,
                            .k = columns,
                            .columns = w.size(1),
                            .panels = {},
                            .a = d,
                            .a_stride = columns,
                            .b = in_place(w, Order::kStored),
                            .bias = nullptr,
                            .accumulate = accumulate,
                            .out = data<T>(out),
                            .out_stride = w.size(1),
                            .scratch = nullptr});
    };
    if (need_dh0) through(dproducts, *w_hh, carries_h, dh0);
    if (need_dx) through(dinputs, *w_ih, false, dx);
    if (!need_dw) return;
    for (const Tensor& db : {db_ih, db_hh})
      if (db.defined()) std::fill_n(db.mutable_data_ptr<T>(), columns, T(0));
    weights.start();
    weights.add({.steps = {0, 1, 0, rows},
                 .dinputs = dinputs,
                 .dproducts = dproducts,
                 .stride = columns,
                 .outputs = nullptr,
                 .h_prev = data<T>(*h0),
                 .masked = nullptr},
                false);
  });
  if (need_dw && rows == 0) dw_ih.zero_(), dw_hh.zero_();
  const auto or_empty = [&](bool needed, const Tensor& t) {
    return !needed || !t.defined() ? made({0}, dtype) : dtype == wide ? t : t.to(dtype);
  };
  return {or_empty(need_dx, dx),    or_empty(need_dh0, dh0),  or_empty(true, dc),
          or_empty(need_dw, dw_ih), or_empty(need_dw, dw_hh), or_empty(need_dw, db_ih),
          or_empty(need_dw, db_hh), made({0}, dtype)};
}

}  // namespace iss
