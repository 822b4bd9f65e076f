// SPDX-License-Identifier: Apache-2.0
// Every check of what a caller passes, shared by the CPU and CUDA host files.
// Form: "<op>: expected <argument> ..., got ...".
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

namespace iss {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string dtype(const Tensor& t) {
  return std::string(c10::getDtypeNames(t.scalar_type()).first);
}

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  TORCH_CHECK(t.dtype() == x.dtype(), op, ": expected ", name, " of dtype ", dtype(x), ", got ",
              dtype(t));
  TORCH_CHECK(t.device() == x.device(), op, ": expected ", name, " on ", x.device(), ", got ",
              t.device());
}

// letters: the shape in words, "[4H, I]".
inline void check_shape(const char* op, const char* name, const Tensor& t, const char* letters,
                        at::IntArrayRef shape) {
  TORCH_CHECK(t.sizes() == shape, op, ": expected ", name, " of shape ", letters, " = ", shape,
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

inline void check_lstm(const char* op, const Tensor& x, const OptionalTensor& batch_sizes,
                       const Tensor& h0, const Tensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                       const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                       const OptionalTensor& w_hr) {
  check_floating(op, "x", x);
  TORCH_CHECK(x.dim() == (batch_sizes ? 2 : 3), op, ": expected x of shape ",
              batch_sizes ? "[N, I]" : "[T, B, I]", ", got ", x.sizes());
  TORCH_CHECK(h0.dim() == 2 && c0.dim() == 2, op, ": expected h0 [B, P] and c0 [B, H], got ",
              h0.sizes(), " and ", c0.sizes());
  const int64_t input = x.size(-1), hidden = c0.size(1), output = h0.size(1);
  const int64_t batch = batch_sizes ? h0.size(0) : x.size(1);
  if (batch_sizes) check_batch_sizes(op, *batch_sizes, x.size(0), batch);
  const auto check = [&](const char* name, const Tensor& t, const char* letters,
                         at::IntArrayRef shape) {
    check_like(op, name, t, x);
    check_shape(op, name, t, letters, shape);
  };
  check("h0", h0, "[B, P]", {batch, output});
  check("c0", c0, "[B, H]", {batch, hidden});
  check("w_ih", w_ih, "[4H, I]", {4 * hidden, input});
  check("w_hh", w_hh, "[4H, P]", {4 * hidden, output});
  if (b_ih) check("b_ih", *b_ih, "[4H]", {4 * hidden});
  if (b_hh) check("b_hh", *b_hh, "[4H]", {4 * hidden});
  if (w_hr) check("w_hr", *w_hr, "[P, H]", {output, hidden});
  TORCH_CHECK(w_hr || output == hidden, op, ": expected h0 of shape [B, H] = ", c0.sizes(),
              " where there is no w_hr, got ", h0.sizes());
}

// One step of a stream. wide: the dtype of c.
inline void check_lstm_step(const char* op, const Tensor& x, const Tensor& h, const Tensor& c,
                            const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& bias,
                            const Tensor& out, at::ScalarType wide) {
  check_floating(op, "x", x);
  TORCH_CHECK(x.dim() == 2 && h.dim() == 2 && c.dim() == 2, op,
              ": expected x [B, I], h [B, P] and c [B, H], got ", x.sizes(), ", ", h.sizes(),
              " and ", c.sizes());
  const int64_t batch = x.size(0), input = x.size(1), hidden = c.size(1), output = h.size(1);
  const auto type = w_ih.scalar_type();
  TORCH_CHECK(type == x.scalar_type() ||
                  (x.scalar_type() == at::kFloat && (type == at::kHalf || type == at::kBFloat16)),
              op, ": expected w_ih of dtype ", dtype(x),
              x.scalar_type() == at::kFloat ? ", bfloat16 or float16" : "", ", got ", dtype(w_ih));
  TORCH_CHECK(c.scalar_type() == wide && c.is_contiguous(), op,
              ": expected c to be contiguous and ", "of dtype ", c10::getDtypeNames(wide).first,
              ", got ", dtype(c), " with strides ", c.strides());
  check_like(op, "h", h, x);
  check_like(op, "out", out, x);
  check_like(op, "w_hh", w_hh, w_ih);
  for (const Tensor* t : {&c, &w_ih})
    TORCH_CHECK(t->device() == x.device(), op, ": expected ", t == &c ? "c" : "w_ih", " on ",
                x.device(), ", got ", t->device());
  if (bias) check_like(op, "bias", *bias, x);
  check_shape(op, "h", h, "[B, P]", {batch, output});
  check_shape(op, "c", c, "[B, H]", {batch, hidden});
  check_shape(op, "w_ih", w_ih, "[4H, I]", {4 * hidden, input});
  check_shape(op, "w_hh", w_hh, "[4H, P]", {4 * hidden, output});
  if (bias) check_shape(op, "bias", *bias, "[4H]", {4 * hidden});
  check_shape(op, "out", out, "[B, H]", {batch, hidden});
  const auto check_rows = [&](const char* name, const Tensor& t) {
    TORCH_CHECK(t.stride(1) == 1 || t.size(1) <= 1, op, ": expected ", name,
                " with adjacent columns, got strides ", t.strides());
  };
  check_rows("x", x);
  check_rows("h", h);
  check_rows("w_ih", w_ih);
  check_rows("w_hh", w_hh);
  check_rows("out", out);
  TORCH_CHECK(!out.is_alias_of(h) || out.data_ptr() != h.data_ptr(), op,
              ": expected out to be other memory than h, got the same");
}

inline void check_labelled(const char* op, const std::vector<Tensor>& weights,
                           const std::vector<Tensor>& row_units,
                           const std::vector<Tensor>& column_units) {
  TORCH_CHECK(weights.size() == row_units.size() && weights.size() == column_units.size(), op,
              ": expected row_units and column_units for each of ", weights.size(),
              " weights, got ", row_units.size(), " and ", column_units.size());
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
      check_shape(op, name, units, letters, {size});
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

// What kernels compute in: 16 bits are widened.
inline at::ScalarType wide_type(at::ScalarType type) {
  return type == at::kBFloat16 || type == at::kHalf ? at::kFloat : type;
}

// Of what is computed for each unit.
inline at::ScalarType factor_type(const Tensor& weight) { return wide_type(weight.scalar_type()); }

inline void check_factors(const char* op, const Tensor& factors, const Tensor& weight) {
  TORCH_CHECK(factors.scalar_type() == factor_type(weight), op, ": expected factors of dtype ",
              c10::getDtypeNames(factor_type(weight)).first, " for weights of dtype ",
              dtype(weight), ", got ", dtype(factors));
  TORCH_CHECK(factors.device() == weight.device(), op, ": expected factors on ", weight.device(),
              ", got ", factors.device());
  TORCH_CHECK(factors.dim() == 1, op, ": expected factors of shape [units], got ", factors.sizes());
}

// What is changed in place must be the caller's own memory, not a copy of it.
inline void check_contiguous(const char* op, const char* name, const std::vector<Tensor>& tensors) {
  for (const Tensor& t : tensors)
    TORCH_CHECK(t.is_contiguous(), op, ": expected ", name, " to be contiguous, got strides ",
                t.strides(), " for shape ", t.sizes());
}

}  // namespace iss
