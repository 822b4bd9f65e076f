// SPDX-License-Identifier: Apache-2.0
// Weights cut into panels (PackArgs), kept for as long as the weight holds the same values.
#pragma once

#include <ATen/core/Tensor.h>

namespace iss {

// How a weight is read: as B = weight [K, columns], or as B = weight.T for a weight [columns, K].
struct Layout {
  bool transposed, gates;
  bool operator==(const Layout&) const = default;
};

// The panels of a contiguous float32 or float64 weight for the ISA in use. With `keep` they are
// remembered and found again while the weight has the same values. What decides is a fingerprint of
// all values, taken on every call, and not the tensor's version: writing through .data, a NumPy
// view or shared memory changes a weight without changing its version.
at::Tensor packed(const at::Tensor& weight, Layout layout, bool keep);

}  // namespace iss
