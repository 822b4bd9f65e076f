// SPDX-License-Identifier: Apache-2.0
// A single step of a cell, x [B, I]: recurrent_forward and recurrent_backward without a sequence.
#pragma once

#include "recurrent.h"

namespace iss {

// h', c', gates and saved, as recurrent_forward's, but undefined where there is no c, or without
// `save`. Inputs are checked before.
std::tuple<Tensor, Tensor, Tensor, Tensor> step_forward_cpu(const CellSpec& spec,
                                                            const Inputs& inputs, bool save);
BackwardResult step_backward_cpu(const CellSpec& spec, const Inputs& inputs, const Tensor& dy,
                                 const Tensor& dh_n, const OptionalTensor& dc_n, const Tensor& y,
                                 const Tensor& gates, const Tensor& saved, bool need_dx,
                                 bool need_dh0, bool need_dw);

}  // namespace iss
