// SPDX-License-Identifier: Apache-2.0
// When a call may go past the dispatcher: nobody takes part in it, and tensors are what their
// memory holds.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace iss {

// Whether no one would take part in an op at this moment but its kernel: no tracer, no transform of
// torch.func, no mode of Python's.
inline bool nobody_watches() {
  const uint64_t usual = (c10::default_included_set | c10::autocast_dispatch_keyset).raw_repr();
  return (c10::impl::tls_local_dispatch_key_set().included_.raw_repr() & ~usual) == 0;
}

// The dispatch keys of a tensor whose memory holds its values: dense, on the CPU, of no class with
// a dispatch of its own (FakeTensor), under no transform (vmap).
inline constexpr c10::DispatchKeySet kDense({c10::DispatchKey::CPU,
                                             c10::DispatchKey::ADInplaceOrView,
                                             c10::DispatchKey::AutogradCPU,
                                             c10::DispatchKey::AutocastCPU});

inline bool has_only(const at::Tensor& tensor, c10::DispatchKeySet keys) {
  return (tensor.key_set() | keys) == keys;
}

// Whether a tensor is what its memory holds, and has no tangent.
inline bool is_plain(const at::Tensor& t) {
  return has_only(t, kDense) && !t._fw_grad(/*level=*/0).defined();
}

}  // namespace iss
