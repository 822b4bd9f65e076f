// SPDX-License-Identifier: Apache-2.0
// Every check of what a caller passes, shared by the CPU and CUDA host files.
// Form: "<op>: expected <argument> ..., got ...".
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "recurrent.h"

namespace iss {

inline std::string dtype(const Tensor& t) {
  return std::string(c10::getDtypeNames(t.scalar_type()).first);
}

inline void check_like(const char* op, const char* name, const Tensor& t, at::ScalarType type,
                       at::Device device) {
  TORCH_CHECK(t.scalar_type() == type, op, ": expected ", name, " of dtype ",
              c10::getDtypeNames(type).first, ", got ", dtype(t));
  TORCH_CHECK(t.device() == device, op, ": expected ", name, " on ", device, ", got ", t.device());
}

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_like(op, name, t, x.scalar_type(), x.device());
}

// letters: the shape in words, "[4H, I]", in one part or several; put together in an error alone.
template <typename... Letters>
void check_shape(const char* op, const char* name, const Tensor& t, at::IntArrayRef shape,
                 const Letters&... letters) {
  TORCH_CHECK(t.sizes() == shape, op, ": expected ", name, " of shape ", letters..., " = ", shape,
              ", got ", t.sizes());
}

// Whether the CUDA kernels take it: also a CPU tensor where they are emulated.
inline bool on_cuda(const Tensor& t) {
#ifdef SIMT_HOST
  return true;
#else
  return t.is_cuda();
#endif
}

inline void check_floating(const char* op, const char* name, const Tensor& t) {
  const auto type = t.scalar_type();
  const bool float16 = on_cuda(t);
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 ||
                  (float16 && type == at::kHalf),
              op, ": expected ", name, " of dtype float32, float64",
              float16 ? ", bfloat16 or float16" : " or bfloat16", ", got ", dtype(t));
}

// Sizes whose products overflow would otherwise pass, where another size of the tensor is 0.
inline void check_sizes(const char* op,
                        std::initializer_list<std::pair<const char*, int64_t>> sizes) {
  for (const auto& [letter, size] : sizes)
    TORCH_CHECK(size <= std::numeric_limits<int32_t>::max(), op, ": expected ", letter,
                " below 2^31, got ", size);
}

inline void check_batch_sizes(const char* op, const Tensor& sizes, int64_t rows, int64_t batch) {
  TORCH_CHECK(sizes.dim() == 1 && sizes.scalar_type() == at::kLong && sizes.device().is_cpu(), op,
              ": expected batch_sizes to be 1-D int64 on the CPU, got ", sizes.dim(), "-D ",
              dtype(sizes), " on ", sizes.device());
  int64_t sum = 0, last = batch;
  const Tensor contiguous = sizes.contiguous();
  for (int64_t t = 0; t < contiguous.numel(); ++t) {
    const int64_t size = contiguous.const_data_ptr<int64_t>()[t];
    TORCH_CHECK(t == 0 ? size == batch : size >= 1 && size <= last, op,
                ": expected batch_sizes to start at B = ", batch, " and never grow, got ", size,
                " at step ", t);
    sum += last = size;
  }
  TORCH_CHECK(sum == rows, op, ": expected batch_sizes to add up to N = ", rows, ", got ", sum);
}

// "4H" for rows of 4 gates.
inline const char* gate_rows(const CellSpec& cell) {
  constexpr const char* kRows[] = {"0", "H", "2H", "3H", "4H"};
  return kRows[cell.gates];
}

// -> the cell's row of the registry, and the name that errors begin with: "lstm_forward".
inline std::pair<const CellSpec&, std::string> check_cell(std::string_view name, const char* what) {
  const CellSpec* const cell = find_cell(name);
  TORCH_CHECK(cell != nullptr, "recurrent_", what, ": expected cell to be one that there are ",
              "kernels for, got ", name);
  return {*cell, std::string(name) + "_" + what};
}

inline void check_resets(const char* op, const Tensor& resets, const Tensor& x) {
  TORCH_CHECK(resets.scalar_type() == at::kBool, op, ": expected resets of dtype bool, got ",
              dtype(resets));
  TORCH_CHECK(resets.device() == x.device(), op, ": expected resets on ", x.device(), ", got ",
              resets.device());
  check_shape(op, "resets", resets, x.sizes().slice(0, x.dim() - 1),
              x.dim() == 2 ? "[N]" : "[T, B]");
}

// D, the micro-steps of a step: a deep cell has a w_hh of [D G H, H].
inline int64_t depth_of(const CellSpec& cell, const Tensor& w_hh, int64_t hidden) {
  if (!cell.deep || w_hh.dim() != 2 || hidden == 0) return 1;
  return std::max<int64_t>(1, w_hh.size(0) / (cell.gates * hidden));
}

// What multiplies the states before each product of a deep cell, and its candidates.
inline void check_masks(const char* op, const Tensor& masks, const Tensor& x, const Tensor& h0) {
  check_like(op, "masks", masks, x);
  check_shape(op, "masks", masks, {2, h0.size(0), h0.size(1)}, "[2, B, H]");
}

inline void check_recurrent(const char* op, const CellSpec& cell, const Inputs& in) {
  const Tensor& x = in.x;
  check_floating(op, "x", x);
  const bool single = is_single_step(in) && !on_cuda(x);
  TORCH_CHECK(single || x.dim() == (in.batch_sizes ? 2 : 3), op, ": expected x of shape ",
              in.batch_sizes ? "[N, I]"
              : on_cuda(x)   ? "[T, B, I]"
                             : "[T, B, I] or [B, I]",
              ", got ", x.sizes());
  TORCH_CHECK(!single || !(in.resets || in.w_hr || cell.deep), op,
              ": expected no resets, w_hr or micro-steps in a single step, got some");
  TORCH_CHECK(cell.has_c == in.c0.has_value(), op, ": expected ", cell.has_c ? "a c0" : "no c0",
              ", got ", in.c0 ? "one" : "none");
  if (cell.has_c) {
    TORCH_CHECK(in.h0.dim() == 2 && in.c0->dim() == 2, op,
                ": expected h0 [B, P] and c0 [B, H], got ", in.h0.sizes(), " and ", in.c0->sizes());
  } else {
    TORCH_CHECK(in.h0.dim() == 2, op, ": expected h0 [B, H], got ", in.h0.sizes());
  }
  TORCH_CHECK(cell.projects || !in.w_hr, op, ": expected no w_hr, got one");
  TORCH_CHECK(cell.deep || !in.masks, op, ": expected no masks, got some");
  const int64_t input = x.size(-1), output = in.h0.size(1);
  const int64_t hidden = cell.has_c ? in.c0->size(1) : output;
  const int64_t batch = in.batch_sizes ? in.h0.size(0) : x.size(x.dim() - 2);
  check_sizes(op, {{in.batch_sizes ? "N" : "T", x.size(0)},
                   {"B", batch},
                   {"I", input},
                   {"H", hidden},
                   {"P", output}});
  if (in.batch_sizes) check_batch_sizes(op, *in.batch_sizes, x.size(0), batch);
  if (in.resets) check_resets(op, *in.resets, x);
  const auto check = [&](const char* name, const Tensor& t, at::IntArrayRef shape,
                         const auto&... letters) {
    check_like(op, name, t, x);
    check_shape(op, name, t, shape, letters...);
  };
  const char *const rows = gate_rows(cell), *const width = cell.projects ? "P" : "H";
  const char* const steps = cell.deep ? "D * " : "";
  const int64_t gates = cell.gates * hidden, deep_gates = depth_of(cell, in.w_hh, hidden) * gates;
  check("h0", in.h0, {batch, output}, "[B, ", width, "]");
  if (in.c0) check("c0", *in.c0, {batch, hidden}, "[B, H]");
  check("w_ih", in.w_ih, {gates, input}, "[", rows, ", I]");
  check("w_hh", in.w_hh, {deep_gates, output}, "[", steps, rows, ", ", width, "]");
  if (in.b_ih) check("b_ih", *in.b_ih, {gates}, "[", rows, "]");
  if (in.b_hh) check("b_hh", *in.b_hh, {deep_gates}, "[", steps, rows, "]");
  if (in.w_hr) check("w_hr", *in.w_hr, {output, hidden}, "[P, H]");
  if (in.masks) check_masks(op, *in.masks, x, in.h0);
  if (cell.projects)
    TORCH_CHECK(in.w_hr || output == hidden, op, ": expected h0 of shape [B, H] = ", in.c0->sizes(),
                " where there is no w_hr, got ", in.h0.sizes());
}

// What kernels compute in: 16 bits are widened.
inline at::ScalarType wide_type(at::ScalarType type) {
  return type == at::kBFloat16 || type == at::kHalf ? at::kFloat : type;
}

// What a backward pass is given beside the arguments of the forward, which are checked.
inline void check_recurrent_backward(const char* op, const CellSpec& cell, const Inputs& in,
                                     const Tensor& y, const Tensor& gates, const Tensor& cells,
                                     const Tensor& dy, const Tensor& dh_n,
                                     const OptionalTensor& dc_n) {
  const Tensor& x = in.x;
  const int64_t rows = x.dim() == 2 ? x.size(0) : x.size(0) * x.size(1);
  const int64_t hidden = in.w_ih.size(0) / cell.gates, depth = depth_of(cell, in.w_hh, hidden);
  const int64_t kept_gates = cell.gates_kept(depth), kept_states = cell.states_kept(depth);
  std::vector<int64_t> y_shape = x.sizes().vec();
  y_shape.back() = in.h0.size(1);
  const auto check = [&](const char* name, const Tensor& t, at::ScalarType type,
                         at::IntArrayRef shape, const auto&... letters) {
    check_like(op, name, t, type, x.device());
    check_shape(op, name, t, shape, letters...);
  };
  TORCH_CHECK(cell.has_c == dc_n.has_value(), op, ": expected ", cell.has_c ? "a dc_n" : "no dc_n",
              ", got ", dc_n ? "one" : "none");
  const auto type = x.scalar_type();
  const char *const steps = x.dim() == 2 ? "[N, " : "[T, B, ", *const width =
                                                                   cell.projects ? "P]" : "H]";
  check("dy", dy, type, y_shape, steps, width);
  check("dh_n", dh_n, type, in.h0.sizes(), "[B, ", width);
  if (dc_n) check("dc_n", *dc_n, type, in.c0->sizes(), "[B, H]");
  check("y", y, type, y_shape, steps, width);
  const auto check_kept = [&](const char* name, const Tensor& t, int64_t times) {
    check(name, t, wide_type(type), {rows, times * hidden}, "[N, ",
          times == 1 ? "" : std::to_string(times), "H]");
  };
  check_kept("gates", gates, kept_gates);
  check_kept("cells", cells, kept_states);
}

// One step of a stream. wide: the dtype of c.
inline void check_recurrent_step(const char* op, const CellSpec& cell, const Tensor& x,
                                 const Tensor& h, const OptionalTensor& c, const Tensor& w_ih,
                                 const Tensor& w_hh, const OptionalTensor& b_ih,
                                 const OptionalTensor& b_hh, const Tensor& out,
                                 at::ScalarType wide) {
  check_floating(op, "x", x);
  TORCH_CHECK(cell.has_c == c.has_value(), op, ": expected ", cell.has_c ? "a c" : "no c", ", got ",
              c ? "one" : "none");
  if (c) {
    TORCH_CHECK(x.dim() == 2 && h.dim() == 2 && c->dim() == 2, op,
                ": expected x [B, I], h [B, P] and c [B, H], got ", x.sizes(), ", ", h.sizes(),
                " and ", c->sizes());
    TORCH_CHECK(c->scalar_type() == wide && c->is_contiguous(), op,
                ": expected c to be contiguous and of dtype ", c10::getDtypeNames(wide).first,
                ", got ", dtype(*c), " with strides ", c->strides());
  } else {
    TORCH_CHECK(x.dim() == 2 && h.dim() == 2, op, ": expected x [B, I] and h [B, H], got ",
                x.sizes(), " and ", h.sizes());
  }
  const int64_t batch = x.size(0), input = x.size(1), output = h.size(1);
  const int64_t hidden = c ? c->size(1) : output, gates = cell.gates * hidden;
  check_sizes(op, {{"B", batch}, {"I", input}, {"H", hidden}, {"P", output}});
  const auto type = w_ih.scalar_type();
  TORCH_CHECK(type == x.scalar_type() ||
                  (x.scalar_type() == at::kFloat && (type == at::kHalf || type == at::kBFloat16)),
              op, ": expected w_ih of dtype ", dtype(x),
              x.scalar_type() == at::kFloat ? ", bfloat16 or float16" : "", ", got ", dtype(w_ih));
  check_like(op, "h", h, x);
  check_like(op, "out", out, x);
  check_like(op, "w_hh", w_hh, w_ih);
  if (c) check_like(op, "c", *c, wide, x.device());
  check_like(op, "w_ih", w_ih, type, x.device());
  const std::string rows = gate_rows(cell), width = cell.projects ? "P]" : "H]";
  check_shape(op, "h", h, {batch, output}, "[B, ", width);
  if (c) check_shape(op, "c", *c, {batch, hidden}, "[B, H]");
  check_shape(op, "w_ih", w_ih, {gates, input}, "[", rows, ", I]");
  check_shape(op, "w_hh", w_hh, {gates, output}, "[", rows, ", ", width);
  for (const auto& [name, bias] : {std::pair{"b_ih", &b_ih}, std::pair{"b_hh", &b_hh}}) {
    if (!*bias) continue;
    check_like(op, name, **bias, x);
    check_shape(op, name, **bias, {gates}, "[", rows, "]");
  }
  check_shape(op, "out", out, {batch, hidden}, "[B, H]");
  const auto check_rows = [&](const char* name, const Tensor& t) {
    TORCH_CHECK(t.stride(1) == 1 || t.size(1) <= 1, op, ": expected ", name,
                " with adjacent columns, got strides ", t.strides());
  };
  check_rows("x", x);
  check_rows("h", h);
  check_rows("w_ih", w_ih);
  check_rows("w_hh", w_hh);
  check_rows("out", out);
  TORCH_CHECK(out.stride(0) >= out.size(1) || out.size(0) <= 1, op,
              ": expected out with rows apart, got strides ", out.strides());
  TORCH_CHECK(!out.is_alias_of(h) || out.data_ptr() != h.data_ptr(), op,
              ": expected out to be other memory than h, got the same");
}

inline void check_labelled(const char* op, const std::vector<Tensor>& weights,
                           const std::vector<Tensor>& row_units,
                           const std::vector<Tensor>& column_units) {
  TORCH_CHECK(weights.size() == row_units.size() && weights.size() == column_units.size(), op,
              ": expected row_units and column_units for each of ", weights.size(),
              " weights, got ", row_units.size(), " and ", column_units.size());
  TORCH_CHECK(!weights.empty(), op, ": expected at least one weight, got none");
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    check_floating(op, "weights", weight);
    check_like(op, "weights", weight, weights[0]);
    TORCH_CHECK(weight.dim() == 2, op, ": expected weights of shape [R, C], got ", weight.sizes());
    const auto check_units = [&](const char* name, const Tensor& units, const char* letters,
                                 int64_t size) {
      TORCH_CHECK(units.scalar_type() == at::kInt, op, ": expected ", name, " of dtype int32, got ",
                  dtype(units));
      TORCH_CHECK(units.device() == weight.device(), op, ": expected ", name, " on ",
                  weight.device(), ", got ", units.device());
      check_shape(op, name, units, {size}, letters);
    };
    check_units("row_units", row_units[i], "[R]", weight.size(0));
    check_units("column_units", column_units[i], "[C]", weight.size(1));
  }
}

// least, most: of all ids of one tensor and -1.
inline void check_unit_ids(const char* op, const char* name, int64_t least, int64_t most,
                           int64_t units) {
  TORCH_CHECK(least == -1 && most < units, op, ": expected ", name,
              " to be -1 or below units = ", units, ", got ", least < -1 ? least : most);
}

// Of what is computed for each unit.
inline at::ScalarType factor_type(const Tensor& weight) { return wide_type(weight.scalar_type()); }

// One value for each unit: factors, norms or their gradient.
inline void check_by_unit(const char* op, const char* name, const Tensor& t, const Tensor& weight) {
  TORCH_CHECK(t.scalar_type() == factor_type(weight), op, ": expected ", name, " of dtype ",
              c10::getDtypeNames(factor_type(weight)).first, " for weights of dtype ",
              dtype(weight), ", got ", dtype(t));
  TORCH_CHECK(t.device() == weight.device(), op, ": expected ", name, " on ", weight.device(),
              ", got ", t.device());
  TORCH_CHECK(t.dim() == 1, op, ": expected ", name, " of shape [units], got ", t.sizes());
}

inline void check_group_norms(const char* op, int64_t units, double eps) {
  TORCH_CHECK(units >= 0, op, ": expected units >= 0, got ", units);
  check_sizes(op, {{"units", units}});
  TORCH_CHECK(eps >= 0 && std::isfinite(eps), op, ": expected eps >= 0 and finite, got ", eps);
}

inline void check_group_norms_backward(const char* op, const Tensor& dnorms, const Tensor& norms,
                                       const std::vector<Tensor>& weights) {
  TORCH_CHECK(!weights.empty(), op, ": expected at least one weight, got none");
  check_by_unit(op, "dnorms", dnorms, weights[0]);
  check_by_unit(op, "norms", norms, weights[0]);
  check_shape(op, "dnorms", dnorms, norms.sizes(), "[units]");
}

inline void check_threshold(const char* op, double threshold) {
  TORCH_CHECK(threshold >= 0 && std::isfinite(threshold), op,
              ": expected threshold >= 0 and finite, got ", threshold);
}

// What is changed in place must be the caller's own memory, not a copy of it.
inline void check_contiguous(const char* op, const char* name, const std::vector<Tensor>& tensors) {
  for (const Tensor& t : tensors)
    TORCH_CHECK(t.is_contiguous(), op, ": expected ", name, " to be contiguous, got strides ",
                t.strides(), " for shape ", t.sizes());
}

// Threads write in any order, so what is written, all of it contiguous, must be memory that nothing
// else of the call shares. But written[i] may be weights[i] itself.
inline void check_apart(const char* op, const char* name, const std::vector<Tensor>& written,
                        const std::vector<Tensor>& weights, const std::vector<Tensor>& row_units,
                        const std::vector<Tensor>& column_units, const OptionalTensor& factors) {
  struct Span {
    const char *begin, *end;
    size_t index;
  };
  std::vector<Span> spans;
  for (size_t i = 0; i < written.size(); ++i) {
    // Also materialises a lazy clone, here and not in several threads at once.
    const char* const begin = static_cast<const char*>(written[i].mutable_data_ptr());
    if (written[i].numel() > 0) spans.push_back({begin, begin + written[i].nbytes(), i});
  }
  std::ranges::sort(spans, {}, &Span::begin);
  for (size_t i = 1; i < spans.size(); ++i)
    TORCH_CHECK(spans[i].begin >= spans[i - 1].end, op, ": expected ", name,
                " that share no memory, got ", name, "[", spans[i - 1].index, "] and ", name, "[",
                spans[i].index, "] that do");
  const auto check = [&](const char* other, const Tensor& t, size_t index, bool may_be_written) {
    if (t.numel() == 0 || !t.is_contiguous()) return;  // a copy of it is read
    const char* const begin = static_cast<const char*>(t.const_data_ptr());
    const char* const end = begin + t.nbytes();
    const auto after = std::ranges::lower_bound(spans, end, {}, &Span::begin);
    if (after == spans.begin()) return;
    const Span& span = *std::prev(after);
    if (may_be_written && span.index == index && span.begin == begin && span.end == end) return;
    TORCH_CHECK(span.end <= begin, op, ": expected ", name, " that share no memory with ", other,
                ", got ", name, "[", span.index, "] that does");
  };
  for (size_t i = 0; i < weights.size(); ++i) {
    check("weights", weights[i], i, true);
    check("row_units", row_units[i], i, false);
    check("column_units", column_units[i], i, false);
  }
  if (factors) check("factors", *factors, 0, false);
}

// The arguments of an op that walks over labelled weights, and writes to outputs like them or to
// the weights themselves, which are outputs too then.
inline void check_by_units(const char* op, const char* name, const std::vector<Tensor>& outputs,
                           const std::vector<Tensor>& weights, const std::vector<Tensor>& row_units,
                           const std::vector<Tensor>& column_units, const OptionalTensor& factors) {
  check_labelled(op, weights, row_units, column_units);
  check_contiguous(op, name, outputs);
  TORCH_CHECK(outputs.size() == weights.size(), op, ": expected ", weights.size(), " ", name,
              ", one for each weight, got ", outputs.size());
  for (size_t m = 0; m < weights.size(); ++m) {
    check_like(op, name, outputs[m], weights[0]);
    check_shape(op, name, outputs[m], weights[m].sizes(), "[R, C]");
  }
  if (factors) check_by_unit(op, "factors", *factors, weights[0]);
  check_apart(op, name, outputs, weights, row_units, column_units, factors);
}

}  // namespace iss
