// SPDX-License-Identifier: Apache-2.0
// The kernels of deep cells, which run by Tier::kSteps alone.
#include "cuda/pointwise-inl.h"

namespace iss {

#define ISS_INSTANCE(T)                                                                        \
  template int launch_pointwise_forward<CellKind::kRhn>(const PointwiseForwardArgs<T>&,        \
                                                        CudaStream);                           \
  template int launch_pointwise_forward<CellKind::kRhnCarry>(const PointwiseForwardArgs<T>&,   \
                                                             CudaStream);                      \
  template int launch_pointwise_backward<CellKind::kRhn>(const PointwiseBackwardArgs<T>&,      \
                                                         CudaStream);                          \
  template int launch_pointwise_backward<CellKind::kRhnCarry>(const PointwiseBackwardArgs<T>&, \
                                                              CudaStream);
ISS_EACH_DTYPE(ISS_INSTANCE)
#undef ISS_INSTANCE

}  // namespace iss
