// SPDX-License-Identifier: Apache-2.0
// recurrent_forward and recurrent_backward as the dispatcher calls them, and what both are told.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "cells/spec.h"

namespace iss {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// y, h_n, c_n, gates, cells.
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using RecurrentForward = ForwardResult(std::string_view cell, const Tensor& x,
                                       const OptionalTensor& batch_sizes,
                                       const OptionalTensor& resets, const Tensor& h0,
                                       const OptionalTensor& c0, const Tensor& w_ih,
                                       const Tensor& w_hh, const OptionalTensor& b_ih,
                                       const OptionalTensor& b_hh, const OptionalTensor& w_hr,
                                       const OptionalTensor& masks, bool reverse, bool save);

// dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr.
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using RecurrentBackward = BackwardResult(
    const Tensor& dy, const Tensor& dh_n, const OptionalTensor& dc_n, std::string_view cell,
    const Tensor& x, const OptionalTensor& batch_sizes, const OptionalTensor& resets,
    const Tensor& h0, const OptionalTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
    const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensor& w_hr,
    const OptionalTensor& masks, const Tensor& y, const Tensor& gates, const Tensor& cells,
    bool reverse, bool need_dx, bool need_dh0, bool need_dw);

// The arguments that describe the layer; it holds no tensor.
struct Inputs {
  std::string_view cell;
  const Tensor& x;
  const OptionalTensor &batch_sizes, &resets;
  const Tensor& h0;
  const OptionalTensor& c0;
  const Tensor &w_ih, &w_hh;
  const OptionalTensor &b_ih, &b_hh, &w_hr, &masks;
};

// Whether it is a single step, x [B, I]: on the CPU, and of a plain cell.
inline bool is_single_step(const Inputs& in) { return in.x.dim() == 2 && !in.batch_sizes; }

}  // namespace iss
