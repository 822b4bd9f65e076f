// SPDX-License-Identifier: Apache-2.0
// What the host files of all devices share beside their checks.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <vector>

#include "checks.h"
#include "sequence.h"

namespace iss {

// The GEMMs of a host file run in the dtype of their arguments, also where autocast is on.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

inline Sequence sequence_of(const Tensor& x, const OptionalTensor& batch_sizes, int64_t batch) {
  if (!batch_sizes) return {Vector<int64_t>(x.size(0), batch), batch};
  const Tensor contiguous = batch_sizes->contiguous();
  const int64_t* first = contiguous.const_data_ptr<int64_t>();
  return {{first, first + contiguous.numel()}, batch};
}

inline std::vector<Tensor> contiguous(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> result;
  for (const Tensor& t : tensors) result.push_back(t.contiguous());
  return result;
}

// What kernels see of a tensor: T is their name of its dtype.
template <typename T>
const T* values(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* mutable_values(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace iss
