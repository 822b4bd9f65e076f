// SPDX-License-Identifier: Apache-2.0
// The plain call of a torch cell, from Python's objects to its kernels: of a small step, finding
// the op and converting its arguments would take most of the time. Whatever is not plain is left to
// the op.

#include "cell_step.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>

#include "cpu/step.h"
#include "memory.h"
#include "plain.h"

namespace py = pybind11;

namespace iss {
namespace {

// Multiplies of a step that takes some microseconds.
constexpr int64_t kWorthReleasing = 1 << 18;

// A plain tensor of this dtype and shape; nullptr for anything else.
const Tensor* plain(PyObject* object, at::ScalarType dtype, at::IntArrayRef shape) {
  if (object == nullptr || !THPVariable_CheckExact(object)) return nullptr;
  const Tensor& t = THPVariable_Unpack(object);
  return is_plain(t) && t.scalar_type() == dtype && t.sizes() == shape ? &t : nullptr;
}

Tensor zeros(at::IntArrayRef shape, at::ScalarType dtype) {
  const Tensor t = recycled(shape, dtype);
  if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0, t.nbytes());
  return t;
}

const auto& forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("iss_kernels::recurrent_forward", "")
                             .typed<RecurrentForward>();
  return op;
}

// The state after the step; None where it has to be taken another way.
py::object step(py::handle name, py::handle parameters, py::handle input, py::handle hx) {
  static const std::array<PyObject*, 4> kNames = {
      PyUnicode_InternFromString("weight_ih"), PyUnicode_InternFromString("weight_hh"),
      PyUnicode_InternFromString("bias_ih"), PyUnicode_InternFromString("bias_hh")};
  const CellSpec* const spec = find_cell(py::cast<std::string_view>(name));
  if (spec == nullptr || !PyDict_Check(parameters.ptr()) || !nobody_watches() ||
      !THPVariable_CheckExact(input.ptr()) || at::autocast::is_autocast_enabled(at::kCPU))
    return py::none();
  const Tensor& x = THPVariable_Unpack(input.ptr());
  const at::ScalarType dtype = x.scalar_type();
  if (!is_plain(x) || x.dim() != 2 ||
      (dtype != at::kFloat && dtype != at::kDouble && dtype != at::kBFloat16))
    return py::none();

  const auto parameter = [&](int i) { return PyDict_GetItem(parameters.ptr(), kNames[i]); };
  PyObject* const first = parameter(0);
  if (first == nullptr || !THPVariable_CheckExact(first)) return py::none();
  const int64_t rows = x.size(0), gates = THPVariable_Unpack(first).size(0);
  const int64_t hidden = gates / spec->gates;
  const Tensor* const w_ih = plain(first, dtype, {gates, x.size(1)});
  const Tensor* const w_hh = plain(parameter(1), dtype, {gates, hidden});
  if (w_ih == nullptr || w_hh == nullptr || gates % spec->gates != 0) return py::none();
  OptionalTensor biases[2];
  for (const int i : {0, 1}) {
    PyObject* const given = parameter(2 + i);
    if (given == Py_None) continue;
    const Tensor* const bias = plain(given, dtype, {gates});
    if (bias == nullptr) return py::none();
    biases[i] = *bias;
  }
  Tensor h0;
  OptionalTensor c0;
  if (hx.is_none()) {
    h0 = zeros({rows, hidden}, dtype);
    if (spec->has_c) c0 = h0;
  } else {
    const bool pair = PyTuple_CheckExact(hx.ptr()) || PyList_CheckExact(hx.ptr());
    if (pair != spec->has_c || (pair && PySequence_Fast_GET_SIZE(hx.ptr()) != 2)) return py::none();
    PyObject* const lone[] = {hx.ptr()};
    PyObject* const* const states = pair ? PySequence_Fast_ITEMS(hx.ptr()) : lone;
    const Tensor* const h = plain(states[0], dtype, {rows, hidden});
    const Tensor* const c = pair ? plain(states[1], dtype, {rows, hidden}) : h;
    if (h == nullptr || c == nullptr) return py::none();
    h0 = *h;
    if (pair) c0 = *c;
  }
  const auto wants = [](const OptionalTensor& t) { return t && t->requires_grad(); };
  const bool trains =
      at::GradMode::is_enabled() &&
      (x.requires_grad() || h0.requires_grad() || wants(c0) || w_ih->requires_grad() ||
       w_hh->requires_grad() || wants(biases[0]) || wants(biases[1]));
  // The objects are the caller's, who might let go of them while others run.
  const Tensor x_kept = x, w_ih_kept = *w_ih, w_hh_kept = *w_hh;
  Tensor h, c;
  {
    // Python's other threads run meanwhile, if that is worth the two locks it takes.
    std::optional<py::gil_scoped_release> no_gil;
    if (trains || rows * gates * (x.size(1) + hidden) >= kWorthReleasing) no_gil.emplace();
    constexpr std::nullopt_t kNone = std::nullopt;
    if (trains)
      std::tie(h, std::ignore, c, std::ignore, std::ignore) =
          forward_op().call(spec->name, x_kept, kNone, kNone, h0, c0, w_ih_kept, w_hh_kept,
                            biases[0], biases[1], kNone, kNone, /*reverse=*/false, /*save=*/true);
    else
      std::tie(h, c, std::ignore, std::ignore) =
          step_forward_cpu(*spec,
                           {spec->name, x_kept, kNone, kNone, h0, c0, w_ih_kept, w_hh_kept,
                            biases[0], biases[1], kNone, kNone},
                           /*save=*/false);
  }
  py::object result = py::reinterpret_steal<py::object>(THPVariable_Wrap(h));
  if (!spec->has_c) return result;
  return py::make_tuple(result, py::reinterpret_steal<py::object>(THPVariable_Wrap(c)));
}

}  // namespace

PyObject* cell_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    if (count != 4) throw py::type_error("cell_step: expected cell, parameters, x and hx");
    return step(args[0], args[1], args[2], args[3]).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (...) {  // torch's own: also what a hook on saved tensors raised
    torch::translate_exception_to_python(std::current_exception());
  }
  return nullptr;
}

}  // namespace iss
