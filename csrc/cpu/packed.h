// SPDX-License-Identifier: Apache-2.0
// Weights cut into panels (PackArgs), kept for as long as the weight holds the same values.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/kernels/args.h"

namespace iss {

// How a weight is read: as B = weight [K, columns], or as B = weight.T for a weight [columns, K];
// gates: as in PackArgs. parts: the weight consists of so many matrices, one below the other, each
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
  bool finite = false;  // no value is inf or NaN; looked at where it is asked for
  int64_t part_bytes = 0;

  Packed view(int64_t part = 0) const {
    return {format, static_cast<const char*>(panels.const_data_ptr()) + part * part_bytes};
  }
};

// What a kernel is told to pack a contiguous weight, or the first of its parts, but for which
// panels and where to: float64, float32, float16, bfloat16, or int8 with scales [rows of the
// weight]. The format follows from its dtype.
PackArgs pack_args(const at::Tensor& weight, Layout layout, const at::Tensor& scales = {});

// Packs all of it, for this call or to be kept. Matrix::finite is left false without `look`.
Matrix pack(const at::Tensor& weight, Layout layout, const at::Tensor& scales = {},
            bool look = false);

// The same, kept in the tensor itself and found again while it has the same values; panels go with
// their tensor. What decides is a fingerprint of all values, taken on every call, and not the
// tensor's version: writing through .data, a NumPy view or shared memory changes a weight without
// changing its version.
Matrix pack_once(const at::Tensor& weight, Layout layout, bool look = false);

// Packs all panels, to weight.packed. T: what kernels compute in.
template <typename T>
void pack_all(const PackArgs& weight);

}  // namespace iss
