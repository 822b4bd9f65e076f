// SPDX-License-Identifier: Apache-2.0
// Every schema: the only TORCH_LIBRARY. Fake kernels are in iss_kernels/ops.py, derivatives there
// and in autograd.cpp, the definition of each op in iss_kernels/reference.py.
//
// Letters: types.h.

#include <torch/library.h>

#include <cstring>
#include <string>

#include "library.h"

namespace {

#ifdef ISS_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

// Called for tensors of a device that there are no kernels for.
void no_kernel(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack*) {
  const std::string& name = op.schema().name();
  TORCH_CHECK(false, name.substr(name.find("::") + 2), ": expected tensors on the CPU",
              kWithCuda ? " or a CUDA device, got "
                        : ", since this iss_kernels was built without CUDA kernels (to have them, "
                          "build it with ISS_KERNELS_CUDA=1, nvcc and a CUDA build of torch), got ",
              c10::toString(keys.highestPriorityTypeId()));
}

}  // namespace

TORCH_LIBRARY(ISS_NAMESPACE, library) {
  const auto def = [&](const char* schema) {
    library.def(schema);
    const std::string name(schema, std::strchr(schema, '('));
    for (const auto key : {c10::DispatchKey::CUDA, c10::DispatchKey::MPS, c10::DispatchKey::XPU})
      if (!(kWithCuda && key == c10::DispatchKey::CUDA))
        library.impl(name.c_str(),
                     torch::dispatch(key, torch::CppFunction::makeFromBoxedFunction<&no_kernel>()));
  };
  // cell: a name of cells/spec.h. x [T, B, I], or [N, I] with batch_sizes [T], or on the CPU [B,
  // I], a single step (of a cell without micro-steps, w_hr or resets); resets, bool [T, B] or [N]:
  // where the state is zero before a step; h0 [B, P], c0 [B, H] where the cell has a c; w_ih [G H,
  // I], w_hh [G H, P], b_ih and b_hh [G H], w_hr [P, H]; gates in torch's order. Of a deep cell
  // w_hh [D G H, H], b_hh [D G H], and masks [2, B, H] multiply each state before a product, and
  // each candidate.
  // -> y [T, B, P] or [N, P], h_n [B, P], c_n [B, H] (empty without c); with `save`, what
  // recurrent_backward needs beside them: gates [N, saved_gates * H], cells [N, saved_states * H];
  // without, those two have no rows.
  def("recurrent_forward(str cell, Tensor x, Tensor? batch_sizes, Tensor? resets, Tensor h0, "
      "Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? "
      "masks, bool reverse, bool save) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor "
      "cells)");
  // The gradient d of each output -> the gradient of x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr. What
  // there is no such input for is empty, and so is that of b_hh where it equals that of b_ih.
  // Without need_dx that of x is empty, without need_dh0 that of h0; without need_dw those of all
  // weights and biases are.
  def("recurrent_backward(Tensor dy, Tensor dh_n, Tensor? dc_n, str cell, Tensor x, Tensor? "
      "batch_sizes, Tensor? resets, Tensor h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, "
      "Tensor? b_hh, Tensor? w_hr, Tensor? masks, Tensor y, Tensor gates, Tensor cells, bool "
      "reverse, bool need_dx, bool need_dh0, bool need_dw) -> (Tensor dx, Tensor dh0, Tensor dc0, "
      "Tensor dw_ih, "
      "Tensor dw_hh, Tensor db_ih, Tensor db_hh, Tensor dw_hr)");

  // One step of inference, on CUDA alone, in one launch: x [B, I], h [B, P], b_ih and b_hh [G H] ->
  // out [B, H] (the next h, or what a w_hr projects), which is not h; c [B, H], where the cell has
  // one, moves on in place and is float32 where x has 16 bits.
  def("recurrent_step_(str cell, Tensor x, Tensor h, Tensor(a!)? c, Tensor w_ih, Tensor w_hh, "
      "Tensor? b_ih, Tensor? b_hh, Tensor(b!) out) -> ()");

  // weights[i] [R, C] with row_units[i] [R] and column_units[i] [C] (int32; -1: no unit). Norms and
  // factors have the weights' dtype; for bfloat16 weights they are float32, as are all sums.
  // -> norms [units]
  def("group_norms_forward(Tensor[] weights, Tensor[] row_units, Tensor[] column_units, int units, "
      "float eps, bool paper_overlap) -> Tensor norms");
  // -> dweights[i] [R, C]
  def("group_norms_backward(Tensor dnorms, Tensor norms, Tensor[] weights, Tensor[] row_units, "
      "Tensor[] column_units, float eps, bool paper_overlap) -> Tensor[] dweights");
  // outputs[i][r, c] += weights[i][r, c] * (factors[row unit] + factors[column unit]); factors
  // [units]
  def("add_scaled_by_units_(Tensor(a!)[] outputs, Tensor[] weights, Tensor[] row_units, "
      "Tensor[] column_units, Tensor factors, bool paper_overlap) -> ()");
  // weights[i][r, c] *= factors[row unit] * factors[column unit], one factor where both are the
  // same unit; factors [units]
  def("scale_by_units_(Tensor(a!)[] weights, Tensor[] row_units, Tensor[] column_units, "
      "Tensor factors) -> ()");
  // weights[i][r, c] = 0 where its size is below threshold and it belongs to a unit
  def("threshold_(Tensor(a!)[] weights, Tensor[] row_units, Tensor[] column_units, "
      "float threshold) -> ()");
}
