// SPDX-License-Identifier: Apache-2.0
// recurrent_forward, recurrent_backward and recurrent_step_ on CUDA. The products with w_ih, and
// those that make the gradients of weights, are torch's GEMMs, one each for all steps; what happens
// from step to step is one kernel (plan.h), or for Tier::kSteps a GEMM and a pointwise kernel per
// step. A single step of few rows is one launch with both products in it, that of recurrent_step_.
// Nothing here waits for the device.

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

namespace iss {
namespace {

constexpr auto kContiguous = at::MemoryFormat::Contiguous;

// nullptr of a tensor that is undefined or empty, which a kernel has no use for.
template <typename T>
T* data(const Tensor& t, int64_t offset = 0) {
  return t.defined() && t.numel() > 0 ? mutable_values<T>(t) + offset : nullptr;
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

// like: a tensor on the device.
template <typename T>
LayerPlan plan_for(const CellSpec& cell, int64_t hidden, const Sequence& sequence,
                   const Tensor& like, bool projected, bool backward) {
  const LayerProblem problem = {.gates = cell.gates,
                                .hidden = hidden,
                                .batch = sequence.batch,
                                .projected = projected,
                                .math = math_of(like.scalar_type()),
                                .backward = backward,
                                .steps = sequence.steps};
  if (sequence.rows == 0 || cell.deep)
    return {.tier = Tier::kSteps, .math = problem.math, .backward = backward, .gates = cell.gates};
  DeviceLimits limits = device_limits(like.device());
  LayerPlan plan = plan_layer(problem, limits);
  const auto can_launch = [&](const LayerPlan& plan) {
    return with_cell(cell.kind, [&](auto kind) {
      return backward ? can_launch_resident_backward<kind(), T>(plan)
                      : can_launch_resident_forward<kind(), T>(plan);
    });
  };
  // The limits do not say all: a large cluster needs neighbours that are free, and another process
  // may hold part of the device.
  while (plan.blocks > 0 && !can_launch(plan)) {
    limits = less_than(plan, limits);
    plan = plan_layer(problem, limits);
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

// Where the state before a row's step, in the order of the layer, is zero: [N]. Undefined without
// resets. A reset of step t falls between steps t and t - 1.
Tensor cuts_of(const Sequence& sequence, const OptionalTensor& batch_sizes,
               const OptionalTensor& resets, bool reverse) {
  if (!resets) return {};
  const Tensor rows = resets->flatten();
  if (!reverse || sequence.rows == 0) return rows.contiguous();
  if (!batch_sizes)
    return at::cat({rows.narrow(0, sequence.batch, sequence.rows - sequence.batch),
                    at::zeros({sequence.batch}, rows.options())});
  const Tensor index = at::empty({sequence.rows}, at::kLong);
  int64_t* const to = index.mutable_data_ptr<int64_t>();
  for (int64_t t = 0; t < sequence.steps; ++t) {
    const int64_t after = t + 1 < sequence.steps ? sequence.sizes[t + 1] : 0;
    for (int64_t b = 0; b < sequence.sizes[t]; ++b)
      to[sequence.offsets[t] + b] = b < after ? sequence.offsets[t + 1] + b : sequence.rows;
  }
  return at::cat({rows, at::zeros({1}, rows.options())}).index_select(0, to_device(index, rows));
}

Steps steps_of(const Sequence& sequence, const Tensor& offsets, const Tensor& cuts, bool reverse) {
  return {.steps = sequence.steps,
          .batch = sequence.batch,
          .offsets = offsets.defined() ? offsets.const_data_ptr<int64_t>() : nullptr,
          .reverse = reverse,
          .cuts = data<bool>(cuts)};
}

// Memory that the blocks of a group share beside their own (Tier::kGrid).
struct GroupMemory {
  Tensor arrivals, exchange;

  GroupMemory(const LayerPlan& plan, const at::TensorOptions& options)
      : arrivals(at::zeros({plan.tier == Tier::kGrid ? plan.groups : 0}, options.dtype(at::kInt))),
        exchange(at::empty({plan.exchange_bytes}, options.dtype(at::kByte))) {}
};

// t, with zeros in the rows where `cuts`, if there are any, are true.
Tensor cut(const Tensor& t, const Tensor& cuts) {
  return cuts.defined() ? t.masked_fill(cuts.unsqueeze(1), 0) : t;
}

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

// What every single step is told. W: how the weights are stored, as x or in 16 bits.
template <typename T, typename W = T>
SingleStepArgs<T, W> step_args(const Tensor& x, const Tensor& h, const Tensor& w_ih,
                               const Tensor& w_hh, const Tensor& out) {
  return {.rows = x.size(0),
          .input = x.size(1),
          .hidden = out.size(1),
          .output = h.size(1),
          .x = data<T>(x),
          .x_stride = x.stride(0),
          .h_before = data<T>(h),
          .h_before_stride = h.stride(0),
          .w_ih = data<W>(w_ih),
          .w_ih_stride = w_ih.stride(0),
          .w_hh = data<W>(w_hh),
          .w_hh_stride = w_hh.stride(0),
          .h = data<T>(out),
          .h_stride = out.stride(0)};
}

Tensor with_adjacent_columns(const Tensor& t) { return t.stride(1) == 1 ? t : t.contiguous(); }

Tensor contiguous_or_none(const OptionalTensor& t) { return t ? t->contiguous() : Tensor(); }

// Both biases, but for the part of b_hh that joins a product (product_bias). first: G H, as many of
// a deep cell's b_hh as join the input.
Tensor input_bias(const CellSpec& cell, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                  int64_t first) {
  if (!b_hh) return b_ih ? *b_ih : Tensor();
  if (cell.deep) return b_ih ? *b_ih + b_hh->narrow(0, 0, first) : b_hh->narrow(0, 0, first);
  Tensor of_products = *b_hh;
  if (cell.bias_parts) {
    const int64_t hidden = b_hh->size(0) / cell.gates;
    of_products = b_hh->clone();
    of_products.narrow(0, (cell.gates - 1) * hidden, hidden).zero_();
  }
  return b_ih ? *b_ih + of_products : of_products;
}
Tensor product_bias(const CellSpec& cell, const OptionalTensor& b_hh, int64_t first) {
  if (cell.deep && b_hh) return b_hh->narrow(0, first, b_hh->size(0) - first).contiguous();
  if (!cell.bias_parts || !b_hh) return {};
  const int64_t hidden = b_hh->size(0) / cell.gates;
  return b_hh->narrow(0, (cell.gates - 1) * hidden, hidden).contiguous();
}

// The arguments of a forward as the kernels take them: contiguous, what is not there undefined.
struct ForwardTensors {
  const CellSpec& cell;
  const char* op;
  int64_t depth;
  Tensor cuts, h0, c0, w_hh, w_hr, masks;
  Tensor y, h_n, c_n, gates, saved;  // results
};

// Tier::kOneStep.
template <typename T>
void forward_one_step(const ForwardTensors& f, const Tensor& x, const Tensor& w_ih,
                      const OptionalTensor& b_ih, const OptionalTensor& b_hh) {
  const Tensor h_first = cut(f.h0, f.cuts), c_first = f.c0.defined() ? cut(f.c0, f.cuts) : Tensor();
  const Tensor x_rows = with_adjacent_columns(x), w_ih_rows = with_adjacent_columns(w_ih);
  const Tensor bias_ih = contiguous_or_none(b_ih), bias_hh = contiguous_or_none(b_hh);
  const Tensor out = f.w_hr.defined() ? at::empty_like(f.c_n) : f.y;
  auto args = step_args<T>(x_rows, h_first, w_ih_rows, f.w_hh, out);
  args.c0 = data<T>(c_first);
  args.b_ih = data<T>(bias_ih);
  args.b_hh = data<T>(bias_hh);
  args.h_n = f.w_hr.defined() ? nullptr : data<T>(f.h_n);
  args.saved = data<Wide<T>>(f.saved);
  args.c_n = data<T>(f.c_n);
  args.gates = data<Wide<T>>(f.gates);
  check_launch(f.op, with_cell(f.cell.kind, [&](auto kind) {
                 return launch_single_step<kind()>(args, current_stream(x));
               }));
  if (f.w_hr.defined()) {
    Tensor to = f.y;
    at::mm_out(to, out, f.w_hr.t());
    f.h_n.copy_(f.y);
  }
}

// The masks of `rows` rows of the batch: of states (0) or candidates (1). Undefined without.
Tensor mask_of(const Tensor& masks, int64_t which, int64_t batch_row, int64_t rows) {
  return masks.defined() ? masks.select(0, which).narrow(0, batch_row, rows) : Tensor();
}

// Tier::kSteps. inputs [N, G H]; bias: product_bias; c [B, H] in Wide<T>: c0 in, c_n out.
template <typename T>
void forward_by_steps(const ForwardTensors& f, const Sequence& sequence, const Tensor& inputs,
                      const Tensor& bias, const Tensor& c, bool reverse) {
  const int64_t depth = f.depth, rows_of_w = f.w_hh.size(0) / depth,
                hidden = rows_of_w / f.cell.gates, states_kept = (depth - 1) * hidden;
  const Tensor by_gate = f.w_hh.t();
  const auto for_batch = [&](bool needed, int64_t width) {
    return needed ? at::empty({sequence.batch, width}, inputs.options()) : Tensor();
  };
  const Tensor products = for_batch(true, rows_of_w), masked = for_batch(f.masks.defined(), hidden);
  // What a projection, or a micro-step that is not the last, takes.
  const Tensor inner = for_batch(f.w_hr.defined() || depth > 1, hidden);
  const Tensor no_bias =
      depth > 1 && !bias.defined() ? at::zeros({rows_of_w}, inputs.options()) : Tensor();
  const auto micro_step = [&](int64_t d, int64_t batch_row, int64_t rows, int64_t row,
                              const Tensor& before) {
    const Tensor mask = mask_of(f.masks, 0, batch_row, rows);
    const Tensor operand = !mask.defined() ? before
                           : d == 0        ? before * mask
                                           : masked.narrow(0, batch_row, rows);
    Tensor of_rows = products.narrow(0, batch_row, rows);
    at::mm_out(of_rows, operand, by_gate.narrow(1, d * rows_of_w, rows_of_w));
    const bool last = d == depth - 1;
    const Tensor h =
        f.w_hr.defined() || !last ? inner.narrow(0, batch_row, rows) : f.y.narrow(0, row, rows);
    PointwiseForwardArgs<T> args = {
        .rows = rows,
        .hidden = hidden,
        .products = data<T>(of_rows),
        .inputs = d == 0           ? data<T>(inputs, row * rows_of_w)
                  : bias.defined() ? data<T>(bias, (d - 1) * rows_of_w)
                                   : data<T>(no_bias),
        .inputs_stride = d == 0 ? rows_of_w : 0,
        .product_bias = data<T>(bias),
        .cuts = d == 0 ? data<bool>(f.cuts, row) : nullptr,
        .h_before = data<T>(before),
        .c = data<Wide<T>>(c, batch_row * hidden),
        .h = data<T>(h),
        .gates = data<Wide<T>>(f.gates, (row * depth + d) * rows_of_w),
        .gates_stride = depth * rows_of_w,
        .saved = f.cell.deep ? nullptr : data<Wide<T>>(f.saved, row * hidden),
        .mask = data<T>(mask_of(f.masks, 1, batch_row, rows)),
        .state_mask = data<T>(mask),
        .masked = data<T>(masked, batch_row * hidden)};
    if (!last) args.states = data<Wide<T>>(f.saved, row * states_kept + d * hidden);
    args.states_stride = states_kept;
    check_launch(f.op, with_any_cell(f.cell.kind, [&](auto kind) {
                   return launch_pointwise_forward<kind()>(args, current_stream(inputs));
                 }));
    return h;
  };
  for (int64_t k = 0; k < sequence.steps; ++k) {
    const int64_t now = sequence.step(k, reverse);
    const int64_t first = sequence.offsets[now], running = sequence.sizes[now];
    sequence.each_piece(k, reverse, 0, sequence.batch,
                        [&](int64_t batch_row, int64_t rows, int64_t row, int64_t previous) {
                          Tensor state = previous < 0 ? f.h0.narrow(0, batch_row, rows)
                                                      : f.y.narrow(0, previous, rows);
                          for (int64_t d = 0; d < depth; ++d)
                            state = micro_step(d, batch_row, rows, row, state);
                        });
    if (f.w_hr.defined()) {
      Tensor to = f.y.narrow(0, first, running);
      at::mm_out(to, inner.narrow(0, 0, running), f.w_hr.t());
    }
    // Rows that run no further.
    const int64_t next = k + 1 < sequence.steps ? sequence.sizes[sequence.step(k + 1, reverse)] : 0;
    if (next < running)
      f.h_n.narrow(0, next, running - next).copy_(f.y.narrow(0, first + next, running - next));
  }
}

// The arguments of a backward in the same way. dinputs and dproducts [N, D G H] are one tensor
// where the cell does not tell the gradients of inputs from those of (the first) products.
struct BackwardTensors {
  const CellSpec& cell;
  const char* op;
  int64_t depth;
  Tensor cuts, h0, c0, w_hh, w_hr, masks, y, gates, saved;
  Tensor dinputs, dproducts;  // results
};

// Those of micro-step d of the gradients of products.
Tensor micro_step_of(const Tensor& dproducts, int64_t d, int64_t rows_of_w) {
  return dproducts.narrow(1, d * rows_of_w, rows_of_w);
}

// Tier::kSteps. carried [B, H] (in Wide<T>): the gradient of c_n in, of c0 out; of a GRU zeros in,
// out what dh0 has beside the products' part. douts [N, P]: the gradient of y in, with what comes
// from h_n and from the steps after it out. dh0 [B, P] is written.
template <typename T>
void backward_by_steps(const BackwardTensors& b, const Sequence& sequence, const Tensor& dh_n,
                       const Tensor& douts, const Tensor& dh0, const Tensor& carried, bool reverse,
                       bool need_dh0) {
  const int64_t output = dh0.size(1), depth = b.depth, rows_of_w = b.w_hh.size(0) / depth,
                hidden = rows_of_w / b.cell.gates, states_kept = (depth - 1) * hidden;
  const Tensor c_first = b.c0.defined() ? b.c0.to(wide_type(b.c0.scalar_type())) : Tensor();
  const Tensor dcell =
      b.w_hr.defined() ? at::empty({sequence.batch, hidden}, dh0.options()) : Tensor();
  const Tensor through_next =
      b.cell.deep ? at::empty({sequence.batch, hidden}, dh0.options()) : Tensor();
  for (int64_t k = sequence.steps - 1; k >= 0; --k) {
    const int64_t now = sequence.step(k, reverse);
    const int64_t first = sequence.offsets[now], running = sequence.sizes[now];
    const int64_t after =
        k + 1 < sequence.steps ? sequence.sizes[sequence.step(k + 1, reverse)] : 0;
    if (after < running)  // rows that run no further
      douts.narrow(0, first + after, running - after).add_(dh_n.narrow(0, after, running - after));
    if (b.w_hr.defined()) {
      Tensor to = dcell.narrow(0, 0, running);
      at::mm_out(to, douts.narrow(0, first, running), b.w_hr);
    }
    sequence.each_piece(
        k, reverse, 0, sequence.batch,
        [&](int64_t batch_row, int64_t rows, int64_t row, int64_t previous) {
          const Tensor mask = mask_of(b.masks, 0, batch_row, rows);
          Tensor through = b.cell.deep ? through_next.narrow(0, batch_row, rows) : Tensor();
          for (int64_t d = depth - 1; d >= 0; --d) {
            const bool last = d == depth - 1;
            const int64_t at_gate = (row * depth + d) * rows_of_w;
            PointwiseBackwardArgs<T> args = {
                .rows = rows,
                .hidden = hidden,
                .dh = !last              ? nullptr
                      : b.w_hr.defined() ? data<T>(dcell, batch_row * hidden)
                                         : data<T>(douts, row * output),
                .gates = data<Wide<T>>(b.gates, row * b.gates.size(1) + d * rows_of_w),
                .gates_stride = depth * rows_of_w,
                .saved = b.cell.deep ? nullptr : data<Wide<T>>(b.saved, row * hidden),
                .c_before = b.cell.deep    ? nullptr
                            : previous < 0 ? data<Wide<T>>(c_first, batch_row * hidden)
                                           : data<Wide<T>>(b.saved, previous * hidden),
                .h_before = previous < 0 ? data<T>(b.h0, batch_row * output)
                                         : data<T>(b.y, previous * output),
                .y = data<T>(b.y, row * output),
                .cuts = d == 0 ? data<bool>(b.cuts, row) : nullptr,
                .carried = data<Wide<T>>(carried, batch_row * hidden),
                .dinputs = data<T>(b.dinputs, at_gate),
                .dproducts = data<T>(b.dproducts, at_gate),
                .mask = data<T>(mask_of(b.masks, 1, batch_row, rows)),
                .state_mask = data<T>(mask),
                .through = last ? nullptr : data<T>(through)};
            if (d > 0) args.states = data<Wide<T>>(b.saved, row * states_kept + (d - 1) * hidden);
            args.states_stride = states_kept;
            check_launch(b.op, with_any_cell(b.cell.kind, [&](auto kind) {
                           return launch_pointwise_backward<kind()>(args, current_stream(douts));
                         }));
            if (d > 0)
              at::mm_out(through, micro_step_of(b.dproducts, d, rows_of_w).narrow(0, row, rows),
                         b.w_hh.narrow(0, d * rows_of_w, rows_of_w));
          }
          const Tensor of_rows = cut(micro_step_of(b.dproducts, 0, rows_of_w).narrow(0, row, rows),
                                     b.cuts.defined() ? b.cuts.narrow(0, row, rows) : Tensor());
          const Tensor w_hh = b.w_hh.narrow(0, 0, rows_of_w);
          if (previous >= 0 && mask.defined()) {
            at::mm_out(through, of_rows, w_hh);
            douts.narrow(0, previous, rows).add_(through * mask);
          } else if (previous >= 0) {
            douts.narrow(0, previous, rows).addmm_(of_rows, w_hh);
          } else if (need_dh0) {
            Tensor to = dh0.narrow(0, batch_row, rows);
            at::mm_out(to, of_rows, w_hh);
            if (mask.defined()) to.mul_(mask);
          }
        });
  }
}

// The masks of states [B, H] for each row of N.
Tensor masks_of_rows(const Sequence& sequence, bool padded, const Tensor& mask) {
  if (padded) return mask.repeat({sequence.steps, 1});
  const Tensor index = at::empty({sequence.rows}, at::kLong);
  int64_t* const to = index.mutable_data_ptr<int64_t>();
  for (int64_t t = 0; t < sequence.steps; ++t)
    for (int64_t b = 0; b < sequence.sizes[t]; ++b) to[sequence.offsets[t] + b] = b;
  return mask.index_select(0, to_device(index, mask));
}

// [D G H, P]; before: what the first products multiplied but for masks, [N, P].
Tensor w_hh_gradient(const BackwardTensors& b, const Sequence& sequence, bool padded,
                     const Tensor& before) {
  if (!b.cell.deep) return at::mm(b.dproducts.t(), before);
  const int64_t rows_of_w = b.w_hh.size(0) / b.depth, hidden = before.size(1);
  const Tensor result = at::empty_like(b.w_hh);
  const Tensor mask =
      b.masks.defined() ? masks_of_rows(sequence, padded, b.masks.select(0, 0)) : Tensor();
  for (int64_t d = 0; d < b.depth; ++d) {
    Tensor state = d == 0 ? before : b.saved.narrow(1, (d - 1) * hidden, hidden).to(before.dtype());
    if (mask.defined()) state = state * mask;
    Tensor to = result.narrow(0, d * rows_of_w, rows_of_w);
    at::mm_out(to, micro_step_of(b.dproducts, d, rows_of_w).t(), state);
  }
  return result;
}

ForwardResult recurrent_forward_cuda(std::string_view name, const Tensor& x,
                                     const OptionalTensor& batch_sizes,
                                     const OptionalTensor& resets, const Tensor& h_0,
                                     const OptionalTensor& c_0, const Tensor& w_ih,
                                     const Tensor& w_hh, const OptionalTensor& b_ih,
                                     const OptionalTensor& b_hh, const OptionalTensor& w_hr,
                                     const OptionalTensor& masks, bool reverse, bool save) {
  const NoAutocast no_autocast;
  const auto [cell, op] = check_cell(name, "forward");
  check_recurrent(op.c_str(), cell,
                  {name, x, batch_sizes, resets, h_0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr, masks});
  const DeviceGuard guard(x.device());
  const int64_t hidden = w_ih.size(0) / cell.gates, output = h_0.size(1);
  const int64_t depth = depth_of(cell, w_hh, hidden);
  const Sequence sequence = sequence_of(x, batch_sizes, h_0.size(0));

  const auto dtype = x.scalar_type(), wide = wide_type(dtype);
  const auto options = x.options();
  std::vector<int64_t> y_shape = x.sizes().vec();
  y_shape.back() = output;
  const Tensor y = at::empty(y_shape, options);
  const int64_t saved_rows = save ? sequence.rows : 0;
  const Tensor gates =
      at::empty({saved_rows, cell.gates_kept(depth) * hidden}, options.dtype(wide));
  const Tensor saved =
      at::empty({saved_rows, cell.states_kept(depth) * hidden}, options.dtype(wide));
  if (sequence.rows == 0)
    return {y, copied(h_0, dtype), c_0 ? copied(*c_0, dtype) : at::empty({0}, options), gates,
            saved};

  const Tensor rows = x.reshape({sequence.rows, x.size(-1)});
  ForwardTensors f = {.cell = cell,
                      .op = op.c_str(),
                      .depth = depth,
                      .cuts = cuts_of(sequence, batch_sizes, resets, reverse),
                      .h0 = h_0.contiguous(),
                      .c0 = contiguous_or_none(c_0),
                      .w_hh = w_hh.contiguous(),
                      .w_hr = w_hr.value_or(Tensor()),
                      .masks = contiguous_or_none(masks),
                      .y = y.view({sequence.rows, output}),
                      .h_n = at::empty({sequence.batch, output}, options),
                      .c_n = at::empty({cell.has_c ? sequence.batch : 0, hidden}, options),
                      .gates = gates,
                      .saved = saved};
  ISS_DISPATCH(dtype, "recurrent_forward", [&] {
    using T = KernelType<scalar_t>;
    const LayerPlan plan = plan_for<T>(cell, hidden, sequence, x, w_hr.has_value(), false);
    if (plan.tier == Tier::kOneStep) return forward_one_step<T>(f, rows, w_ih, b_ih, b_hh);
    const Tensor bias = input_bias(cell, b_ih, b_hh, w_ih.size(0));
    const Tensor bias_of_product = product_bias(cell, b_hh, w_ih.size(0));
    const Tensor inputs = bias.defined() ? at::addmm(bias, rows, w_ih.t()) : at::mm(rows, w_ih.t());
    if (plan.tier == Tier::kSteps) {
      const Tensor c = cell.has_c ? copied(f.c0, wide) : Tensor();
      forward_by_steps<T>(f, sequence, inputs, bias_of_product, c, reverse);
      if (cell.has_c) f.c_n = c.to(dtype);
      return;
    }
    const Tensor offsets = step_offsets(sequence, batch_sizes, x);
    const GroupMemory shared(plan, options);
    const ResidentForwardArgs<T> args = {.sequence = steps_of(sequence, offsets, f.cuts, reverse),
                                         .hidden = hidden,
                                         .inputs = data<T>(inputs),
                                         .product_bias = data<T>(bias_of_product),
                                         .w_hh = data<T>(f.w_hh),
                                         .h0 = data<T>(f.h0),
                                         .c0 = data<T>(f.c0),
                                         .y = data<T>(f.y),
                                         .h_n = data<T>(f.h_n),
                                         .c_n = data<T>(f.c_n),
                                         .gates = data<Wide<T>>(gates),
                                         .saved = data<Wide<T>>(saved),
                                         .arrivals = data<uint32_t>(shared.arrivals),
                                         .exchange = data<char>(shared.exchange)};
    check_launch(f.op, with_cell(cell.kind, [&](auto kind) {
                   return launch_resident_forward<kind()>(plan, args, current_stream(x));
                 }));
  });
  return {y, f.h_n, cell.has_c ? f.c_n : at::empty({0}, options), gates, saved};
}

BackwardResult recurrent_backward_cuda(
    const Tensor& dy, const Tensor& dh_n, const OptionalTensor& dc_n, std::string_view name,
    const Tensor& x, const OptionalTensor& batch_sizes, const OptionalTensor& resets,
    const Tensor& h0, const OptionalTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
    const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensor& w_hr,
    const OptionalTensor& masks, const Tensor& y, const Tensor& gates, const Tensor& saved,
    bool reverse, bool need_dx, bool need_dh0, bool need_dw) {
  const NoAutocast no_autocast;
  const auto [cell, op] = check_cell(name, "backward");
  const Inputs inputs{name, x, batch_sizes, resets, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, masks};
  check_recurrent(op.c_str(), cell, inputs);
  check_recurrent_backward(op.c_str(), cell, inputs, y, gates, saved, dy, dh_n, dc_n);
  const DeviceGuard guard(x.device());
  const int64_t hidden = w_ih.size(0) / cell.gates, output = h0.size(1);
  const int64_t depth = depth_of(cell, w_hh, hidden);
  const Sequence sequence = sequence_of(x, batch_sizes, h0.size(0));

  const auto dtype = x.scalar_type(), wide = wide_type(dtype);
  const auto options = x.options();
  const auto none = [&] { return at::empty({0}, options); };
  const Tensor rows = x.reshape({sequence.rows, x.size(-1)});
  const bool split = cell.bias_parts && !cell.deep;
  const Tensor dgates = at::empty({sequence.rows, w_hh.size(0)}, options);
  const Tensor dinputs = micro_step_of(dgates, 0, w_ih.size(0));
  const BackwardTensors b = {.cell = cell,
                             .op = op.c_str(),
                             .depth = depth,
                             .cuts = cuts_of(sequence, batch_sizes, resets, reverse),
                             .h0 = h0.contiguous(),
                             .c0 = contiguous_or_none(c0),
                             .w_hh = w_hh.contiguous(),
                             .w_hr = w_hr.value_or(Tensor()),
                             .masks = contiguous_or_none(masks),
                             .y = y.reshape({sequence.rows, output}).contiguous(),
                             .gates = gates.contiguous(),
                             .saved = saved.contiguous(),
                             .dinputs = dgates,
                             .dproducts = split ? at::empty_like(dgates) : dgates};
  Tensor douts = dy.reshape({sequence.rows, output}), dh, dc;
  ISS_DISPATCH(dtype, "recurrent_backward", [&] {
    using T = KernelType<scalar_t>;
    const LayerPlan plan = plan_for<T>(cell, hidden, sequence, x, w_hr.has_value(), true);
    if (plan.tier == Tier::kSteps) {
      douts = copied(douts, dtype);
      dh = sequence.rows == 0 ? copied(dh_n, dtype) : at::empty({sequence.batch, output}, options);
      const Tensor carried =
          dc_n ? copied(*dc_n, wide) : at::zeros({sequence.batch, hidden}, options.dtype(wide));
      backward_by_steps<T>(b, sequence, dh_n, douts, dh, carried, reverse, need_dh0);
      if (cell.has_c)
        dc = carried.to(dtype);
      else if (need_dh0 && sequence.rows > 0)
        dh.add_(carried);
      return;
    }
    const Tensor offsets = step_offsets(sequence, batch_sizes, x);
    const Tensor dy_rows = douts.contiguous(), dh_last = dh_n.contiguous(),
                 dc_last = contiguous_or_none(dc_n);
    dh = at::empty({sequence.batch, hidden}, options);
    if (cell.has_c) dc = at::empty({sequence.batch, hidden}, options);
    const GroupMemory shared(plan, options);
    const ResidentBackwardArgs<T> args = {.sequence = steps_of(sequence, offsets, b.cuts, reverse),
                                          .hidden = hidden,
                                          .w_hh = data<T>(b.w_hh),
                                          .gates = data<Wide<T>>(b.gates),
                                          .saved = data<Wide<T>>(b.saved),
                                          .y = data<T>(b.y),
                                          .h0 = data<T>(b.h0),
                                          .c0 = data<T>(b.c0),
                                          .dy = data<T>(dy_rows),
                                          .dh_n = data<T>(dh_last),
                                          .dc_n = data<T>(dc_last),
                                          .dinputs = data<T>(b.dinputs),
                                          .dproducts = data<T>(b.dproducts),
                                          .dh0 = data<T>(dh),
                                          .dc0 = data<T>(dc),
                                          .arrivals = data<uint32_t>(shared.arrivals),
                                          .exchange = data<char>(shared.exchange)};
    check_launch(b.op, with_cell(cell.kind, [&](auto kind) {
                   return launch_resident_backward<kind()>(plan, args, current_stream(x));
                 }));
  });
  const Tensor dx = need_dx ? at::mm(dinputs, w_ih).view(x.sizes()) : none();
  if (!need_dh0) dh = none();
  if (!cell.has_c) dc = none();
  if (!need_dw) return {dx, dh, dc, none(), none(), none(), none(), none()};
  const Tensor before = cut(outputs_before(sequence, !batch_sizes, b.y, b.h0, reverse), b.cuts);
  const Tensor dw_hr =
      w_hr ? at::mm(douts.t(), (b.gates.narrow(1, 3 * hidden, hidden) * b.saved.tanh()).to(dtype))
           : none();
  return {dx,
          dh,
          dc,
          at::mm(dinputs.t(), rows),
          w_hh_gradient(b, sequence, !batch_sizes, before),
          dinputs.sum(0),
          cell.bias_parts ? b.dproducts.sum(0) : none(),
          dw_hr};
}

template <typename T, typename W>
void run_step(const CellSpec& cell, const char* op, const Tensor& x, const Tensor& h,
              const OptionalTensor& c, const Tensor& w_ih, const Tensor& w_hh, const Tensor& b_ih,
              const Tensor& b_hh, const Tensor& out) {
  auto args = step_args<T, W>(x, h, w_ih, w_hh, out);
  if (c) args.c_before = args.saved = data<Wide<T>>(*c);
  args.b_ih = data<T>(b_ih);
  args.b_hh = data<T>(b_hh);
  check_launch(op, with_cell(cell.kind, [&](auto kind) {
                 return launch_single_step<kind()>(args, current_stream(x));
               }));
}

void recurrent_step_cuda_(std::string_view name, const Tensor& x, const Tensor& h,
                          const OptionalTensor& c, const Tensor& w_ih, const Tensor& w_hh,
                          const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                          const Tensor& out) {
  const auto [cell, op] = check_cell(name, "step_");
  TORCH_CHECK(!cell.deep, op, ": expected a cell of one micro-step, got ", name);
  check_recurrent_step(op.c_str(), cell, x, h, c, w_ih, w_hh, b_ih, b_hh, out,
                       wide_type(x.scalar_type()));
  const DeviceGuard guard(x.device());
  const Tensor bias_ih = contiguous_or_none(b_ih), bias_hh = contiguous_or_none(b_hh);
  const auto run = [&, &cell = cell, &op = op]<typename T, typename W>(T, W) {
    run_step<T, W>(cell, op.c_str(), x, h, c, w_ih, w_hh, bias_ih, bias_hh, out);
  };
  if (w_ih.scalar_type() == x.scalar_type()) {
    ISS_DISPATCH(x.scalar_type(), "recurrent_step_",
                 [&] { run(KernelType<scalar_t>{}, KernelType<scalar_t>{}); });
  } else if (w_ih.scalar_type() == at::kHalf) {
    run(float{}, Float16{});
  } else {
    run(float{}, Bfloat16{});
  }
}

TORCH_LIBRARY_IMPL(ISS_NAMESPACE, ISS_DEVICE, library) {
  library.impl("recurrent_forward", &recurrent_forward_cuda);
  library.impl("recurrent_backward", &recurrent_backward_cuda);
  library.impl("recurrent_step_", &recurrent_step_cuda_);
}

}  // namespace
}  // namespace iss
