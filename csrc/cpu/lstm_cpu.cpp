// SPDX-License-Identifier: Apache-2.0
// lstm_forward and lstm_backward on the CPU. bfloat16 computes in float32: activations are widened
// at the door, weights as they are loaded.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/stack.h"
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
  const Tensor from = widened(t), copy = at::empty(from.sizes(), from.options());
  if (from.numel() > 0) std::memcpy(copy.mutable_data_ptr(), from.const_data_ptr(), from.nbytes());
  return copy;
}

// A matrix, row after row. (Tensors that share memory take a microsecond each to make.)
template <typename T>
struct Rows {
  const T* data;
  int64_t rows, columns;

  // As B of a product.
  PackArgs pack_args() const {
    return {.k = rows, .columns = columns, .b = data, .stride_k = columns, .stride_column = 1};
  }
};

// The part of B that has rows [first, first + k) and columns [column, column + columns) of it.
template <typename T>
PackArgs part_of(PackArgs b, int64_t first, int64_t k, int64_t column, int64_t columns) {
  const int64_t itemsize = b.format == Format::kSame ? sizeof(T) : 2;
  b.b = static_cast<const char*>(b.b) + (first * b.stride_k + column * b.stride_column) * itemsize;
  b.k = k;
  b.columns = columns;
  return b;
}

template <typename T>
Tensor matrix(int64_t rows, int64_t columns) {
  const Tensor result = at::empty({rows, columns}, c10::CppTypeToScalarType<T>::value);
  prefer_huge_pages(result.mutable_data_ptr(), result.nbytes());
  return result;
}

// Sums over all rows of a long sequence are cut into parts of so many terms, for their rounding; a
// part of what they go over also stays in the L2 cache.
constexpr int64_t kTerms = 512;
// Columns of a matrix that are transposed together, in lines of the cache.
constexpr int64_t kLine = 16, kBlockLines = 4;
// The rows of a transposed block do not all start in the same set of the cache.
constexpr int64_t kBlockStride = kTerms + kLine;
// Also holds kTerms rows of any panel.
constexpr int64_t kBlockElements = kBlockLines * kLine * kBlockStride;

// B [K, columns] of a product, packed in parts of kTerms rows. (torch's GEMM took 1.3 times as long
// as the register tile of the rest, with AVX-512 on an AMD CPU.)
template <typename T>
class Factor {
 public:
  explicit Factor(const PackArgs& b) : Factor(b, 0, b.k) {}
  explicit Factor(const Rows<T>& b) : Factor(b.pack_args()) {}

  // Of states, whose first or last rows may be zeros.
  static Factor of_states(const Rows<T>& b) {
    const auto zero = [&](int64_t row) { return all_zero(b.data + row * b.columns, b.columns); };
    int64_t begin = 0, end = b.rows;
    while (begin < end && zero(begin)) ++begin;
    while (begin < end && zero(end - 1)) --end;
    return {b.pack_args(), begin, end};
  }

  int64_t columns() const { return columns_; }

  // out [rows, columns] = a [rows, K of the part] @ the part that begins in row `first`; for the
  // parts after the first, +=.
  void multiply(int64_t first, int64_t rows, const T* a, int64_t a_stride, T* out) const {
    const Kernels<T>& kernels = cpu_kernels().of<T>();
    const auto [from, to] = part(first);
    kernels.matmul({.rows = rows,
                    .k = to - from,
                    .columns = columns_,
                    .panels = {0, kernels.panels(columns_, false)},
                    .a = a + from - first,
                    .a_stride = a_stride,
                    .b = parts_[first / kTerms].view(),
                    .bias = nullptr,
                    .accumulate = first > 0,
                    .out = out,
                    .out_stride = columns_,
                    .scratch = nullptr});
  }

 private:
  // All but rows [begin, end) are zeros, which add nothing.
  Factor(const PackArgs& b, int64_t begin, int64_t end)
      : begin_(begin), end_(end), columns_(b.columns) {
    for (int64_t first = 0; first < b.k; first += kTerms) {
      const auto [from, to] = part(first);
      parts_.push_back(pack_briefly<T>(part_of<T>(b, from, to - from, 0, columns_)));
    }
  }

  // The rows to multiply of the part that begins in row `first`.
  std::pair<int64_t, int64_t> part(int64_t first) const {
    return {std::clamp(begin_, first, first + kTerms), std::clamp(end_, first, first + kTerms)};
  }

  int64_t begin_, end_, columns_;
  std::vector<Matrix> parts_;
};

// out [rows, columns] = a [rows, K] @ B + bias for so few rows that B is used once. A thread packs
// up to `terms` rows of a panel of B at a time, into its own part of `panels` [available_threads(),
// terms * a panel's columns], and multiplies with them while they are in its cache.
template <typename T>
void multiply_once(const Rows<T>& a, const PackArgs& b, int64_t terms, const T* bias, T* panels,
                   T* out) {
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  const int64_t width = kernels.panel_columns();
  const auto panel = [&](int64_t column, T* packed) {
    int64_t first = 0;
    do {
      PackArgs part = part_of<T>(b, first, std::min(terms, b.k - first), column,
                                 std::min(width, b.columns - column));
      part.panels = {0, 1};
      part.packed = packed;
      kernels.pack(part);
      kernels.matmul({.rows = a.rows,
                      .k = part.k,
                      .columns = part.columns,
                      .panels = part.panels,
                      .a = a.data + first,
                      .a_stride = b.k,
                      .b = {part.format, packed},
                      .bias = bias != nullptr && first == 0 ? bias + column : nullptr,
                      .accumulate = first > 0,
                      .out = out + column,
                      .out_stride = b.columns,
                      .scratch = nullptr});
      first += terms;
    } while (first < b.k);
  };
  each_block(kernels.panels(b.columns, false), 1, a.rows * b.k * width,
             [&](int64_t begin, int64_t end, int64_t thread) {
               for (int64_t index = begin; index < end; ++index)
                 panel(index * width, panels + thread * terms * width);
             });
}

// a [rows, K] @ B [K, columns]. blocks [available_threads(), kBlockElements]
template <typename T>
Tensor product(const Rows<T>& a, const PackArgs& b, T* blocks) {
  const Tensor out = matrix<T>(a.rows, b.columns);
  if (a.rows <= kBlockRows) {
    multiply_once<T>(a, b, kTerms, nullptr, blocks, data<T>(out));
    return out;
  }
  if (b.k == 0) return out.zero_();
  const Factor<T> factor(b);
  each_block(a.rows, kBlockRows, b.k * b.columns, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t first = 0; first < b.k; first += kTerms)
      factor.multiply(first, end - begin, a.data + begin * b.k + first, b.k,
                      data<T>(out) + begin * b.columns);
  });
  return out;
}

// a.T @ B for each B, all with as many rows as a, and the sums of a's columns. a is transposed by
// blocks, each into a thread's own part of `blocks` [available_threads(), kBlockElements].
template <typename T>
std::pair<std::vector<Tensor>, Tensor> transposed_products(const Rows<T>& a,
                                                           const std::vector<Factor<T>>& right,
                                                           T* blocks) {
  const Tensor sums = at::zeros({a.columns}, c10::CppTypeToScalarType<T>::value);
  std::vector<Tensor> products;
  int64_t columns = 0;
  for (const Factor<T>& factor : right) {
    products.push_back(matrix<T>(a.columns, factor.columns()));
    if (a.rows == 0) products.back().zero_();
    columns += factor.columns();
  }
  const auto block_of_rows = [&](int64_t begin, int64_t end, T* block) {
    for (int64_t first = 0; first < a.rows; first += kTerms) {
      cpu_kernels().of<T>().transpose({.rows = std::min(kTerms, a.rows - first),
                                       .columns = end - begin,
                                       .from = a.data + first * a.columns + begin,
                                       .from_stride = a.columns,
                                       .to = block,
                                       .to_stride = kBlockStride,
                                       .sums = data<T>(sums) + begin});
      for (size_t i = 0; i < right.size(); ++i)
        right[i].multiply(first, end - begin, block, kBlockStride,
                          data<T>(products[i]) + begin * right[i].columns());
    }
  };
  each_block((a.columns + kLine - 1) / kLine, kBlockLines, kLine * a.rows * columns,
             [&](int64_t begin, int64_t end, int64_t thread) {
               block_of_rows(begin * kLine, std::min(end * kLine, a.columns),
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
    return save ? pack_briefly(weight.contiguous(), layout)
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
  AT_DISPATCH_FLOATING_TYPES(options.dtype().toScalarType(), "lstm_forward", [&] {
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward_cpu(
    const Tensor& dy, const Tensor& dh_n, const Tensor& dc_n, const Tensor& x,
    const OptionalTensor& batch_sizes, const Tensor& h0, const Tensor& c0, const Tensor& w_ih,
    const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
    const OptionalTensor& w_hr, const Tensor& y, const Tensor& gates, const Tensor& cells,
    bool reverse, bool need_dx, bool need_dh0, bool need_dw) {
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
  const Tensor outputs = widened(y), douts = widened(dy);
  const Tensor h_first = widened(h0), c_first = widened(c0);
  const Tensor saved_gates = gates.contiguous(), saved_cells = cells.contiguous();
  const Tensor dh = copied(dh_n), dc = copied(dc_n);
  const auto packed = [](const Tensor& weight) {
    return pack_briefly(weight.contiguous(), {.transposed = false, .gates = false});
  };
  const Cell cell{.input = x.size(-1),
                  .hidden = hidden,
                  .output = output,
                  .reverse = reverse,
                  .w_ih = Matrix(),
                  .w_hh = packed(w_hh),
                  .w_hr = w_hr ? packed(*w_hr) : Matrix(),
                  .bias = Tensor()};
  Tensor dx, dw_ih, dw_hh, db, dw_hr;
  AT_DISPATCH_FLOATING_TYPES(dh.scalar_type(), "lstm_backward", [&] {
    // Not allocated anew: to be given fresh pages took up to half as long as all the rest.
    scalar_t *dy_of_step = nullptr, *dgates = nullptr, *h_prev = nullptr, *blocks = nullptr;
    const auto lay_out = [&](Arena arena) {
      dy_of_step = arena.take<scalar_t>(sequence.rows * output);
      dgates = arena.take<scalar_t>(sequence.rows * 4 * hidden);
      h_prev = arena.take<scalar_t>(sequence.rows * output);
      blocks = arena.take<scalar_t>(available_threads() * kBlockElements);
      return arena.used;
    };
    lay_out({static_cast<char*>(scratch(lay_out({nullptr})))});
    std::copy_n(data<scalar_t>(douts), sequence.rows * output, dy_of_step);
    run_backward<scalar_t>(cell, sequence,
                           {.h0 = data<scalar_t>(h_first),
                            .c0 = data<scalar_t>(c_first),
                            .y = data<scalar_t>(outputs),
                            .gates = data<scalar_t>(saved_gates),
                            .cells = data<scalar_t>(saved_cells),
                            .dy = dy_of_step,
                            .dh = data<scalar_t>(dh),
                            .dc = data<scalar_t>(dc),
                            .dgates = dgates,
                            .h_prev = h_prev,
                            .need_dh0 = need_dh0});
    using Of = Rows<scalar_t>;
    const Of of_gates{dgates, sequence.rows, 4 * hidden};
    if (need_dx) {
      const Tensor weight = w_ih.contiguous();
      dx = product<scalar_t>(of_gates, pack_args(weight, {.transposed = false, .gates = false}),
                             blocks)
               .view(x.sizes());
    }
    if (!need_dw) return;
    const Tensor rows = widened(x);
    auto [products, sums] = transposed_products<scalar_t>(
        of_gates,
        {Factor(Of{data<scalar_t>(rows), sequence.rows, x.size(-1)}),
         Factor<scalar_t>::of_states({h_prev, sequence.rows, output})},
        blocks);
    dw_ih = products[0], dw_hh = products[1], db = sums;
    if (w_hr) {
      const Tensor h = saved_gates.narrow(1, 3 * hidden, hidden) * saved_cells.tanh();
      dw_hr = transposed_products<scalar_t>(Of{dy_of_step, sequence.rows, output},
                                            {Factor(Of{data<scalar_t>(h), sequence.rows, hidden})},
                                            blocks)
                  .first[0];
    }
  });
  const auto or_empty = [&](const Tensor& t) {
    return t.defined() ? t.to(dtype) : at::empty({0}, x.options());
  };
  return {or_empty(dx),    or_empty(need_dh0 ? dh : Tensor()),
          dc.to(dtype),    or_empty(dw_ih),
          or_empty(dw_hh), or_empty(db),
          or_empty(dw_hr)};
}

TORCH_LIBRARY_IMPL(iss_kernels, CPU, library) {
  library.impl("lstm_forward", &lstm_forward_cpu);
  library.impl("lstm_backward", &lstm_backward_cpu);
}

}  // namespace
}  // namespace iss
