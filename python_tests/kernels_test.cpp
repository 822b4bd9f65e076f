// SPDX-License-Identifier: Apache-2.0
// The kernels of every ISA that this program is built with and that runs here, against plain loops
// in double. Free of torch, so that it also cross-compiles and runs under an emulator; test_isas.py
// builds and runs it. Prints one line per ISA; exit code 1 where an error is too large.

#include <algorithm>
#include <bit>
#include <cmath>
#include <complex>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels/table.h"

namespace {

using iss::CellKind;
using iss::CellSpec;
using iss::Format;
using iss::Kernels;
using Doubles = std::vector<double>;

std::mt19937 random_bits(1);
int failures = 0;

template <typename T>
std::vector<T> normal(int64_t count) {
  std::normal_distribution<float> distribution;
  std::vector<T> values(count);
  for (T& value : values) value = distribution(random_bits);
  return values;
}

// Rounding of T, times a number of operations, on values of size up to `size`.
template <typename T>
void expect(const char* what, const std::vector<T>& got, const Doubles& truth, double size) {
  const double allowed = 64 * size * std::numeric_limits<T>::epsilon();
  for (size_t i = 0; i < truth.size(); ++i)
    if (!(std::abs(got[i] - truth[i]) <= allowed)) {
      std::printf("%s[%zu]: expected %.17g, got %.17g\n", what, i, truth[i], double(got[i]));
      ++failures;
      return;
    }
}

// A weight stored as W, and what W makes of a result.
iss::Bfloat16 stored(iss::Bfloat16, float x) {
  if (std::isnan(x)) return {0x7fc0};
  // 8 bits of the mantissa: half of the ninth decides, by the mode that is set: to nearest even.
  int exponent;
  const float mantissa = std::frexp(x, &exponent);
  const float rounded = std::ldexp(std::nearbyint(std::ldexp(mantissa, 8)), exponent - 8);
  return {static_cast<uint16_t>(std::bit_cast<uint32_t>(rounded) >> 16)};
}
template <typename T>
T stored(T, T x) {
  return x;
}
float value(iss::Bfloat16 w) { return std::bit_cast<float>(uint32_t{w.bits} << 16); }
template <typename T>
T value(T w) {
  return w;
}
// What a kernel makes of the rows that it multiplies by a weight of a format.
template <typename T>
T multiplied(Format format, T x) {
  return is_pairs(format) ? value(stored(iss::Bfloat16{}, x)) : x;
}

// A weight [k, columns] stored in a format, and the values that it then holds.
template <typename T>
struct Weight {
  Format format;
  std::vector<T> values;       // what the kernel multiplies by
  std::vector<uint16_t> half;  // kFloat16, kBfloat16, pairs
  std::vector<T> exact;        // pairs: empty, or what is rounded as it is packed
  std::vector<int8_t> bytes;   // int8
  std::vector<float> scales;   // int8, by column

  Weight(Format format, int64_t k, int64_t columns, bool transposed)
      : format(format), values(normal<T>(k * columns)), scales(columns) {
    if (is_pairs(format) && random_bits() % 2 == 0) exact = values;
    for (float& scale : scales) scale = 0.01f + 0.001f * (random_bits() % 8);
    for (int64_t at = 0; at < k * columns; ++at) {
      const int64_t column = transposed ? at / k : at % columns;
      float value = values[at];
      if (is_pairs(format)) {
        half.push_back(stored(iss::Bfloat16{}, value).bits);
        value = std::bit_cast<float>(uint32_t{half.back()} << 16);
      } else if (format == Format::kBfloat16) {
        half.push_back(std::bit_cast<uint32_t>(value) >> 16);
        value = std::bit_cast<float>(uint32_t{half.back()} << 16);
      } else if (format == Format::kFloat16) {
        // From bits: subnormals (exponent 0) and numbers below 2 (exponent <= 15).
        half.push_back(random_bits() % (16 << 10) | (random_bits() % 2) << 15);
        const int exponent = half.back() >> 10 & 31, mantissa = half.back() & 1023;
        value =
            exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
        if (half.back() >> 15) value = -value;
      } else if (is_int8(format)) {
        bytes.push_back(static_cast<int8_t>(static_cast<int>(random_bits() % 255) - 127));
        value = bytes.back() * scales[column];
      }
      if (format != Format::kSame) values[at] = value;
    }
  }

  std::vector<char> packed(const Kernels<T>& kernels, int64_t k, int64_t columns, bool transposed,
                           int gates = 1) const {
    std::vector<char> result(kernels.packed_bytes(k, columns, gates, format) + 1, 'x');
    const void* b = format == Format::kSame ? static_cast<const void*>(values.data())
                    : is_int8(format)       ? static_cast<const void*>(bytes.data())
                    : !exact.empty()        ? static_cast<const void*>(exact.data())
                                            : half.data();
    kernels.pack({.k = k,
                  .columns = columns,
                  .gates = gates,
                  .format = format,
                  .rounds = !exact.empty(),
                  .panels = {0, kernels.panels(columns / gates, gates)},
                  .b = b,
                  .stride_k = transposed ? 1 : columns,
                  .stride_column = transposed ? k : 1,
                  .scales = scales.data(),
                  .packed = result.data()});
    if (result.back() != 'x') std::printf("pack: wrote past its end\n"), ++failures;
    return result;
  }
};

// int8 rounds each row to 63 or 127 steps of its largest value, kInt8Fine a row of up to 32
// elements to 126 times as many: to the side of what T itself loses.
double size_of_error(Format format, int64_t k, double size) {
  const bool fine = is_fine(format) && k <= 32;
  return fine ? 2e2 * size : is_int8(format) ? 2e4 * size : size;
}

template <typename T>
void test_matmul(const Kernels<T>& kernels, Format format, int64_t rows, int64_t k, int64_t columns,
                 bool accumulate, bool biased) {
  const int64_t a_stride = k + 2, out_stride = columns + 3;
  const auto a = normal<T>(rows * a_stride);
  const Weight<T> b(format, k, columns, false);
  const auto bias = normal<T>(columns);
  const auto panels = b.packed(kernels, k, columns, false);
  std::vector<char> scratch(kernels.scratch_bytes(format, rows, k));
  std::vector<T> out(rows * out_stride, T(7));
  const int64_t count = kernels.panels(columns);
  for (const auto [begin, end] :
       {std::pair{int64_t{0}, count / 2},
        std::pair{count / 2, count}})  // as two threads would divide the columns
    kernels.matmul({.rows = rows,
                    .k = k,
                    .columns = columns,
                    .panels = {begin, end},
                    .a = a.data(),
                    .a_stride = a_stride,
                    .b = {format, panels.data()},
                    .bias = biased ? bias.data() : nullptr,
                    .accumulate = accumulate,
                    .out = out.data(),
                    .out_stride = out_stride,
                    .scratch = scratch.data()});
  Doubles truth(rows * out_stride, 7);  // what lies between the rows stays
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      double& sum = truth[r * out_stride + c] = (biased ? bias[c] : 0) + (accumulate ? 7 : 0);
      for (int64_t i = 0; i < k; ++i)
        sum += double(multiplied(format, a[r * a_stride + i])) * b.values[i * columns + c];
    }
  expect("matmul", out, truth, size_of_error(format, k, std::sqrt(double(k))));
}

// Rows and results of Bfloat16 give what rounding the same rows and results of floats gives.
void test_matmul_of_bfloat16(const Kernels<float>& kernels, Format format, int64_t rows, int64_t k,
                             int64_t columns, int64_t a_stride) {
  const int64_t out_stride = columns + 3;
  const auto a = normal<float>(rows * a_stride), bias = normal<float>(columns);
  const Weight<float> b(format, k, columns, false);
  const auto panels = b.packed(kernels, k, columns, false);
  std::vector<char> scratch(kernels.scratch_bytes(format, rows, k));
  std::vector<float> out(rows * out_stride, 7);
  iss::MatmulArgs<float> args{.rows = rows,
                              .k = k,
                              .columns = columns,
                              .panels = {0, kernels.panels(columns)},
                              .a = a.data(),
                              .a_stride = a_stride,
                              .b = {format, panels.data()},
                              .bias = bias.data(),
                              .accumulate = false,
                              .out = out.data(),
                              .out_stride = out_stride,
                              .scratch = scratch.data()};
  kernels.matmul(args);
  std::vector<iss::Bfloat16> rounded_a, rounded_out(out.size(), stored(iss::Bfloat16{}, 7));
  for (const float x : a) rounded_a.push_back(stored(iss::Bfloat16{}, x));
  args.a = reinterpret_cast<const float*>(rounded_a.data());
  args.out = reinterpret_cast<float*>(rounded_out.data());
  args.elements = iss::Elements::kBfloat16;
  args.bfloat16_out = true;
  kernels.matmul(args);
  std::vector<float> got;
  Doubles truth;
  for (const iss::Bfloat16 x : rounded_out) got.push_back(value(x));
  for (const float x : out) truth.push_back(value(stored(iss::Bfloat16{}, x)));
  expect("matmul of bfloat16", got, truth, 0);
}

// The mathematics of a step of a cell, for one unit; over complex numbers, whose imaginary part is
// a derivative: f(x + i e) = f(x) + i e f'(x).
using Complex = std::complex<double>;
constexpr double kStep = 1e-30;

struct Unit {
  Complex products[4], inputs[4], before, bias, mask;
  double y = 0;      // for a relu: on which side of zero the kernel came out
  Complex h, saved;  // results; saved: c of an LSTM
};

Complex sigmoid(Complex x) { return 1.0 / (1.0 + std::exp(-x)); }

void step(CellKind kind, Unit& u) {
  Complex sums[4];
  for (int k = 0; k < 4; ++k) sums[k] = u.products[k] + u.inputs[k];
  switch (kind) {
    case CellKind::kLstm:
      u.saved = sigmoid(sums[1]) * u.before + sigmoid(sums[0]) * std::tanh(sums[2]);
      u.h = sigmoid(sums[3]) * std::tanh(u.saved);
      break;
    case CellKind::kGru: {
      u.saved = u.products[2] + u.bias;
      const Complex r = sigmoid(sums[0]), z = sigmoid(sums[1]);
      u.h = (1.0 - z) * std::tanh(u.inputs[2] + r * u.saved) + z * u.before;
      break;
    }
    case CellKind::kRnnTanh:
      u.h = std::tanh(sums[0]);
      break;
    case CellKind::kRnnRelu:
      u.h = {std::max(sums[0].real(), 0.0), u.y > 0 ? sums[0].imag() : 0};
      break;
    case CellKind::kRhn: {
      const Complex transform = sigmoid(sums[1]);
      u.h = u.mask * std::tanh(sums[0]) * transform + u.before * (1.0 - transform);
      break;
    }
    case CellKind::kRhnCarry:
      u.h = u.mask * std::tanh(sums[0]) * sigmoid(sums[1]) + u.before * sigmoid(sums[2]);
      break;
  }
}

// The derivative of dh * h + dc * c with respect to `part`, a part of u.
double derivative(CellKind kind, Unit& u, Complex& part, double dh, double dc) {
  part.imag(kStep);
  step(kind, u);
  part.imag(0);
  return (dh * u.h.imag() + dc * u.saved.imag()) / kStep;
}

// full: with resets, masks, a bias of the product and a gradient of h_n; else with none of them.
// begins: the product begins with the projected inputs.
template <typename T>
void test_cell(const Kernels<T>& kernels, const CellSpec& cell, Format format, int64_t rows,
               int64_t hidden, int64_t output, bool full, bool begins = false) {
  const CellKind kind = cell.kind;
  const int64_t gates = cell.gates, columns = gates * hidden, stride = columns + 1;
  const int64_t h_stride = hidden + 2, before_stride = cell.has_c ? hidden : hidden + 3;
  const auto h_prev = normal<T>(rows * output), before = normal<T>(rows * before_stride);
  auto inputs = normal<T>(rows * stride);
  const auto bias = normal<T>(hidden), biases = normal<T>(columns);
  const auto mask = normal<T>(rows * hidden), state_mask = normal<T>(rows * hidden);
  const std::unique_ptr<bool[]> resets(new bool[rows]), resets_after(new bool[rows]);
  for (int64_t r = 0; r < rows; ++r) {
    resets[r] = full && random_bits() % 3 == 0;
    resets_after[r] = full && random_bits() % 3 == 0;
  }
  const bool rough = full && iss::rounds_rows(format);
  const bool masks = full && cell.deep, biased = full && kind == CellKind::kGru;
  const Weight<T> w_hh(format, output, columns, true);
  const auto panels = w_hh.packed(kernels, output, columns, true, cell.gates);
  std::vector<char> scratch(
      kernels.scratch_bytes(format, rows, std::max({output, columns, int64_t{7}})));
  const int64_t initial_rows = rows + iss::kTileSize - 1;
  std::vector<T> initial(kernels.panels(hidden, cell.gates) * kernels.panel_columns(cell.gates) *
                         initial_rows);
  if (begins) {
    const int64_t input = 7;
    const auto x = normal<T>(rows * input);
    const Weight<T> w_ih(format, input, columns, true);
    kernels.matmul({.rows = rows,
                    .k = input,
                    .columns = columns,
                    .panels = {0, kernels.panels(hidden, cell.gates)},
                    .a = x.data(),
                    .a_stride = input,
                    .b = {format, w_ih.packed(kernels, input, columns, true, cell.gates).data()},
                    .bias = nullptr,
                    .accumulate = false,
                    .out = initial.data(),
                    .out_stride = 0,
                    .scratch = scratch.data(),
                    .panel_rows = initial_rows});
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t column = 0; column < columns; ++column) {
        double sum = biases[column];
        for (int64_t i = 0; i < input; ++i)
          sum += double(multiplied(format, x[r * input + i])) * w_ih.values[column * input + i];
        inputs[r * stride + column] = static_cast<T>(sum);
      }
  }
  std::vector<T> c = before, h(rows * h_stride, T(7)), kept = inputs, saved(rows * hidden),
                 masked(rows * hidden);
  const int64_t count = kernels.panels(hidden, cell.gates);
  for (const auto [begin, end] : {std::pair{int64_t{0}, count / 2}, std::pair{count / 2, count}})
    kernels.of(kind).step({.rows = rows,
                           .hidden = hidden,
                           .k = output,
                           .panels = {begin, end},
                           .h_prev = h_prev.data(),
                           .h_prev_stride = output,
                           .before = cell.has_c ? c.data() : before.data(),
                           .before_stride = before_stride,
                           .resets = full ? resets.get() : nullptr,
                           .w_hh = {format, panels.data()},
                           .inputs = begins ? biases.data() : kept.data(),
                           .inputs_stride = begins ? 0 : stride,
                           .product_bias = biased ? bias.data() : nullptr,
                           .c = cell.has_c ? c.data() : nullptr,
                           .h = h.data(),
                           .h_stride = h_stride,
                           .mask = masks ? mask.data() : nullptr,
                           .state_mask = masks ? state_mask.data() : nullptr,
                           .masked = masked.data(),
                           .gates = kept.data(),
                           .gates_stride = stride,
                           .saved = saved.data(),
                           .scratch = scratch.data(),
                           .rough = rough,
                           .initial = begins ? initial.data() : nullptr,
                           .initial_rows = initial_rows});
  // The gradient of h: dy and what the next step's products ask for; of k = 0, dy alone.
  const auto dy = normal<T>(rows * hidden), dh_n = normal<T>(rows * hidden);
  const auto carried_in = normal<T>(rows * hidden);
  const int64_t k = output % 2 == 0 ? 0 : columns;
  const auto next = normal<T>(rows * k + 1);
  const Format back = is_pairs(format) ? format : Format::kSame;
  const Weight<T> plain(back, k, hidden, false);
  const auto plain_panels = plain.packed(kernels, k, hidden, false);
  std::vector<T> carried = carried_in, dinputs(rows * stride, T(7)), dproducts = dinputs;
  const int64_t parts = kernels.panels(hidden);
  for (const auto [begin, end] : {std::pair{int64_t{0}, parts / 2}, std::pair{parts / 2, parts}})
    kernels.of(kind).step_backward(
        {.rows = rows,
         .hidden = hidden,
         .k = k,
         .panels = {begin, end},
         .a = next.data(),
         .a_stride = k,
         .b = {back, plain_panels.data()},
         .resets = full ? resets.get() : nullptr,
         .resets_after = full ? resets_after.get() : nullptr,
         .dy = dy.data(),
         .dh_n = full ? dh_n.data() : nullptr,
         .mask = masks ? mask.data() : nullptr,
         .state_mask = masks ? state_mask.data() : nullptr,
         .gates = kept.data(),
         .gates_stride = stride,
         .saved = saved.data(),
         .before = before.data(),
         .before_stride = before_stride,
         .y = h.data(),
         .y_stride = h_stride,
         .carried = carried.data(),
         .dinputs = dinputs.data(),
         .dproducts = kind == CellKind::kGru ? dproducts.data() : dinputs.data(),
         .scratch = scratch.data()});
  const bool carries = kind != CellKind::kRnnTanh && kind != CellKind::kRnnRelu;
  Doubles true_c(rows * hidden), true_h(rows * h_stride, 7),
      true_saved = true_c, true_masked = true_c, true_carried = true_c,
      true_dinputs(rows * stride, 7), true_dproducts = true_dinputs;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t unit = 0; unit < hidden; ++unit) {
      const int64_t at = r * hidden + unit;
      Unit u{};
      for (int64_t g = 0; g < gates; ++g) {
        double product = 0;
        for (int64_t i = 0; i < output; ++i)
          product += double(multiplied(format, h_prev[r * output + i])) *
                     w_hh.values[(g * hidden + unit) * output + i];
        u.products[g] = resets[r] ? 0 : product;
        u.inputs[g] = inputs[r * stride + g * hidden + unit];
      }
      u.before = resets[r] ? 0 : double(before[r * before_stride + unit]);
      u.bias = biased ? double(bias[unit]) : 0;
      u.mask = masks ? double(mask[at]) : 1;
      u.y = h[r * h_stride + unit];
      step(kind, u);
      true_h[r * h_stride + unit] = u.h.real();
      true_c[at] = true_saved[at] = u.saved.real();
      true_masked[at] = masks ? u.h.real() * state_mask[at] : 0;
      double dh = 0;
      for (int64_t i = 0; i < k && !resets_after[r]; ++i)
        dh += double(multiplied(back, next[r * k + i])) * plain.values[i * hidden + unit];
      dh = dh * (masks ? double(state_mask[at]) : 1) + dy[at] + (full ? double(dh_n[at]) : 0);
      if (carries && !cell.has_c) dh += carried_in[at];
      const double dc = cell.has_c ? double(carried_in[at]) : 0;
      for (int64_t g = 0; g < gates; ++g) {
        const int64_t at_gate = r * stride + g * hidden + unit;
        true_dinputs[at_gate] = derivative(kind, u, u.inputs[g], dh, dc);
        true_dproducts[at_gate] = derivative(kind, u, u.products[g], dh, dc);
      }
      true_carried[at] = resets[r] ? 0 : derivative(kind, u, u.before, dh, dc);
    }
  const std::string name(cell.name);
  const auto check = [&](const char* what, const std::vector<T>& got, const Doubles& truth,
                         double size) { expect((name + what).c_str(), got, truth, size); };
  // 64: 2^-11 in units of `expect`, as c may be four times what errs by 2^-13.
  const double size =
      size_of_error(format, output, 4 + std::sqrt(double(output))) + (rough ? 64 : 0);
  const double size_back = size * (4 + 2 * std::sqrt(double(hidden)));
  check("_step h", h, true_h, size);
  if (cell.has_c) check("_step c", c, true_c, size);
  if (cell.saved_states && !cell.deep) check("_step saved", saved, true_saved, size);
  if (masks) check("_step masked", masked, true_masked, 4 * size);
  if (carries) check("_step_backward carried", carried, true_carried, size_back);
  check("_step_backward dinputs", dinputs, true_dinputs, size_back);
  if (kind == CellKind::kGru)
    check("_step_backward dproducts", dproducts, true_dproducts, size_back);
}

template <typename T>
void test_transpose(const Kernels<T>& kernels, int64_t rows, int64_t columns) {
  const int64_t to_stride = rows + 3;
  const auto from = normal<T>(rows * columns);
  std::vector<T> to(to_stride * columns, T(7)), sums(columns, T(7));
  for (const auto [begin, end] :
       {std::pair{int64_t{0}, columns / 2}, std::pair{columns / 2, columns}})
    kernels.transpose({.rows = rows,
                       .columns = end - begin,
                       .from = from.data() + begin,
                       .from_stride = columns,
                       .to = to.data() + begin * to_stride,
                       .to_stride = to_stride,
                       .sums = sums.data() + begin});
  Doubles truth(to_stride * columns, 7), true_sums(columns, 7);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      truth[c * to_stride + r] = from[r * columns + c];
      true_sums[c] += from[r * columns + c];
    }
  expect("transpose", to, truth, 0);
  expect("transpose sums", sums, true_sums, rows);
}

// a.T @ B, with a [k, rows] rounded to pairs as it is transposed.
template <typename T>
void test_product_of_pairs(const Kernels<T>& kernels, Format format, int64_t k, int64_t rows) {
  const int64_t columns = 70, pairs = iss::whole_tiles((k + 1) / 2), stride = pairs + 16;
  const auto a = normal<T>(k * rows);
  std::vector<T> to(iss::whole_tiles(rows) * stride, T(7)), sums(rows, T(7)), out(rows * columns);
  kernels.transpose({.rows = k,
                     .columns = rows,
                     .from = a.data(),
                     .from_stride = rows,
                     .to = to.data(),
                     .to_stride = stride,
                     .sums = sums.data(),
                     .format = format});
  const Weight<T> b(format, k, columns, false);
  const auto panels = b.packed(kernels, k, columns, false);
  kernels.matmul({.rows = rows,
                  .k = k,
                  .columns = columns,
                  .panels = {0, kernels.panels(columns)},
                  .a = to.data(),
                  .a_stride = stride,
                  .b = {format, panels.data()},
                  .bias = nullptr,
                  .accumulate = false,
                  .out = out.data(),
                  .out_stride = columns,
                  .scratch = nullptr,
                  .elements = iss::Elements::kPairs});
  Doubles truth(rows * columns), true_sums(rows, 7);
  for (int64_t i = 0; i < k; ++i)
    for (int64_t r = 0; r < rows; ++r) {
      true_sums[r] += a[i * rows + r];
      for (int64_t c = 0; c < columns; ++c)
        truth[r * columns + c] +=
            double(multiplied(format, a[i * rows + r])) * b.values[i * columns + c];
    }
  expect("product of pairs", out, truth, std::sqrt(double(k)));
  expect("sums of pairs", sums, true_sums, k);
}

template <typename W>
std::vector<iss::Compute<W>> values(const std::vector<W>& weights) {
  std::vector<iss::Compute<W>> result;
  for (const W w : weights) result.push_back(value(w));
  return result;
}

template <typename W>
void test_group_lasso(const iss::GroupLassoKernels<W>& kernels, int64_t rows, int64_t columns,
                      bool overlap) {
  using T = iss::Compute<W>;
  constexpr int64_t kUnits = 5;
  std::vector<int32_t> row_units(rows), column_units(columns);
  for (auto* units : {&row_units, &column_units})
    for (int32_t& unit : *units) unit = int32_t(random_bits() % (kUnits + 1)) - 1;
  std::vector<int64_t> starts{0}, unit_columns;
  for (int32_t unit = 0; unit < kUnits; ++unit) {
    for (int64_t c = 0; c < columns; ++c)
      if (column_units[c] == unit) unit_columns.push_back(c);
    starts.push_back(int64_t(unit_columns.size()));
  }
  const auto labelled = [&](bool paper_overlap) {
    return iss::LabelledRows{
        0, rows, columns, row_units.data(), starts.data(), unit_columns.data(), paper_overlap};
  };
  std::vector<W> weight, output(rows * columns, stored(W{}, T(1)));
  for (const T w : normal<T>(rows * columns)) weight.push_back(stored(W{}, w));
  weight.push_back(stored(W{}, T(7)));  // beyond the matrix: no kernel may write here
  output.push_back(stored(W{}, T(7)));
  const std::vector<W> before = weight;
  std::vector<T> row_sums(rows), column_sums(columns);
  kernels.squares({labelled(overlap), weight.data(), row_sums.data(), column_sums.data()});
  const auto factors = normal<T>(kUnits);
  const auto spread = [&](const std::vector<int32_t>& units, T none) {
    std::vector<T> result;
    for (int32_t u : units) result.push_back(u < 0 ? none : factors[u]);
    return result;
  };
  const std::vector<T> row_added = spread(row_units, 0), row_scaled = spread(row_units, 1);
  const std::vector<T> added = spread(column_units, 0), scaled = spread(column_units, 1);
  std::vector<T> adding = added, scaling = scaled;
  kernels.add_scaled(
      {labelled(overlap), weight.data(), output.data(), factors.data(), 0, adding.data()});
  kernels.scale({labelled(false), weight.data(), weight.data(), factors.data(), 0, scaling.data()});
  if (adding != added || scaling != scaled) std::printf("of_columns: not restored\n"), ++failures;
  Doubles true_rows(rows), true_columns(columns), true_output, true_scaled, small;
  std::vector<T> limits;
  for (int64_t c = 0; c < columns; ++c) limits.push_back(column_units[c] < 0 ? T(0) : T(0.5));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      const double w = value(before[r * columns + c]);
      const bool own = row_units[r] >= 0 && row_units[r] == column_units[c];
      const bool shared = own && !overlap;
      true_rows[r] += w * w;
      if (!shared) true_columns[c] += w * w;
      true_output.push_back(1 + w * (row_added[r] + (shared ? T(0) : added[c])));
      true_scaled.push_back(w * row_scaled[r] * (own ? T(1) : scaled[c]));
      const bool in_group = row_units[r] >= 0 || column_units[c] >= 0;
      small.push_back(in_group && std::abs(w) < 0.5 ? 0 : w);
    }
  for (Doubles* truth : {&true_output, &true_scaled, &small}) truth->push_back(7);
  const double rounding = sizeof(W) < sizeof(T) ? 1 << 12 : 1;  // bfloat16 keeps 8 bits
  expect("squares of rows", row_sums, true_rows, double(columns));
  expect("squares of columns", column_sums, true_columns, double(rows));
  expect("add_scaled", values(output), true_output, 4 * rounding);
  expect("scale", values(weight), true_scaled, 4 * rounding);
  weight = before;
  kernels.threshold(
      {labelled(false), weight.data(), weight.data(), nullptr, T(0.5), limits.data()});
  expect("threshold", values(weight), small, 0);
}

// A vector widened and rounded: every bfloat16 stays what it is, and ties go to the even one.
void test_bfloat16(const iss::GroupLassoKernels<iss::Bfloat16>& kernels) {
  constexpr int64_t kColumns = 37, kRows = 5000;
  std::vector<int32_t> row_units(kRows);
  std::vector<float> factors(kRows), ones(kColumns, 1);
  for (int32_t r = 0; r < kRows; ++r) {
    row_units[r] = r;
    factors[r] = std::bit_cast<float>(0x3f800000u + uint32_t(r) * 0x1000u);  // and half-way ones
  }
  const std::vector<int64_t> starts(kRows + 1);
  std::vector<iss::Bfloat16> weight(kRows * kColumns, {0x3f80});
  kernels.scale({{0, kRows, kColumns, row_units.data(), starts.data(), nullptr, false},
                 weight.data(),
                 weight.data(),
                 factors.data(),
                 0,
                 ones.data()});
  Doubles truth;
  for (int64_t at = 0; at < kRows * kColumns; ++at)
    truth.push_back(value(stored(iss::Bfloat16{}, factors[at / kColumns])));
  expect("bfloat16 rounded", values(weight), truth, 0);
  for (float& factor : factors) factor = 1;
  std::vector<iss::Bfloat16> all;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) all.push_back({uint16_t(bits)});
  const int64_t rows = 0x10000 / kColumns;
  std::vector<iss::Bfloat16> same = all;
  kernels.scale({{0, rows, kColumns, row_units.data(), starts.data(), nullptr, false},
                 same.data(),
                 same.data(),
                 factors.data(),
                 0,
                 ones.data()});
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const bool nan = (bits & 0x7fff) > 0x7f80;
    if (nan ? !std::isnan(value(same[bits])) : same[bits].bits != bits) {
      std::printf("bfloat16 %x times 1: got %x\n", bits, same[bits].bits);
      ++failures;
      return;
    }
  }
}

template <typename T>
void test(const Kernels<T>& kernels) {
  std::vector<Format> formats{Format::kSame};
  if (sizeof(T) == 4) formats = {Format::kSame, Format::kFloat16, Format::kBfloat16};
  if (sizeof(T) == 4 && is_pairs(kernels.bfloat16)) formats.push_back(kernels.bfloat16);
  if (sizeof(T) == 4 && in_tiles(kernels.int8))
    formats.insert(formats.end(), {Format::kInt8Tiles, Format::kInt8FineTiles});
  else if (sizeof(T) == 4)
    formats.insert(formats.end(), {Format::kInt8, Format::kInt8Fine});
  for (int64_t rows : {1, 2, 5, 7, 17, 33, 70})
    for (int64_t size : {1, 3, 8, 17, 33}) {
      for (Format format : formats) {
        if (rows > 7 && !in_tiles(format)) continue;
        for (bool accumulate : {false, true})
          for (bool biased : {false, true}) {
            test_matmul(kernels, format, rows, 9, 5 * size, accumulate, biased);
            if (in_tiles(format))
              test_matmul(kernels, format, rows, 5 * size, 70, accumulate, biased);
          }
        for (const CellSpec& cell : iss::kCells)
          for (bool full : {false, true}) {
            test_cell(kernels, cell, format, rows, size, size, full);
            test_cell(kernels, cell, format, rows, size, 6, full);
            if (format == Format::kTiles && !cell.bias_parts)
              test_cell(kernels, cell, format, rows, size, size, full, /*begins=*/true);
          }
      }
      test_transpose(kernels, 5 * rows, size);
      if constexpr (sizeof(T) == 4)
        if (is_pairs(kernels.bfloat16)) {
          test_product_of_pairs(kernels, kernels.bfloat16, 5 * rows, size);
          for (int64_t a_stride : {size, size + 1})  // of which one is odd
            test_matmul_of_bfloat16(kernels, kernels.bfloat16, rows, size, 70, a_stride);
        }
    }
}

template <typename W>
void test(const iss::GroupLassoKernels<W>& kernels) {
  for (int64_t rows : {1, 4, 8, 23, 64})
    for (int64_t size : {1, 3, 8, 17, 33})
      for (bool overlap : {false, true}) test_group_lasso(kernels, rows, size, overlap);
}

}  // namespace

int main() {
  for (const auto& isa : iss::supported_isas()) {
    const int before = failures;
    iss::set_isa(isa);
    test(iss::cpu_kernels().f32);
    test(iss::cpu_kernels().f64);
    test(iss::cpu_kernels().lasso_f32);
    test(iss::cpu_kernels().lasso_f64);
    test(iss::cpu_kernels().lasso_bf16);
    test_bfloat16(iss::cpu_kernels().lasso_bf16);
    std::printf("%s: %s\n", isa.c_str(), failures == before ? "passed" : "FAILED");
  }
  return failures > 0;
}
