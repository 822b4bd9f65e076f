// SPDX-License-Identifier: Apache-2.0
// lstm_forward and lstm_backward on the CPU. bfloat16 computes in float32: activations are widened
// at the door, weights as they are loaded.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/stack.h"
#include "cpu/team.h"
#include "host.h"

namespace iss {
namespace {

constexpr auto kContiguous = at::MemoryFormat::Contiguous;

template <typename T>
T* data(const Tensor& t) {
  return t.numel() > 0 ? t.mutable_data_ptr<T>() : nullptr;
}

// A contiguous copy of its own in the type that the kernels compute in.
Tensor copied(const Tensor& t) {
  return t.to(t.options().dtype(wide_type(t.scalar_type())), false, true, kContiguous);
}

Tensor widened(const Tensor& t) { return t.to(wide_type(t.scalar_type())).contiguous(); }

// Sums over all rows of a long sequence are cut into parts of so many terms, for their rounding; a
// part of what they go over also stays in the L2 cache.
constexpr int64_t kTerms = 512;
// Columns of a matrix that are transposed together, in lines of the cache.
constexpr int64_t kLine = 16, kBlockLines = 4;
// The rows of a transposed block do not all start in the same set of the cache.
constexpr int64_t kBlockStride = kTerms + kLine;
// Also holds kTerms rows of any panel.
constexpr int64_t kBlockElements = kBlockLines * kLine * kBlockStride;

// A matrix [K, columns] to multiply from the right, packed in parts of kTerms rows. (torch's GEMM
// took 1.3 times as long as the register tile of the rest, with AVX-512 on an AMD CPU.)
template <typename T>
class Factor {
 public:
  explicit Factor(const Tensor& b) : k_(b.size(0)), columns_(b.size(1)) {
    for (int64_t first = 0; first < k_; first += kTerms)
      parts_.push_back(pack(b.narrow(0, first, std::min(kTerms, k_ - first)),
                            {.transposed = false, .gates = false}));
  }

  int64_t columns() const { return columns_; }

  // out [rows, columns] = a [rows, K of the part] @ the part that begins in row `first`; for the
  // parts after the first, +=.
  void multiply(int64_t first, int64_t rows, const T* a, int64_t a_stride, T* out) const {
    const Kernels<T>& kernels = cpu_kernels().of<T>();
    kernels.matmul({.rows = rows,
                    .k = std::min(kTerms, k_ - first),
                    .columns = columns_,
                    .panels = {0, kernels.panels(columns_, false)},
                    .a = a,
                    .a_stride = a_stride,
                    .b = parts_[first / kTerms].view(),
                    .bias = nullptr,
                    .accumulate = first > 0,
                    .out = out,
                    .out_stride = columns_,
                    .scratch = nullptr});
  }

 private:
  int64_t k_, columns_;
  std::vector<Matrix> parts_;
};

// out [rows, columns] = a [rows, K] @ B + bias for so few rows that B, a weight in that layout, is
// used once. A thread packs up to `terms` rows of a panel of B at a time, into its own part of
// `panels` [available_threads(), terms * a panel's columns], and multiplies with them while they
// are in its cache.
template <typename T>
void multiply_once(const Tensor& a, const Tensor& weight, Layout layout, int64_t terms,
                   const Tensor& bias, T* panels, const Tensor& out) {
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  const PackArgs all = pack_args(weight, layout);
  const int64_t rows = out.size(0), k = all.k, columns = all.columns;
  const int64_t width = kernels.panel_columns();
  const auto panel = [&](int64_t column, T* packed) {
    PackArgs part = all;
    part.columns = std::min(width, columns - column);
    part.panels = {0, 1};
    part.packed = packed;
    int64_t first = 0;
    do {
      const int64_t at = first * all.stride_k + column * all.stride_column;
      part.k = std::min(terms, k - first);
      part.b = static_cast<const char*>(all.b) + at * weight.itemsize();
      kernels.pack(part);
      kernels.matmul({.rows = rows,
                      .k = part.k,
                      .columns = part.columns,
                      .panels = part.panels,
                      .a = data<T>(a) + first,
                      .a_stride = k,
                      .b = {part.format, packed},
                      .bias = bias.defined() && first == 0 ? data<T>(bias) + column : nullptr,
                      .accumulate = first > 0,
                      .out = data<T>(out) + column,
                      .out_stride = columns,
                      .scratch = nullptr});
      first += terms;
    } while (first < k);
  };
  each_block(kernels.panels(columns, false), 1, rows * k * width,
             [&](int64_t begin, int64_t end, int64_t thread) {
               for (int64_t index = begin; index < end; ++index)
                 panel(index * width, panels + thread * terms * width);
             });
}

// a [rows, K] @ b [K, columns]. blocks [available_threads(), kBlockElements]
template <typename T>
Tensor product(const Tensor& a, const Tensor& b, T* blocks) {
  const int64_t rows = a.size(0), k = a.size(1);
  const Tensor out = at::empty({rows, b.size(1)}, a.options());
  if (rows <= kBlockRows) {
    multiply_once(a, b, {.transposed = false, .gates = false}, kTerms, Tensor(), blocks, out);
    return out;
  }
  if (k == 0) return out.zero_();
  const Factor<T> factor(b);
  each_block(rows, kBlockRows, k * factor.columns(), [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t first = 0; first < k; first += kTerms)
      factor.multiply(first, end - begin, data<T>(a) + begin * k + first, k,
                      data<T>(out) + begin * factor.columns());
  });
  return out;
}

// a [N, rows] -> a.T @ b for each b [N, columns], and the sums of a's columns. a is transposed by
// blocks, each into a thread's own part of `blocks` [available_threads(), kBlockElements].
template <typename T>
std::pair<std::vector<Tensor>, Tensor> transposed_products(const Tensor& a,
                                                           const std::vector<Tensor>& right,
                                                           T* blocks) {
  const int64_t n = a.size(0), rows = a.size(1);
  const Tensor sums = at::zeros({rows}, a.options());
  std::vector<Tensor> products;
  std::vector<Factor<T>> factors;
  int64_t columns = 0;
  for (const Tensor& b : right) {
    factors.emplace_back(b);
    products.push_back(at::empty({rows, b.size(1)}, a.options()));
    if (n == 0) products.back().zero_();
    columns += b.size(1);
  }
  const auto block_of_rows = [&](int64_t begin, int64_t end, T* block) {
    for (int64_t first = 0; first < n; first += kTerms) {
      cpu_kernels().of<T>().transpose({.rows = std::min(kTerms, n - first),
                                       .columns = end - begin,
                                       .from = data<T>(a) + first * rows + begin,
                                       .from_stride = rows,
                                       .to = block,
                                       .to_stride = kBlockStride,
                                       .sums = data<T>(sums) + begin});
      for (size_t i = 0; i < factors.size(); ++i)
        factors[i].multiply(first, end - begin, block, kBlockStride,
                            data<T>(products[i]) + begin * factors[i].columns());
    }
  };
  each_block((rows + kLine - 1) / kLine, kBlockLines, kLine * n * columns,
             [&](int64_t begin, int64_t end, int64_t thread) {
               block_of_rows(begin * kLine, std::min(end * kLine, rows),
                             blocks + thread * kBlockElements);
             });
  return {std::move(products), sums};
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
  const auto options = x.options().dtype(wide_type(dtype));
  std::vector<int64_t> y_shape = x.sizes().vec();
  y_shape.back() = output;
  const Tensor y = at::empty(y_shape, options);
  const Tensor h_n = at::empty({h0.size(0), output}, options);
  const Tensor c_n = copied(c0);
  const Tensor gates = at::empty({save ? sequence.rows : 0, 4 * hidden}, options);
  const Tensor cells = at::empty({save ? sequence.rows : 0, hidden}, options);
  const Tensor rows = widened(x), h_first = widened(h0);

  // When training, weights change before they are used again; w_ih may serve one product alone.
  const bool once = save && sequence.rows <= kBlockRows;
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
                      .w_ih = once ? Matrix() : packed(w_ih, false),
                      .w_hh = packed(w_hh, true),
                      .w_hr = w_hr ? packed(*w_hr, false) : Matrix(),
                      .bias = bias}}};
  AT_DISPATCH_FLOATING_TYPES(options.dtype().toScalarType(), "lstm_forward", [&] {
    if (once) {  // all of K in one part, for the sums of run_stack
      const int64_t terms = std::max<int64_t>(1, x.size(-1));
      const int64_t panel = terms * cpu_kernels().of<scalar_t>().panel_columns() * sizeof(scalar_t);
      multiply_once(rows, w_ih.contiguous(), {.transposed = true, .gates = false}, terms, bias,
                    static_cast<scalar_t*>(scratch(available_threads() * panel)), gates);
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
  const auto options = x.options().dtype(wide_type(dtype));
  const Tensor rows = widened(x).reshape({sequence.rows, x.size(-1)});
  const Tensor outputs = widened(y), h_first = widened(h0), c_first = widened(c0);
  const Tensor saved_gates = gates.contiguous(), saved_cells = cells.contiguous();
  const Tensor dh = copied(dh_n), dc = copied(dc_n);
  // Not allocated anew: to be given fresh pages took up to half as long as all the rest.
  Tensor douts, dgates, h_prev, blocks;
  const auto lay_out = [&](Arena arena) {
    const auto take = [&](int64_t first, int64_t second) {
      const auto count = first * second * options.dtype().itemsize();
      return at::from_blob(arena.take<char>(count), {first, second}, options);
    };
    douts = take(sequence.rows, output);
    dgates = take(sequence.rows, 4 * hidden);
    h_prev = take(sequence.rows, output);
    blocks = take(available_threads(), kBlockElements);
    return arena.used;
  };
  lay_out({static_cast<char*>(scratch(lay_out({nullptr})))});
  douts.copy_(dy.reshape({sequence.rows, output}));
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
  Tensor dx, dw_ih, dw_hh, db, dw_hr = at::empty({0}, options);
  AT_DISPATCH_FLOATING_TYPES(options.dtype().toScalarType(), "lstm_backward", [&] {
    run_backward<scalar_t>(cell, sequence,
                           {.h0 = data<scalar_t>(h_first),
                            .c0 = data<scalar_t>(c_first),
                            .y = data<scalar_t>(outputs),
                            .gates = data<scalar_t>(saved_gates),
                            .cells = data<scalar_t>(saved_cells),
                            .dy = data<scalar_t>(douts),
                            .dh = data<scalar_t>(dh),
                            .dc = data<scalar_t>(dc),
                            .dgates = data<scalar_t>(dgates),
                            .h_prev = data<scalar_t>(h_prev)});
    dx = product(dgates, w_ih.contiguous(), data<scalar_t>(blocks));
    auto [products, sums] = transposed_products(dgates, {rows, h_prev}, data<scalar_t>(blocks));
    dw_ih = products[0], dw_hh = products[1], db = sums;
    if (w_hr)
      dw_hr = transposed_products(douts,
                                  {saved_gates.narrow(1, 3 * hidden, hidden) * saved_cells.tanh()},
                                  data<scalar_t>(blocks))
                  .first[0];
  });
  return {dx.view(x.sizes()).to(dtype),
          dh.to(dtype),
          dc.to(dtype),
          dw_ih.to(dtype),
          dw_hh.to(dtype),
          db.to(dtype),
          dw_hr.to(dtype)};
}

TORCH_LIBRARY_IMPL(iss_kernels, CPU, library) {
  library.impl("lstm_forward", &lstm_forward_cpu);
  library.impl("lstm_backward", &lstm_backward_cpu);
}

}  // namespace
}  // namespace iss
