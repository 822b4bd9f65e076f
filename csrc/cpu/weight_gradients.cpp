// SPDX-License-Identifier: Apache-2.0

#include "cpu/weight_gradients.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/finite.h"
#include "cpu/kernels/table.h"
#include "cpu/packed.h"
#include "cpu/team.h"

namespace iss {
namespace {

// Columns of a matrix that are transposed together, in lines of the cache.
constexpr int64_t kLine = 16, kBlockLines = 4;
// Elements of a tile's row of pairs.
constexpr int64_t kTileRow = 2 * kTileSize;
// The rows of a transposed block do not all start in the same set of the cache.
constexpr int64_t kBlockStride = kGradientTerms + kLine;
// Also holds kGradientTerms rows of any panel.
constexpr int64_t kBlockElements = kBlockLines * kLine * kBlockStride;

// The part of B that has rows [first, first + k) and columns [column, column + columns) of it.
template <typename T>
PackArgs part_of(PackArgs b, int64_t first, int64_t k, int64_t column, int64_t columns) {
  const int64_t itemsize = b.format == Format::kSame || b.rounds ? sizeof(T) : 2;
  b.b = static_cast<const char*>(b.b) + (first * b.stride_k + column * b.stride_column) * itemsize;
  b.k = k;
  b.columns = columns;
  return b;
}

}  // namespace

template <typename T>
int64_t PackedRhs<T>::bytes(int64_t k, int64_t columns, Format format) {
  return (k + kGradientTerms - 1) / kGradientTerms *
         cpu_kernels().of<T>().packed_bytes(std::min(k, kGradientTerms), columns, 1, format);
}

template <typename T>
PackedRhs<T> PackedRhs<T>::of_states(const Rows<T>& b, Format format, const Rows<T>& a,
                                     void* packed) {
  const auto zero = [&](int64_t row) {
    return all_zero(b.data + row * b.stride, b.columns) &&
           all_finite(a.data + row * a.stride, a.columns);
  };
  int64_t begin = 0, end = b.rows;
  while (begin < end && zero(begin)) ++begin;
  while (begin < end && zero(end - 1)) --end;
  if (is_pairs(format)) begin = begin / kTileRow * kTileRow;  // where a tile of `a` begins
  return {b.pack_args(format), begin, end, packed};
}

template <typename T>
void PackedRhs<T>::multiply(int64_t first, int64_t rows, const T* a, int64_t a_stride,
                            bool accumulate, T* out, void* scratch, bool rounded) const {
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  const auto [from, to] = part(first);
  const int64_t left_out = from - first;
  const int64_t skipped = !rounded            ? left_out
                          : in_tiles(format_) ? left_out / kTileRow * kTileSize * kTileSize
                                              : left_out / 2;
  kernels.matmul({.rows = rows,
                  .k = to - from,
                  .columns = columns_,
                  .panels = {0, kernels.panels(columns_)},
                  .a = a + skipped,
                  .a_stride = a_stride,
                  .b = {format_, panels(first)},
                  .bias = nullptr,
                  .accumulate = accumulate,
                  .out = out,
                  .out_stride = columns_,
                  .scratch = scratch,
                  .elements = rounded ? Elements::kPairs : Elements::kFloats});
}

template <typename T>
PackedRhs<T>::PackedRhs(const PackArgs& b, int64_t begin, int64_t end, void* packed)
    : begin_(begin),
      end_(end),
      columns_(b.columns),
      part_bytes_(bytes(std::min(b.k, kGradientTerms), b.columns, b.format)),
      format_(b.format),
      packed_(static_cast<char*>(packed)) {
  for (int64_t first = 0; first < b.k; first += kGradientTerms) {
    const auto [from, to] = part(first);
    PackArgs rows = part_of<T>(b, from, to - from, 0, columns_);
    rows.packed = panels(first);
    pack_all<T>(rows);
  }
}

template class PackedRhs<float>;
template class PackedRhs<double>;

namespace {

// What each thread has of `memory` for the two functions that follow: a block of elements, and what
// a kernel needs to round rows.
template <typename T>
int64_t thread_bytes(Format format) {
  return kBlockElements * int64_t{sizeof(T)} +
         cpu_kernels().of<T>().scratch_bytes(format, kBlockRows, kGradientTerms);
}

// out = a [rows, K] @ B [K, columns].
template <typename T>
void multiply(const Rows<T>& a, const PackedRhs<T>& b, char* memory, T* out) {
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  const int64_t bytes = kernels.scratch_bytes(b.format(), kBlockRows, kGradientTerms);
  each_block(a.rows, kernels.share_rows(b.format()), a.columns * b.columns(),
             [&](int64_t begin, int64_t end, int64_t thread) {
               int64_t first = 0;
               do {
                 b.multiply(first, end - begin, a.data + begin * a.stride + first, a.stride,
                            first > 0, out + begin * b.columns(), memory + thread * bytes);
                 first += kGradientTerms;
               } while (first < a.columns);
             });
}

// Multiplies that take as long as writing an element of a matrix that no cache holds.
constexpr int64_t kStore = 8;

// A product of a transposed matrix with B, and where it goes.
template <typename T>
struct TransposedProduct {
  PackedRhs<T> b;
  T* out;
};

// out = or += a.T @ B for each product, all with as many rows as a; sums += the sums of a's
// columns. a is transposed by blocks, each into a thread's own part of `memory`.
template <typename T>
void multiply_transposed(const Rows<T>& a, const std::vector<TransposedProduct<T>>& products,
                         bool accumulate, char* memory, T* sums) {
  int64_t columns = 0;
  for (const TransposedProduct<T>& product : products) columns += product.b.columns();
  const Format format = products[0].b.format();
  const bool rounded = is_pairs(format);
  const auto block_of_rows = [&](int64_t begin, int64_t end, T* block) {
    for (int64_t first = 0; first < a.rows; first += kGradientTerms) {
      cpu_kernels().of<T>().transpose({.rows = std::min(kGradientTerms, a.rows - first),
                                       .columns = end - begin,
                                       .from = a.data + first * a.stride + begin,
                                       .from_stride = a.stride,
                                       .to = block,
                                       .to_stride = kBlockStride,
                                       .sums = sums + begin,
                                       .format = format});
      for (const auto& [b, out] : products)
        b.multiply(first, end - begin, block, kBlockStride, accumulate || first > 0,
                   out + begin * b.columns(), block + kBlockElements, rounded);
    }
  };
  const int64_t terms = std::max(a.rows, kStore);
  const int64_t bytes = thread_bytes<T>(format);
  each_block((a.columns + kLine - 1) / kLine, kBlockLines, kLine * terms * columns,
             [&](int64_t begin, int64_t end, int64_t thread) {
               block_of_rows(begin * kLine, std::min(end * kLine, a.columns),
                             reinterpret_cast<T*>(memory + thread * bytes));
             });
}

}  // namespace

template <typename T>
int64_t once_bytes(int64_t terms, Format format) {
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  return kernels.packed_bytes(terms, kernels.panel_units(), 1, format) +
         kernels.scratch_bytes(format, kBlockRows, terms);
}
template int64_t once_bytes<float>(int64_t, Format);
template int64_t once_bytes<double>(int64_t, Format);

template <typename T>
void multiply_once(const Rows<T>& a, const PackArgs& b, int64_t terms, const T* bias, char* memory,
                   T* out) {
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  const int64_t width = kernels.panel_units(), bytes = once_bytes<T>(terms, b.format);
  const int64_t panel_bytes = kernels.packed_bytes(terms, width, 1, b.format);
  const auto panel = [&](int64_t column, char* packed) {
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
                      .a_stride = a.stride,
                      .b = {part.format, packed},
                      .bias = bias != nullptr && first == 0 ? bias + column : nullptr,
                      .accumulate = first > 0,
                      .out = out + column,
                      .out_stride = b.columns,
                      .scratch = packed + panel_bytes});
      first += terms;
    } while (first < b.k);
  };
  each_block(kernels.panels(b.columns), 1, a.rows * b.k * width,
             [&](int64_t begin, int64_t end, int64_t thread) {
               for (int64_t index = begin; index < end; ++index)
                 panel(index * width, memory + thread * bytes);
             });
}
template void multiply_once<float>(const Rows<float>&, const PackArgs&, int64_t, const float*,
                                   char*, float*);
template void multiply_once<double>(const Rows<double>&, const PackArgs&, int64_t, const double*,
                                    char*, double*);

template <typename T>
WeightGradients<T>::WeightGradients(const PackedCell& cell, const Sequence& sequence,
                                    const at::Tensor& w_ih, const T* x, const T* gates,
                                    const T* saved, const Targets& targets)
    : cell_(cell),
      x_(x),
      gates_(gates),
      saved_(saved),
      to_(targets),
      once_(sequence.rows <= kBlockRows),
      format_(is_pairs(cell.w_hh.format) ? cell.w_hh.format : Format::kSame),
      by_input_(to_.dx ? pack_args(w_ih, {.transposed = false}) : PackArgs()) {}

template <typename T>
void WeightGradients<T>::lay_out(Arena& arena, int64_t most_rows) {
  const auto take = [&](bool needed, const auto&... of) {
    return arena.take<char>(needed ? PackedRhs<T>::bytes(of...) : 0);
  };
  const bool weights = to_.dw_hh != nullptr, projected = to_.dw_hr != nullptr;
  const int64_t bytes = std::max(thread_bytes<T>(format_),
                                 once_ ? once_bytes<T>(kGradientTerms, by_input_.format) : 0);
  blocks_ = arena.take<char>(available_threads() * bytes);
  packed_input_ = take(to_.dx && !once_, by_input_.k, by_input_.columns, by_input_.format);
  packed_x_ = take(weights, most_rows, cell_.input, format_);
  packed_states_ = take(weights, most_rows, cell_.output, format_);
  packed_h_ = take(projected, most_rows, cell_.hidden, format_);
  sums_ = arena.take<T>(projected ? cell_.output : 0);  // of columns, which nobody asks for
}

template <typename T>
void WeightGradients<T>::start() {
  if (to_.dx && !once_) input_.emplace(by_input_, packed_input_);
  std::fill_n(sums_, to_.dw_hr ? cell_.output : 0, T(0));
}

template <typename T>
void WeightGradients<T>::add(const StepGradients<T>& of, bool accumulate) {
  const StepRange& steps = of.steps;
  const int64_t gates = cell_.gates();
  const Rows<T> dinputs{of.dinputs, steps.rows, gates, of.stride};
  if (to_.dx) {
    T* const out = to_.dx + steps.first_row * cell_.input;
    if (once_)
      multiply_once<T>(dinputs, by_input_, kGradientTerms, nullptr, blocks_, out);
    else
      multiply<T>(dinputs, *input_, blocks_, out);
  }
  if (!to_.dw_hh) return;
  const Rows<T> x{x_ + steps.first_row * cell_.input, steps.rows, cell_.input};
  for (int64_t d = 0; d < cell_.depth; ++d) {
    const Rows<T> dproducts{of.dproducts + d * gates, steps.rows, gates, of.stride};
    const Rows<T> states{of.h_prev + d * steps.rows * cell_.output, steps.rows, cell_.output};
    std::vector<TransposedProduct<T>> products;
    if (d == 0) products.push_back({PackedRhs<T>(x.pack_args(format_), packed_x_), to_.dw_ih});
    if (d == 0 && dinputs.data != dproducts.data) {
      multiply_transposed<T>(dinputs, products, accumulate, blocks_, to_.db_ih);
      products.clear();
    }
    products.push_back({PackedRhs<T>::of_states(states, format_, dproducts, packed_states_),
                        to_.dw_hh + d * gates * cell_.output});
    multiply_transposed<T>(dproducts, products, accumulate, blocks_,
                           to_.db_hh ? to_.db_hh + d * gates : to_.db_ih);
  }
  if (!to_.dw_hr) return;
  // What the projection multiplied: o * tanh(c), of an LSTM, which alone may have one.
  const int64_t hidden = cell_.hidden, stride = cell_.spec->saved_gates * hidden;
  const auto of_steps = [&](const T* data, int64_t row_stride) {
    return at::from_blob(const_cast<T*>(data) + steps.first_row * row_stride, {steps.rows, hidden},
                         {row_stride, 1}, c10::CppTypeToScalarType<T>::value);
  };
  const at::Tensor h = of_steps(gates_ + 3 * hidden, stride) * of_steps(saved_, hidden).tanh();
  const Rows<T> cell_outputs{h.const_data_ptr<T>(), steps.rows, hidden};
  multiply_transposed<T>({of.outputs, steps.rows, cell_.output},
                         {{PackedRhs<T>(cell_outputs.pack_args(format_), packed_h_), to_.dw_hr}},
                         accumulate, blocks_, sums_);
}

template class WeightGradients<float>;
template class WeightGradients<double>;

}  // namespace iss
