// SPDX-License-Identifier: Apache-2.0
// All kernels of the cell that ISS_CELL_KIND names. Each cell is a source of its own, so that they
// are compiled side by side.
#include "cuda/pointwise-inl.h"
#include "cuda/resident_backward-inl.h"
#include "cuda/resident_forward-inl.h"
#include "cuda/single_step-inl.h"

namespace iss {

#define ISS_INSTANCE(T)                                                                           \
  template int launch_resident_forward<ISS_CELL_KIND>(const LayerPlan&,                           \
                                                      const ResidentForwardArgs<T>&, CudaStream); \
  template int launch_resident_backward<ISS_CELL_KIND>(                                           \
      const LayerPlan&, const ResidentBackwardArgs<T>&, CudaStream);                              \
  template bool can_launch_resident_forward<ISS_CELL_KIND, T>(const LayerPlan&);                  \
  template bool can_launch_resident_backward<ISS_CELL_KIND, T>(const LayerPlan&);                 \
  template int launch_pointwise_forward<ISS_CELL_KIND>(const PointwiseForwardArgs<T>&,            \
                                                       CudaStream);                               \
  template int launch_pointwise_backward<ISS_CELL_KIND>(const PointwiseBackwardArgs<T>&,          \
                                                        CudaStream);                              \
  template int launch_single_step<ISS_CELL_KIND>(const SingleStepArgs<T, T>&, CudaStream);
ISS_EACH_DTYPE(ISS_INSTANCE)
#undef ISS_INSTANCE
template int launch_single_step<ISS_CELL_KIND>(const SingleStepArgs<float, Bfloat16>&, CudaStream);
template int launch_single_step<ISS_CELL_KIND>(const SingleStepArgs<float, Float16>&, CudaStream);

}  // namespace iss
