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
#include <optional>
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

// B [K, columns] of a product, packed in parts of kTerms rows, in memory that its maker keeps.
// (torch's GEMM took 1.3 times as long as the register tile of the rest, with AVX-512 on an AMD CPU.)
template <typename T>
class Factor {
 public:
  // Bytes of `packed` for up to k rows of `columns` columns.
  static int64_t bytes(int64_t k, int64_t columns, Format format = Format::kSame) {
    return (k + kTerms - 1) / kTerms *
           cpu_kernels().of<T>().packed_bytes(std::min(k, kTerms), columns, false, format);
  }

  Factor(const PackArgs& b, void* packed) : Factor(b, 0, b.k, packed) {}

  // Of states, whose first or last rows may be zeros.
  static Factor of_states(const Rows<T>& b, void* packed) {
    const auto zero = [&](int64_t row) { return all_zero(b.data + row * b.columns, b.columns); };
    int64_t begin = 0, end = b.rows;
    while (begin < end && zero(begin)) ++begin;
    while (begin < end && zero(end - 1)) --end;
    return {b.pack_args(), begin, end, packed};
  }

  // out [rows, columns] = or += a [rows, K of the part] @ the part that begins in row `first`.
  void multiply(int64_t first, int64_t rows, const T* a, int64_t a_stride, bool accumulate,
                T* out) const {
    const Kernels<T>& kernels = cpu_kernels().of<T>();
    const auto [from, to] = part(first);
    kernels.matmul({.rows = rows,
                    .k = to - from,
                    .columns = columns_,
                    .panels = {0, kernels.panels(columns_, false)},
                    .a = a + from - first,
                    .a_stride = a_stride,
                    .b = {format_, panels(first)},
                    .bias = nullptr,
                    .accumulate = accumulate,
                    .out = out,
                    .out_stride = columns_,
                    .scratch = nullptr});
  }

  int64_t columns() const { return columns_; }

 private:
  // All but rows [begin, end) are zeros, which add nothing.
  Factor(const PackArgs& b, int64_t begin, int64_t end, void* packed)
      : begin_(begin),
        end_(end),
        columns_(b.columns),
        part_bytes_(bytes(std::min(b.k, kTerms), b.columns, b.format)),
        format_(b.format),
        packed_(static_cast<char*>(packed)) {
    for (int64_t first = 0; first < b.k; first += kTerms) {
      const auto [from, to] = part(first);
      PackArgs rows = part_of<T>(b, from, to - from, 0, columns_);
      rows.packed = panels(first);
      pack_all<T>(rows);
    }
  }

  // The rows to multiply of the part that begins in row `first`, and its panels.
  std::pair<int64_t, int64_t> part(int64_t first) const {
    return {std::clamp(begin_, first, first + kTerms), std::clamp(end_, first, first + kTerms)};
  }
  void* panels(int64_t first) const { return packed_ + first / kTerms * part_bytes_; }

  int64_t begin_, end_, columns_, part_bytes_;
  Format format_;
  char* packed_;
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

// out = a [rows, K] @ B [K, columns].
template <typename T>
void multiply(const Rows<T>& a, const Factor<T>& b, T* out) {
  each_block(a.rows, kBlockRows, a.columns * b.columns(), [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t first = 0; first < a.columns; first += kTerms)
      b.multiply(first, end - begin, a.data + begin * a.columns + first, a.columns, first > 0,
                 out + begin * b.columns());
  });
}

// A product of a transposed matrix with B, and where it goes.
template <typename T>
struct Product {
  Factor<T> b;
  T* out;
};

// out = or += a.T @ B for each product, all with as many rows as a; sums += the sums of a's
// columns. a is transposed by blocks, each into a thread's own part of `blocks`
// [available_threads(), kBlockElements].
template <typename T>
void multiply_transposed(const Rows<T>& a, const std::vector<Product<T>>& products, bool accumulate,
                         T* blocks, T* sums) {
  int64_t columns = 0;
  for (const Product<T>& product : products) columns += product.b.columns();
  const auto block_of_rows = [&](int64_t begin, int64_t end, T* block) {
    for (int64_t first = 0; first < a.rows; first += kTerms) {
      cpu_kernels().of<T>().transpose({.rows = std::min(kTerms, a.rows - first),
                                       .columns = end - begin,
                                       .from = a.data + first * a.columns + begin,
                                       .from_stride = a.columns,
                                       .to = block,
                                       .to_stride = kBlockStride,
                                       .sums = sums + begin});
      for (const auto& [b, out] : products)
        b.multiply(first, end - begin, block, kBlockStride, accumulate || first > 0,
                   out + begin * b.columns());
    }
  };
  each_block((a.columns + kLine - 1) / kLine, kBlockLines, kLine * a.rows * columns,
             [&](int64_t begin, int64_t end, int64_t thread) {
               block_of_rows(begin * kLine, std::min(end * kLine, a.columns),
                             blocks + thread * kBlockElements);
             });
}

// The steps of a backward pass in pieces [first, last), last first: some kTerms rows each, so that
// what a piece leaves is used while it is in the cache, and takes no more memory for a long
// sequence.
std::vector<std::pair<int64_t, int64_t>> pieces_back(const Sequence& sequence, bool reverse) {
  const int64_t pieces = std::max<int64_t>(1, (sequence.rows + kTerms - 1) / kTerms);
  std::vector<std::pair<int64_t, int64_t>> result;
  for (int64_t last = sequence.steps, first; last > 0; last = first) {
    int64_t rows = 0;
    const auto fits = [&](int64_t k) {
      return rows * pieces < sequence.rows &&
             rows + sequence.sizes[sequence.step(k, reverse)] <= kTerms;
    };
    for (first = last; first > 0 && (first == last || fits(first - 1)); --first)
      rows += sequence.sizes[sequence.step(first - 1, reverse)];
    result.emplace_back(first, last);
  }
  return result;
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
  const Tensor outputs = widened(y), douts = widened(dy), rows = widened(x);
  const Tensor h_first = widened(h0), c_first = widened(c0), dh_last = widened(dh_n);
  const Tensor saved_gates = gates.contiguous(), saved_cells = cells.contiguous();
  const Tensor dh0 = need_dh0 ? copied(dh_n) : Tensor(), dc = copied(dc_n);
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
  const auto pieces = pieces_back(sequence, reverse);
  int64_t most_rows = 0;
  for (const auto& [first, last] : pieces)
    most_rows = std::max(most_rows, sequence.steps_taken(first, last, reverse).rows);
  const bool once = sequence.rows <= kBlockRows;
  Tensor dx, dw_ih, dw_hh, db, dw_hr;
  AT_DISPATCH_FLOATING_TYPES(dc.scalar_type(), "lstm_backward", [&] {
    using T = scalar_t;
    const Tensor weight = need_dx ? w_ih.contiguous() : Tensor();
    const PackArgs by_input =
        need_dx ? pack_args(weight, {.transposed = false, .gates = false}) : PackArgs();
    // Not allocated anew: to be given fresh pages took up to half as long as all the rest.
    T *dgates[2], *of_outputs, *h_prev, *blocks;
    char *packed_input, *packed_rows, *packed_states, *packed_outputs;
    const auto lay_out = [&](Arena arena) {
      dgates[0] = arena.take<T>(most_rows * 4 * hidden);
      dgates[1] = arena.take<T>(pieces.size() > 1 ? most_rows * 4 * hidden : 0);
      of_outputs = arena.take<T>(w_hr ? most_rows * output : 0);
      h_prev = arena.take<T>(need_dw ? most_rows * output : 0);
      blocks = arena.take<T>(available_threads() * kBlockElements);
      const auto take = [&](bool needed, const auto&... of) {
        return arena.take<char>(needed ? Factor<T>::bytes(of...) : 0);
      };
      packed_input = take(need_dx && !once, by_input.k, by_input.columns, by_input.format);
      packed_rows = take(need_dw, most_rows, x.size(-1));
      packed_states = take(need_dw, most_rows, output);
      packed_outputs = take(need_dw && w_hr, most_rows, hidden);
      return arena.used;
    };
    lay_out({static_cast<char*>(scratch(lay_out({nullptr})))});
    const CellGradient<T> gradient{.h0 = data<T>(h_first),
                                   .c0 = data<T>(c_first),
                                   .y = data<T>(outputs),
                                   .gates = data<T>(saved_gates),
                                   .cells = data<T>(saved_cells),
                                   .dy = data<T>(douts),
                                   .dh_n = data<T>(dh_last),
                                   .dh0 = need_dh0 ? data<T>(dh0) : nullptr,
                                   .dc = data<T>(dc)};
    std::optional<Factor<T>> input;
    if (need_dx) {
      dx = matrix<T>(sequence.rows, x.size(-1));
      if (!once) input.emplace(by_input, packed_input);
    }
    Tensor unused;
    if (need_dw) {
      dw_ih = matrix<T>(4 * hidden, x.size(-1));
      dw_hh = matrix<T>(4 * hidden, output);
      db = at::zeros({4 * hidden}, dc.options());
      if (w_hr) dw_hr = matrix<T>(output, hidden), unused = at::zeros({output}, dc.options());
      if (sequence.rows == 0)
        for (const Tensor& dw : {dw_ih, dw_hh, dw_hr})
          if (dw.defined()) dw.zero_();
    }
    const T* dgates_after = nullptr;
    for (size_t i = 0; i < pieces.size(); ++i) {
      const auto [first, last] = pieces[i];
      const StepRange steps = sequence.steps_taken(first, last, reverse);
      using Of = Rows<T>;
      const Of of_gates{dgates[i % 2], steps.rows, 4 * hidden};
      run_backward<T>(cell, sequence, first, last, gradient, dgates_after,
                      {.dgates = dgates[i % 2],
                       .outputs = of_outputs,
                       .h_prev = need_dw ? h_prev : nullptr});
      dgates_after =
          dgates[i % 2] +
          (sequence.offsets[sequence.step(first, reverse)] - steps.first_row) * 4 * hidden;
      if (need_dx) {
        T* const out = data<T>(dx) + steps.first_row * x.size(-1);
        if (once)
          multiply_once<T>(of_gates, by_input, kTerms, nullptr, blocks, out);
        else
          multiply<T>(of_gates, *input, out);
      }
      if (!need_dw) continue;
      const Of of_rows{data<T>(rows) + steps.first_row * x.size(-1), steps.rows, x.size(-1)};
      multiply_transposed<T>(
          of_gates,
          {{Factor<T>(of_rows.pack_args(), packed_rows), data<T>(dw_ih)},
           {Factor<T>::of_states({h_prev, steps.rows, output}, packed_states), data<T>(dw_hh)}},
          i > 0, blocks, data<T>(db));
      if (!w_hr) continue;
      const Tensor h = saved_gates.narrow(0, steps.first_row, steps.rows)
                           .narrow(1, 3 * hidden, hidden) *
                       saved_cells.narrow(0, steps.first_row, steps.rows).tanh();
      multiply_transposed<T>(
          Of{of_outputs, steps.rows, output},
          {{Factor<T>(Of{data<T>(h), steps.rows, hidden}.pack_args(), packed_outputs),
            data<T>(dw_hr)}},
          i > 0, blocks, data<T>(unused));
    }
    if (need_dx) dx = dx.view(x.sizes());
  });
  const auto or_empty = [&](const Tensor& t) {
    return t.defined() ? t.to(dtype) : at::empty({0}, x.options());
  };
  return {or_empty(dx),    or_empty(dh0),
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
