// SPDX-License-Identifier: Apache-2.0
// What is not an op, bound with pybind11: what was built, the choice of instruction set, the plan
// of an LSTM for any GPU, and inference from packed weights (cpu/network.h). Importing the module
// also runs the registrations of library.cpp and of the host files.

#include <ATen/core/grad_mode.h>
#include <c10/core/impl/COW.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/chrono.h>
#include <pybind11/numpy.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>
#include <sstream>

#include "cell_step.h"
#include "checks.h"
#include "cpu/kernels/table.h"
#include "cpu/network.h"
#include "cpu/plan.h"
#include "cpu/team.h"
#include "cuda/plan.h"
#include "memory.h"
#include "plain.h"
#ifdef ISS_WITH_CUDA
#include "cuda/device.h"
#endif

namespace py = pybind11;
using namespace py::literals;

namespace iss {
namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["isas_built"] = built_isas();
  info["isas_supported"] = supported_isas();
  info["isa"] = cpu_kernels().isa;
  info["cores"] = cores(Clock::now());
#ifdef ISS_WITH_CUDA
  info["cuda_built"] = true;
#else
  info["cuda_built"] = false;
#endif
  return info;
}

// Of a GPU that is not there.
DeviceLimits make_limits(int major, int minor, int multiprocessors, int64_t shared_bytes) {
  return {.major = major,
          .minor = minor,
          .multiprocessors = multiprocessors,
          .shared_bytes = shared_bytes};
}

// How threads divide a stack's work on the CPU (cpu/plan.h), by the kernels that run now. cells:
// (G, I, H, P, whether it projects, D) by layer and direction. threads: all are free and spinning.
py::dict plan_cpu(
    const std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t, bool, int64_t>>& cells,
    int64_t directions, int64_t steps, int64_t batch, at::ScalarType dtype, bool backward,
    int64_t threads) {
  const CpuKernels& kernels = cpu_kernels();
  const bool tiles = dtype == at::kBFloat16 && in_tiles(kernels.f32.bfloat16);
  std::vector<CellSize> sizes;
  for (const auto& [gates, input, hidden, output, projected, depth] : cells)
    sizes.push_back({gates, input, hidden, output, projected, depth, tiles});
  const bool is_double = dtype == at::kDouble;
  const PlanProblem problem{.cells = sizes,
                            .directions = directions,
                            .steps = steps,
                            .batch = batch,
                            .rows = steps * batch,
                            .backward = backward,
                            .lanes = is_double ? kernels.f64.lanes : kernels.f32.lanes,
                            .tile_rows = is_double ? kernels.f64.tile_rows : kernels.f32.tile_rows};
  const Plan plan = plan_threads(problem, threads_worth(problem.multiplies(), threads), threads);
  const char* const kSplits[] = {"rows", "units", "directions", "layers"};
  py::dict result;
  result["split"] = kSplits[static_cast<int>(plan.split)];
  result["threads"] = plan.threads;
  result["isa"] = kernels.isa;
  result["products"] = dtype != at::kBFloat16           ? (is_double ? "float64" : "float32")
                       : is_pairs(kernels.f32.bfloat16) ? "bfloat16, summed in float32"
                                                        : "float32, of widened bfloat16";
  result["why"] = plan.why;
  return result;
}

// gates: of the cell.
py::dict plan(int gates, int64_t hidden, int64_t batch, at::ScalarType dtype, bool tf32,
              bool projected, bool backward, std::optional<int64_t> steps,
              const DeviceLimits& limits) {
  const Math math = dtype == at::kDouble     ? Math::kFloat64
                    : dtype == at::kBFloat16 ? Math::kBfloat16
                    : dtype == at::kHalf     ? Math::kFloat16
                    : tf32                   ? Math::kTf32
                                             : Math::kFloat32;
  const LayerPlan plan = plan_layer({.gates = gates,
                                     .hidden = hidden,
                                     .batch = batch,
                                     .projected = projected,
                                     .math = math,
                                     .backward = backward,
                                     .steps = steps.value_or(kManySteps)},
                                    limits);
  constexpr const char* kTiers[] = {"block", "cluster", "grid", "steps", "one step"};
  py::dict result;
  result["tier"] = kTiers[static_cast<int>(plan.tier)];
  result["units"] = plan.units;
  result["blocks"] = plan.blocks;
  result["rows"] = plan.rows;
  result["groups"] = plan.groups;
  result["threads"] = plan.threads;
  result["shared_bytes"] = plan.shared_bytes;
  result["why"] = plan.why;
  return result;
}

// w_ih, w_hh, w_hr, the scales of the three (None but for int8), b_ih, b_hh, reverse.
using CellTuple = std::tuple<at::Tensor, at::Tensor, OptionalTensor, OptionalTensor, OptionalTensor,
                             OptionalTensor, OptionalTensor, OptionalTensor, bool>;

// The keys of one whose values torch negates (x.conj().imag) or fills in when they are read.
constexpr c10::DispatchKeySet kLazy({c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor});

// The buffers of a module that something was packed from.
class Sources {
 public:
  explicit Sources(const py::dict& buffers) {
    for (const auto& [name, value] : buffers) {
      const auto tensor = value.cast<at::Tensor>();
      sources_.push_back({py::reinterpret_borrow<py::str>(name), tensor, tensor._version()});
    }
  }

  // Whether a module's buffers are still those, with the same values. (A change through .data or a
  // NumPy view goes unnoticed.)
  bool is_current(const py::dict& buffers) const {
    return std::all_of(sources_.begin(), sources_.end(), [&](const Source& source) {
      PyObject* const value = PyDict_GetItem(buffers.ptr(), source.name.ptr());
      return value != nullptr && THPVariable_Check(value) &&
             THPVariable_Unpack(value).is_same(source.tensor) &&
             source.tensor._version() == source.version &&
             !(source.tensor.requires_grad() && at::GradMode::is_enabled());
    });
  }

 private:
  struct Source {
    py::str name;
    at::Tensor tensor;
    int64_t version;
  };
  std::vector<Source> sources_;
};

// The network of a prepared module.
class BoundNetwork : public Network, public Sources {
 public:
  BoundNetwork(const CellSpec& cell, std::vector<std::vector<CellWeights>> layers, bool uniform,
               const py::dict& buffers)
      : Network(cell, std::move(layers)), Sources(buffers), uniform_(uniform) {}

  // Whether its cells are all of one size.
  bool uniform() const { return uniform_; }

 private:
  bool uniform_;
};

class BoundLinear : public Linear, public Sources {
 public:
  BoundLinear(const at::Tensor& weight, const OptionalTensor& scales, const OptionalTensor& bias,
              const py::dict& buffers)
      : Linear(weight, scales.value_or(at::Tensor()), bias.value_or(at::Tensor())),
        Sources(buffers) {}
};

// Whether a call with this input may go past the dispatcher, by weights packed from `buffers`.
bool is_plain_call(const Sources& sources, const py::object& input, const py::dict& buffers) {
  if (!THPVariable_CheckExact(input.ptr())) return false;
  const at::Tensor& x = THPVariable_Unpack(input.ptr());
  return is_plain(x) && nobody_watches() && !(x.requires_grad() && at::GradMode::is_enabled()) &&
         sources.is_current(buffers);
}

// x [..., I] -> [..., O], float32 or 16 bits. None for anything else, so that the long way may say
// what is wrong with it.
py::object run_linear(const BoundLinear& linear, const py::object& input, const py::dict& buffers) {
  if (!is_plain_call(linear, input, buffers)) return py::none();
  const at::Tensor& x = THPVariable_Unpack(input.ptr());
  const auto dtype = x.scalar_type();
  const bool known = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
  if (x.dim() == 0 || !known || x.numel() == 0 || x.size(-1) != linear.input() ||
      linear.output() == 0)
    return py::none();
  at::Tensor y;
  {
    const py::gil_scoped_release no_gil;
    y = linear.run(x);
  }
  return py::cast(y);
}

std::shared_ptr<BoundNetwork> make_network(const std::string& name,
                                           const std::vector<std::vector<CellTuple>>& layers,
                                           bool uniform, const py::dict& buffers) {
  const CellSpec* const spec = find_cell(name);
  TORCH_CHECK(spec != nullptr, "prepare: expected a cell that there are kernels for, got ", name);
  std::vector<std::vector<CellWeights>> all;
  for (const auto& layer : layers) {
    auto& cells = all.emplace_back();
    const auto given = [](const OptionalTensor& t) { return t.value_or(at::Tensor()); };
    for (const auto& [w_ih, w_hh, w_hr, scale_ih, scale_hh, scale_hr, b_ih, b_hh, reverse] : layer)
      cells.push_back({w_ih, w_hh, given(w_hr), given(scale_ih), given(scale_hh), given(scale_hr),
                       given(b_ih), given(b_hh), reverse});
  }
  return std::make_shared<BoundNetwork>(*spec, std::move(all), uniform, buffers);
}

// The plain call of torch's modules: x [T, B, I], or [B, T, I] with batch_first, from a zero state,
// to (y, h_n) or (y, (h_n, c_n)), for a network whose cells are all of one size and whose weights
// are still `buffers`. None for anything else, so that the long way may say what is wrong with it.
py::object run_plain(const BoundNetwork& network, const py::object& input, bool batch_first,
                     const py::dict& buffers) {
  if (!network.uniform() || !is_plain_call(network, input, buffers)) return py::none();
  const at::Tensor& x = THPVariable_Unpack(input.ptr());
  if (x.dim() != 3 || x.scalar_type() != network.dtype() || x.numel() == 0 ||
      x.size(2) != network.input())
    return py::none();
  at::Tensor y, h_n, c_n;
  {
    const py::gil_scoped_release no_gil;
    std::tie(y, h_n, c_n) =
        network.run_from_zero((batch_first ? x.transpose(0, 1) : x).contiguous());
    if (batch_first) y = y.transpose(0, 1);
  }
  if (!c_n.defined()) return py::make_tuple(y, h_n);
  return py::make_tuple(y, py::make_tuple(h_n, c_n));
}

// One step of a cell: x [B, I], hx: h [B, H], or (h, c), or None for zeros -> the same after it.
// None for anything else, so that the long way may say what is wrong with it.
py::object step_of_cell(const BoundNetwork& network, const py::object& input, const py::object& hx,
                        const py::dict& buffers) {
  if (!is_plain_call(network, input, buffers)) return py::none();
  const at::Tensor& x = THPVariable_Unpack(input.ptr());
  const auto is_float = [](at::ScalarType dtype) { return dtype == at::kFloat; };
  if (x.dim() != 2 || !is_float(x.scalar_type()) || !is_float(network.dtype()) || x.numel() == 0 ||
      x.size(1) != network.input())
    return py::none();
  const int64_t rows = x.size(0), width = network.output();
  const auto each = static_cast<size_t>(network.states_per_cell());
  std::vector<at::Tensor> before;  // none: zeros
  for (size_t i = 0; i < each && hx.ptr() != Py_None; ++i) {
    PyObject* given = hx.ptr();
    if (each > 1) {
      if (!PyTuple_CheckExact(given) || PyTuple_GET_SIZE(given) != static_cast<int64_t>(each))
        return py::none();
      given = PyTuple_GET_ITEM(given, i);
    }
    if (!THPVariable_CheckExact(given)) return py::none();
    const at::Tensor& state = THPVariable_Unpack(given);
    if (!is_plain(state) || state.dim() != 2 || !is_float(state.scalar_type()) ||
        state.size(0) != rows || state.size(1) != width ||
        (state.requires_grad() && at::GradMode::is_enabled()))
      return py::none();
    before.push_back(state);
  }
  std::vector<at::Tensor> states;  // the kernels turn h_0 and c_0 into h_n and c_n
  {
    const py::gil_scoped_release no_gil;
    for (size_t i = 0; i < each; ++i) {
      states.push_back(floats(rows, width));
      if (before.empty()) {
        states[i].zero_();
      } else {
        const at::Tensor state = before[i].contiguous();
        std::memcpy(states[i].mutable_data_ptr(), state.const_data_ptr(), state.nbytes());
      }
    }
    network.run(x.contiguous(), std::vector<int64_t>{rows}, {}, states);
  }
  if (each == 1) return py::cast(states[0]);
  return py::make_tuple(states[0], states[1]);
}

// x [T, B, I], or [N, I] with batch_sizes [T]; resets: bool [T, B] or [N]; states: h [B, P], and c
// [B, H] of a cell with c, by layer and direction, of any floating dtype -> y, and a list of tuples
// of the final states. None where the ops have to run instead.
py::object run(const BoundNetwork& network, const at::Tensor& input,
               const OptionalTensor& batch_sizes, const OptionalTensor& resets,
               std::vector<at::Tensor> states) {
  const at::Tensor x = input.resolve_neg();
  const auto plain = [](const at::Tensor& t) { return is_plain(t.resolve_neg()); };
  if (!is_plain(x) || !std::all_of(states.begin(), states.end(), plain) ||
      (resets && !is_plain(*resets)))
    return py::none();
  at::Tensor y;
  {
    const py::gil_scoped_release no_gil;
    if (batch_sizes)
      check_batch_sizes(std::string(network.cell().name).c_str(), *batch_sizes, x.size(0),
                        states.at(0).size(0));
    std::optional<std::vector<int64_t>> sizes;
    if (batch_sizes) {
      const at::Tensor dense = batch_sizes->contiguous();
      const int64_t* const first = dense.const_data_ptr<int64_t>();
      sizes.emplace(first, first + dense.numel());
    }
    // Copies: the kernels turn h_0 and c_0 into h_n and c_n.
    for (at::Tensor& t : states)
      t = t.to(network.dtype(), /*non_blocking=*/false, /*copy=*/true,
               at::MemoryFormat::Contiguous);
    y = network.run(x.contiguous(), sizes, resets ? resets->contiguous() : at::Tensor(), states);
  }
  py::list final;
  const size_t each = network.states_per_cell();
  for (size_t i = 0; i < states.size(); i += each) {
    py::tuple of_cell(each);
    for (size_t k = 0; k < each; ++k) of_cell[k] = states[i + k];
    final.append(std::move(of_cell));
  }
  return py::make_tuple(y, final);
}

// Whether a tracer follows, which knows nothing of what is called without the dispatcher.
bool is_traced() {
  using c10::impl::TorchDispatchModeKey, c10::impl::TorchDispatchModeTLS;
  return torch::jit::tracer::isTracing() ||
         TorchDispatchModeTLS::get_mode(TorchDispatchModeKey::PROXY).has_value();
}

// A Stream with what Python hands it: torch tensors or NumPy arrays, read and written in place.
class BoundStream : public Stream {
 public:
  using Stream::Stream;

  // out, or where it is None the stream's own result, which the next step overwrites.
  py::object step(py::handle x, py::handle out) {
    if (is_traced())
      throw std::runtime_error(
          "Stream: expected a call outside of torch.jit.trace and make_fx, which would keep its "
          "output as a constant, got one inside");
    at::Tensor copy;
    const float* const from = read(x, copy);
    const bool own = out.is_none(), as_array = own && is_array(x);
    if (own)
      keep_result(as_array);
    else
      expect_fit(out, "out", output());
    const auto to = own ? result_ : py::reinterpret_borrow<py::object>(out);
    const auto returned = as_array ? result_numpy_ : to;
    float* const into = writeable(to);
    {
      const py::gil_scoped_release no_gil;
      Stream::step(from, into);
    }
    return returned;
  }

 private:
  // Asked before THPVariable_Check, which takes 50 ns to say that an array is no tensor.
  static bool is_array(py::handle object) {
    return !THPVariable_CheckExact(object.ptr()) && py::isinstance<py::array>(object);
  }

  // Whether it is a tensor or array of float32 values in the shape [batch, width].
  bool fits(py::handle object, int64_t width) const {
    if (is_array(object)) {
      const auto array = py::reinterpret_borrow<py::array>(object);
      const py::dtype dtype = array.dtype();
      return array.ndim() == 2 && array.shape(0) == batch() && array.shape(1) == width &&
             dtype.num() == py::detail::npy_api::NPY_FLOAT_ && dtype.byteorder() == '=' &&
             !is_masked(object);
    }
    if (!THPVariable_Check(object.ptr())) return false;
    const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
    return has_only(tensor, kDense | kLazy) && tensor.dim() == 2 && tensor.size(0) == batch() &&
           tensor.size(1) == width && tensor.scalar_type() == at::kFloat;
  }

  static bool is_masked(py::handle array) {
    return Py_TYPE(array.ptr()) != py::detail::npy_api::get().PyArray_Type_ &&
           py::isinstance(array, py::module_::import("numpy").attr("ma").attr("MaskedArray"));
  }

  void expect_fit(py::handle object, const char* name, int64_t width) const {
    if (fits(object, width)) return;
    const std::string kind = py::str(py::type::of(object).attr("__name__"));
    std::ostringstream text;
    text << "Stream: expected " << name;
    if (!is_array(object) && !THPVariable_Check(object.ptr())) {
      text << " to be a torch tensor or a NumPy array, got " << kind;
      throw py::type_error(text.str());
    }
    text << " of shape [B, " << (name[0] == 'x' ? "I" : "O") << "] = [" << batch() << ", " << width
         << "] and dtype float32, got ";
    if (is_array(object)) {
      const auto array = py::reinterpret_borrow<py::array>(object);
      if (is_masked(array))
        text << "a " << kind;
      else
        text << std::string(py::str(py::list(array.attr("shape")))) << " and "
             << std::string(py::str(array.dtype()));
    } else {
      const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
      if (tensor.device().is_cpu() && !has_only(tensor, kDense | kLazy))
        text << "a " << kind << " with the dispatch key "
             << (tensor.key_set() - kDense - kLazy).highestPriorityTypeId();
      else
        text << tensor.sizes() << " and " << dtype(tensor) << " on " << tensor.device();
    }
    throw py::value_error(text.str());
  }

  // The values of what fits, where they lie row after row; nullptr where they do not.
  static const float* in_place(py::handle object) {
    const float* data = nullptr;
    if (is_array(object)) {
      const auto array = py::reinterpret_borrow<py::array>(object);
      if (array.flags() & py::array::c_style) data = static_cast<const float*>(array.data());
    } else {
      const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
      if (has_only(tensor, kDense) && tensor.is_contiguous()) data = tensor.const_data_ptr<float>();
    }
    return reinterpret_cast<uintptr_t>(data) % alignof(float) == 0 ? data : nullptr;
  }

  // The values of x; `copy` holds them where they do not lie row after row.
  const float* read(py::handle x, at::Tensor& copy) const {
    expect_fit(x, "x", input());
    if (const float* const data = in_place(x)) return data;
    copy = floats(batch(), input());
    if (is_array(x)) {
      const py::array dense = py::module_::import("numpy").attr("array")(x, "order"_a = "C");
      std::memcpy(copy.mutable_data_ptr(), dense.data(), dense.nbytes());
    } else {
      const at::NoGradGuard no_grad;
      copy.copy_(THPVariable_Unpack(x.ptr()));
    }
    return copy.const_data_ptr<float>();
  }

  // What fits, to be written: autograd is told that its values change.
  static float* writeable(const py::object& out) {
    if (in_place(out) == nullptr ||
        (is_array(out) && !py::reinterpret_borrow<py::array>(out).writeable()))
      throw py::value_error("Stream: expected out to be contiguous and writeable");
    if (is_array(out))
      return static_cast<float*>(py::reinterpret_borrow<py::array>(out).mutable_data());
    const at::Tensor& tensor = THPVariable_Unpack(out.ptr());
    if (tensor.requires_grad() && at::GradMode::is_enabled())
      throw py::value_error(
          "Stream: expected out to ask for no gradient (a stream is not differentiable), got one "
          "with requires_grad=True");
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
    return tensor.mutable_data_ptr<float>();  // its own, where it was a lazy clone
  }

  // Makes the result anew where its owner has made something else of it.
  void keep_result(bool as_array) {
    const auto is_own = [&](const py::object& object) {
      return fits(object, output()) && in_place(object) == result_data_;
    };
    if (result_ && is_own(result_) && (!as_array || is_own(result_numpy_))) {
      const at::Tensor& tensor = THPVariable_Unpack(result_.ptr());
      const bool is_shared = c10::impl::cow::is_cow_data_ptr(tensor.storage().data_ptr());
      if (!tensor.requires_grad() && !is_shared) return;
    }
    result_ = py::reinterpret_steal<py::object>(THPVariable_Wrap(floats(batch(), output())));
    result_numpy_ = result_.attr("numpy")();
    result_data_ = in_place(result_);
  }

  py::object result_, result_numpy_;  // [batch, output], the same memory
  const float* result_data_ = nullptr;
};

// step(x, out=None) of the stream in the capsule `self`. Not through pybind11: to find the object
// and convert the arguments took it 0.1 us, where a small step takes 1.5.
PyObject* step(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  try {
    PyObject* given[] = {nullptr, Py_None};
    const Py_ssize_t named = names == nullptr ? 0 : PyTuple_GET_SIZE(names);
    bool right = count <= 2;
    if (right) std::copy_n(args, count, given);
    for (Py_ssize_t i = 0; right && i < named; ++i) {
      PyObject* const name = PyTuple_GET_ITEM(names, i);
      const int which = PyUnicode_CompareWithASCIIString(name, "x") == 0     ? 0
                        : PyUnicode_CompareWithASCIIString(name, "out") == 0 ? 1
                                                                             : -1;
      right = which >= count;
      if (right) given[which] = args[count + i];
    }
    if (!right || given[0] == nullptr)
      throw py::type_error("Stream: expected step(x) or step(x, out), got other arguments");
    void* const stream = PyCapsule_GetPointer(self, nullptr);
    return (*static_cast<std::shared_ptr<BoundStream>*>(stream))
        ->step(given[0], given[1])
        .release()
        .ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// The function above, which keeps its stream alive.
py::object step_of(std::shared_ptr<BoundStream> stream) {
  static PyMethodDef definition = {
      "step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&step)),
      METH_FASTCALL | METH_KEYWORDS, "step(x, out=None)"};
  const py::capsule self(new std::shared_ptr<BoundStream>(std::move(stream)), [](void* pointer) {
    delete static_cast<std::shared_ptr<BoundStream>*>(pointer);
  });
  return py::reinterpret_steal<py::object>(PyCFunction_New(&definition, self.ptr()));
}

}  // namespace
}  // namespace iss

PYBIND11_MODULE(_C, module) {
  using namespace iss;
  module.doc() = "Compiled half of iss_kernels; use the functions of the package instead.";
  module.def("build_info", &build_info);
  module.def("supported_isas", &supported_isas);
  module.def("isa", [] { return cpu_kernels().isa; });
  module.def("set_isa", &set_isa);
  module.def("free_threads", [] { return free_threads(Clock::now()); });
  module.def("note_late", &note_late);
  module.def("note_on_time", [](Clock::duration region) {
    const Clock::time_point now = Clock::now();
    note_on_time(now - region, now);
  });
  module.def("limit_cores", &limit_cores);
  module.def("pretend_cores", &pretend_cores);
  py::class_<DeviceLimits>(module, "DeviceLimits").def(py::init(&make_limits));
  module.def("plan", &plan);
  module.def("plan_cpu", &plan_cpu);
  module.def("cells", [] {  // the registry, as iss_kernels/cells.py has it
    py::list rows;
    for (const CellSpec& cell : kCells)
      rows.append(py::make_tuple(std::string(cell.name), cell.gates, cell.has_c, cell.saved_gates,
                                 cell.saved_states, cell.projects, cell.deep, cell.bias_parts));
    return rows;
  });
#ifdef ISS_WITH_CUDA
  module.def("device_limits", [](int index) {
    return device_limits(at::Device(at::kCUDA, static_cast<at::DeviceIndex>(index)));
  });
  using LimitsTuple = std::tuple<int, int, int, int64_t>;  // as make_limits takes them
  module.def("pretend_device", [](const std::optional<LimitsTuple>& limits) {
    pretended_device() = limits ? std::optional(std::apply(&make_limits, *limits)) : std::nullopt;
  });
#endif
  module.def("nobody_watches", &nobody_watches);
  module.def("is_plain", &is_plain);
  static PyMethodDef cell_step_definition = {
      "cell_step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&cell_step)),
      METH_FASTCALL, "cell_step(cell, parameters, x, hx)"};
  module.attr("cell_step") =
      py::reinterpret_steal<py::object>(PyCFunction_New(&cell_step_definition, nullptr));
  py::class_<BoundNetwork, std::shared_ptr<BoundNetwork>>(module, "Network")
      .def(py::init(&make_network))
      .def("is_current", &Sources::is_current)
      .def("run", &run)
      .def("run_plain", &run_plain)
      .def("step", &step_of_cell);
  py::class_<BoundLinear, std::shared_ptr<BoundLinear>>(module, "Linear")
      .def(py::init<const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                    const py::dict&>())
      .def("is_current", &Sources::is_current)
      .def("run", &run_linear);
  py::class_<BoundStream, std::shared_ptr<BoundStream>>(module, "Stream")
      .def(py::init<int64_t, int64_t>())
      .def(
          "add_recurrent",
          [](BoundStream& self, const std::shared_ptr<BoundNetwork>& n) { self.add_recurrent(n); },
          py::arg().none(false))
      .def(
          "add_linear",
          [](BoundStream& self, const std::shared_ptr<BoundLinear>& l) { self.add_linear(l); },
          py::arg().none(false))
      .def("add_layer_norm", &BoundStream::add_layer_norm)
      .def("add_activation", &BoundStream::add_activation)
      .def_property_readonly("step", &step_of)
      .def("reset", &BoundStream::reset, py::call_guard<py::gil_scoped_release>())
      .def("states", &BoundStream::states, py::call_guard<py::gil_scoped_release>())
      .def("set_states", &BoundStream::set_states, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("output", &BoundStream::output);
  cpu_kernels();  // so that a wrong ISS_KERNELS_ISA is an error here, at import
}
