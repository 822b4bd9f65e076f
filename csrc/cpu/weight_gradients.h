// SPDX-License-Identifier: Apache-2.0
// The products of a layer's backward pass over many rows at once, and those of few rows that use a
// weight once: all on the register tile of the rest. (torch's GEMM took 1.3 times as long, with
// AVX-512 on an AMD CPU.)
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/finite.h"
#include "cpu/kernels/table.h"
#include "cpu/packed.h"
#include "cpu/recurrence.h"
#include "cpu/team.h"

namespace iss {

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

// Sums over all rows of a long sequence are cut into parts of so many terms, for their rounding; a
// part of what they go over also stays in the L2 cache.
inline constexpr int64_t kTerms = 512;
// Columns of a matrix that are transposed together, in lines of the cache.
inline constexpr int64_t kLine = 16, kBlockLines = 4;
// The rows of a transposed block do not all start in the same set of the cache.
inline constexpr int64_t kBlockStride = kTerms + kLine;
// Also holds kTerms rows of any panel.
inline constexpr int64_t kBlockElements = kBlockLines * kLine * kBlockStride;

// B [K, columns] of a product, packed in parts of kTerms rows, in memory that its maker keeps.
template <typename T>
class Factor {
 public:
  // Bytes of `packed` for up to k rows of `columns` columns.
  static int64_t bytes(int64_t k, int64_t columns, Format format = Format::kSame) {
    return (k + kTerms - 1) / kTerms *
           cpu_kernels().of<T>().packed_bytes(std::min(k, kTerms), columns, false, format);
  }

  Factor(const PackArgs& b, void* packed) : Factor(b, 0, b.k, packed) {}

  // B made of states, whose first or last rows may be zeros, for a product a.T @ B.
  static Factor of_states(const Rows<T>& b, const Rows<T>& a, void* packed) {
    const auto zero = [&](int64_t row) {
      return all_zero(b.data + row * b.columns, b.columns) &&
             all_finite(a.data + row * a.columns, a.columns);
    };
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
    int64_t first = 0;
    do {
      b.multiply(first, end - begin, a.data + begin * a.columns + first, a.columns, first > 0,
                 out + begin * b.columns());
      first += kTerms;
    } while (first < a.columns);
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

}  // namespace iss
