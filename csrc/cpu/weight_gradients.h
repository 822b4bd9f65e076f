// SPDX-License-Identifier: Apache-2.0
// The products of a layer's backward pass over all rows of a chunk, and products of few rows that
// use a weight once. They run on the same micro-kernels as the steps, which are faster for these
// shapes than torch's GEMM.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "cpu/recurrence.h"

namespace iss {

// A matrix, `stride` elements from row to row. (To make a tensor over it would take a microsecond.)
template <typename T>
struct Rows {
  const T* data;
  int64_t rows, columns, stride = columns;

  // As B of a product, packed as kSame, kPairs or kTiles.
  PackArgs pack_args(Format format) const {
    return {.k = rows,
            .columns = columns,
            .format = format,
            .rounds = is_pairs(format),
            .b = data,
            .stride_k = stride,
            .stride_column = 1};
  }
};

// out [rows, columns] = a [rows, K] @ B + bias, for at most kBlockRows rows, so that each panel of
// B is used once. A thread packs up to `terms` rows of a panel into its own part of `memory`
// [available_threads(), once_bytes(terms, format of b)] and multiplies with them while they are in
// its cache.
template <typename T>
void multiply_once(const Rows<T>& a, const PackArgs& b, int64_t terms, const T* bias, char* memory,
                   T* out);
template <typename T>
int64_t once_bytes(int64_t terms, Format format);

// The packed right-hand side B [K, columns] of a product, in parts of kGradientTerms rows. The
// caller owns its memory.
template <typename T>
class PackedRhs {
 public:
  // Bytes of `packed` for up to k rows of `columns` columns.
  static int64_t bytes(int64_t k, int64_t columns, Format format = Format::kSame);

  PackedRhs(const PackArgs& b, void* packed) : PackedRhs(b, 0, b.k, packed) {}
  // B of states, for a product a.T @ B. Rows of zeros at its beginning and end are left out.
  static PackedRhs of_states(const Rows<T>& b, Format format, const Rows<T>& a, void* packed);

  // out [rows, columns] = or += a [rows, K of the part] @ (the part of B that begins at row
  // `first`). scratch, rounded: as in MatmulArgs, for kGradientTerms elements of a row.
  void multiply(int64_t first, int64_t rows, const T* a, int64_t a_stride, bool accumulate, T* out,
                void* scratch, bool rounded = false) const;

  int64_t columns() const { return columns_; }
  Format format() const { return format_; }

 private:
  // All but rows [begin, end) are zeros, which add nothing.
  PackedRhs(const PackArgs& b, int64_t begin, int64_t end, void* packed);

  // The rows to multiply of the part that begins in row `first`, and its panels.
  std::pair<int64_t, int64_t> part(int64_t first) const {
    return {std::clamp(begin_, first, first + kGradientTerms),
            std::clamp(end_, first, first + kGradientTerms)};
  }
  void* panels(int64_t first) const { return packed_ + first / kGradientTerms * part_bytes_; }

  int64_t begin_, end_, columns_, part_bytes_;
  Format format_;
  char* packed_;
};

// The gradients of x and of the weights, from what Backward leaves of each chunk. A pointer is
// nullptr where the gradient is not needed. Those of the weights are all given or none, that of
// w_hr with a projection only. The gradients of biases are added to, so they start from zero.
template <typename T>
class WeightGradients {
 public:
  struct Targets {
    T *dx, *dw_ih, *dw_hh, *dw_hr;  // [N, I], [G H, I], [D G H, P], [P, H]
    // [G H], [D G H]. db_hh: only where it differs from db_ih (bias_parts). Of a deep cell db_hh
    // alone is written; its first G H elements are the gradient of both.
    T *db_ih, *db_hh;
  };

  // w_ih, contiguous, as B of dinputs @ w_ih; x [N, I]. gates, saved: as the forward kept them.
  WeightGradients(const PackedCell& cell, const Sequence& sequence, const at::Tensor& w_ih,
                  const T* x, const T* gates, const T* saved, const Targets& targets);

  void lay_out(Arena& arena, int64_t most_rows);
  void start();  // after lay_out
  void add(const StepGradients<T>& of, bool accumulate);

 private:
  const PackedCell& cell_;
  const T *x_, *gates_, *saved_;
  Targets to_;
  bool once_;      // w_ih serves one product
  Format format_;  // what rows are multiplied as: kSame, or as the weights of w_hh where these are
                   // pairs
  PackArgs by_input_;
  std::optional<PackedRhs<T>> input_;
  T* sums_ = nullptr;
  char *blocks_ = nullptr, *packed_input_ = nullptr, *packed_x_ = nullptr,
       *packed_states_ = nullptr, *packed_h_ = nullptr;
};

}  // namespace iss
