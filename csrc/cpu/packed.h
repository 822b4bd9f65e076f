// SPDX-License-Identifier: Apache-2.0
// Weights cut into panels (PackArgs), kept for as long as the weight holds the same values.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/kernels/args.h"

namespace iss {

// Long sums are cut into parts of so many terms: over the inputs of a Linear, and over the rows of
// a sequence or the gates of a gradient. That bounds their rounding error, and the operands of a
// part stay near the core. A gradient has longer parts, since each reads and writes all of it.
inline constexpr int64_t kTerms = 512, kGradientTerms = 1024;

// How a weight is read: as B = weight [K, columns], or as B = weight.T for a weight [columns, K];
// gates: as in PackArgs. parts: the weight is so many matrices, one below the other, and each is
// packed by itself.
struct Layout {
  bool transposed;
  int gates = 1;
  int64_t parts = 1;
  bool operator==(const Layout&) const = default;
};

// A packed weight: panels for the ISA in use when it was packed.
struct Matrix {
  at::Tensor panels;
  Format format = Format::kSame;
  bool finite = false;  // no value is inf or NaN; false also where pack() did not look
  int64_t part_bytes = 0;

  Packed view(int64_t part = 0) const {
    return {format, static_cast<const char*>(panels.const_data_ptr()) + part * part_bytes};
  }
};

// What a weight of that type is packed as.
Format format_of(at::ScalarType type);

// The arguments that pack a contiguous weight, or the first of its parts; the caller adds the
// panels and the destination. The format follows from the dtype: float64, float32, float16,
// bfloat16, or int8 with scales [rows of the weight].
PackArgs pack_args(const at::Tensor& weight, Layout layout, const at::Tensor& scales = {});

// Packs a whole weight. Without `look`, Matrix::finite stays false.
Matrix pack(const at::Tensor& weight, Layout layout, const at::Tensor& scales = {},
            bool look = false);

// The same, cached in the tensor itself, so the panels die with it. A fingerprint of all values,
// taken in every call, decides whether they still hold. The tensor's version would not do: writing
// through .data, a NumPy view or shared memory does not change it.
Matrix pack_once(const at::Tensor& weight, Layout layout, bool look = false);

// Packs all panels to weight.packed. T: the type that kernels compute in.
template <typename T>
void pack_all(const PackArgs& weight);

}  // namespace iss
