// SPDX-License-Identifier: Apache-2.0

#include "cpu/network.h"

#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

#include "cpu/kernels/table.h"
#include "cpu/team.h"
#include "locks.h"
#include "memory.h"

namespace iss {
namespace {

// Panels of a Linear that a thread takes at a time; its rows are rounded or quantised for them
// once.
constexpr int64_t kPanelsEach = 16;

// Biases may be views of a module's buffers, which may change later.
at::Tensor copied(const at::Tensor& bias) { return bias.defined() ? bias.clone() : bias; }

// Whether no value is larger, infinite or NaN.
bool is_within(const float* values, int64_t count, float largest) {
  bool beyond = false;
  for (int64_t i = 0; i < count; ++i) beyond |= !(std::abs(values[i]) <= largest);
  return !beyond;
}

Stack packed_stack(const CellSpec& spec, const std::vector<std::vector<CellWeights>>& layers) {
  Stack stack;
  for (const auto& layer : layers) {
    // The model's input may range widely; what layers put out hardly does.
    const bool first = stack.empty();
    Layer& cells = stack.emplace_back();
    for (const CellWeights& w : layer) {
      const int64_t depth = w.w_hh.size(0) / w.w_ih.size(0);
      const auto [bias, product_bias] = merged_biases(spec, w.b_ih, w.b_hh, depth);
      const bool begins_with_inputs = can_begin_with_inputs(spec, w.w_ih.scalar_type());
      PackedCell cell{
          .spec = &spec,
          .input = w.w_ih.size(1),
          .hidden = w.w_ih.size(0) / spec.gates,
          .output = w.w_hh.size(1),
          .reverse = w.reverse,
          .w_ih = pack(w.w_ih, {.transposed = true, .gates = begins_with_inputs ? spec.gates : 1},
                       w.scale_ih),
          .w_hh = pack(w.w_hh, {.transposed = true, .gates = spec.gates, .parts = depth},
                       w.scale_hh, /*look=*/true),
          .w_hr = w.w_hr.defined() ? pack(w.w_hr, {.transposed = true}, w.scale_hr) : Matrix(),
          .bias = copied(bias),
          .product_bias = copied(product_bias),
          .depth = depth,
          .begins_with_inputs = begins_with_inputs};
      if (first) cell.w_ih.format = fine(cell.w_ih.format);
      cells.push_back(std::move(cell));
    }
  }
  return stack;
}

// The state of a cell that is not trained: h_n and c_n take the place of h_0 and c_0.
template <typename T>
CellState<T> in_place(void* h, void* c) {
  T* const h_data = static_cast<T*>(h);
  return {.h0 = h_data,
          .c = static_cast<T*>(c),
          .h_n = h_data,
          .inputs = nullptr,
          .gates = nullptr,
          .saved = nullptr};
}

float activated(int kind, float x, float parameter) {
  switch (kind) {
    case 0:
      return x < 0 ? 0 : x;  // NaN passes
    case 1:
      return std::tanh(x);
    case 2:
      return 1 / (1 + std::exp(-x));
    case 3:
      return x / (1 + std::exp(-x));
    case 4:
      return x * 0.5f * (1 + std::erf(x * float(M_SQRT1_2)));
    default:
      return x < 0 ? x * parameter : x;
  }
}
const char* const kActivations[] = {"relu", "tanh", "sigmoid", "silu", "gelu", "leaky_relu"};

void copy(const at::Tensor& from, const at::Tensor& to) {
  TORCH_INTERNAL_ASSERT(from.sizes() == to.sizes() && from.is_contiguous());
  std::copy_n(from.const_data_ptr<float>(), from.numel(), to.mutable_data_ptr<float>());
}

at::Tensor copy_of(const at::Tensor& t) {
  const at::Tensor result = floats(t.size(0), t.size(1));
  copy(t, result);
  return result;
}

}  // namespace

Network::Network(const CellSpec& cell, std::vector<std::vector<CellWeights>> layers)
    : cell_(cell),
      weights_(std::move(layers)),
      dtype_(weights_[0][0].w_ih.scalar_type() == at::kDouble ? at::kDouble : at::kFloat) {}

template <typename Packed>
template <typename Pack>
std::shared_ptr<const Packed> PackedForIsa<Packed>::get(const Pack& pack) const {
  const CpuKernels* const kernels = &cpu_kernels();
  {
    const std::lock_guard lock(process_mutex());
    if (packed_for_ == kernels) return packed_;
  }
  // Threads that come here at once each pack; the last one's panels are kept.
  const auto packed = std::make_shared<const Packed>(pack());
  auto replaced = packed;
  {
    const std::lock_guard lock(process_mutex());
    packed_.swap(replaced);
    packed_for_ = kernels;
  }
  return packed;  // what was replaced goes now, after the lock
}

std::shared_ptr<const Stack> Network::stack() const {
  return packed_.get([&] { return packed_stack(cell_, weights_); });
}

int64_t Network::input() const { return weights_[0][0].w_ih.size(1); }

int64_t Network::output() const {
  int64_t width = 0;
  for (const CellWeights& cell : weights_.back()) width += cell.w_hh.size(1);
  return width;
}

template <typename T>
void Network::run_as(const at::Tensor& x, const Sequence& sequence,
                     const std::vector<void*>& states, const at::Tensor& y) const {
  std::vector<CellState<T>> cells;
  const size_t each = states_per_cell();
  cells.reserve(states.size() / each);
  for (size_t i = 0; i < states.size(); i += each)
    cells.push_back(in_place<T>(states[i], each > 1 ? states[i + 1] : nullptr));
  run_stack<T>(*stack(), sequence, x.const_data_ptr<T>(), cells, y.mutable_data_ptr<T>());
}

at::Tensor Network::run(const at::Tensor& x, const std::optional<std::vector<int64_t>>& batch_sizes,
                        const at::Tensor& resets, const std::vector<at::Tensor>& states) const {
  const int64_t batch = states.at(0).size(0);
  TORCH_CHECK(batch_sizes || x.size(1) == batch, cell_.name, ": expected hx for B = ", x.size(1),
              " rows, got ", batch);
  Sequence sequence(batch_sizes ? Vector<int64_t>(batch_sizes->begin(), batch_sizes->end())
                                : Vector<int64_t>(x.size(0), batch),
                    batch);
  if (resets.defined()) {
    TORCH_INTERNAL_ASSERT(resets.numel() == sequence.rows && resets.is_contiguous());
    sequence.resets = resets.const_data_ptr<bool>();
  }
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = output();
  const at::Tensor y = recycled(shape, x.scalar_type());
  std::vector<void*> data;
  data.reserve(states.size());
  for (const at::Tensor& t : states) data.push_back(t.mutable_data_ptr());
  AT_DISPATCH_FLOATING_TYPES(dtype_, "Network::run",
                             [&] { run_as<scalar_t>(x, sequence, data, y); });
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> Network::run_from_zero(const at::Tensor& x) const {
  const int64_t steps = x.size(0), batch = x.size(1);
  const int64_t cells = static_cast<int64_t>(weights_.size() * weights_[0].size());
  const CellWeights& first = weights_[0][0];
  const auto empty = [&](at::IntArrayRef shape) {
    return at::detail::empty_cpu(shape, dtype_, std::nullopt, std::nullopt, std::nullopt,
                                 std::nullopt);
  };
  const at::Tensor y = empty({steps, batch, output()});
  const int64_t each = states_per_cell();
  std::vector<void*> data(cells * each);
  at::Tensor state[2];  // h_n, c_n
  for (int64_t which = 0; which < each; ++which) {
    const int64_t size = which == 0 ? first.w_hh.size(1) : first.w_ih.size(0) / cell_.gates;
    state[which] = empty({cells, batch, size});
    char* const begin = static_cast<char*>(state[which].mutable_data_ptr());
    const int64_t bytes = static_cast<int64_t>(state[which].nbytes());
    std::memset(begin, 0, bytes);
    for (int64_t i = 0; i < cells; ++i) data[i * each + which] = begin + i * (bytes / cells);
  }
  const Sequence sequence(Vector<int64_t>(steps, batch), batch);
  AT_DISPATCH_FLOATING_TYPES(dtype_, "Network::run_from_zero",
                             [&] { run_as<scalar_t>(x, sequence, data, y); });
  return {y, state[0], state[1]};
}

Linear::Linear(const at::Tensor& weight, const at::Tensor& scales, const at::Tensor& bias)
    : weight_(weight), scales_(scales), bias_(copied(bias)) {}

std::shared_ptr<const Linear::Parts> Linear::parts() const {
  return packed_.get([&] {
    Parts parts;
    if (weight_.scalar_type() != at::kFloat) {
      parts.push_back(pack(weight_, {.transposed = true}, scales_));
      parts[0].format = fine(parts[0].format);
    } else {
      int64_t first = 0;
      do {
        const int64_t terms = std::min(kTerms, input() - first);
        parts.push_back(pack(weight_.narrow(1, first, terms).contiguous(), {.transposed = true}));
        first += kTerms;
      } while (first < input());
    }
    return parts;
  });
}

void Linear::run_unrounded(const float* x, float* y, int64_t begin, int64_t end) const {
  const float* const bias = bias_.defined() ? bias_.const_data_ptr<float>() : nullptr;
  for (int64_t column = begin; column < end; ++column) {
    const int8_t* const weight = weight_.const_data_ptr<int8_t>() + column * input();
    const float scale = scales_.const_data_ptr<float>()[column];
    float sum = bias ? bias[column] : 0;
    for (int64_t i = 0; i < input(); ++i) sum += x[i] * (weight[i] * scale);
    y[column] = sum;
  }
}

template <typename E>
void Linear::run(const Parts& parts, const E* x, int64_t rows, E* y) const {
  constexpr bool kRounded = std::is_same_v<E, Bfloat16>;
  const Call call;
  const Kernels<float>& kernels = cpu_kernels().f32;
  const int64_t k = input(), columns = output(), panels = kernels.panels(columns);
  const Format format = parts[0].format;
  const int64_t block = kernels.block_rows(format);
  const int64_t bytes = kernels.scratch_bytes(format, std::min(block, rows), k);
  char* const own = static_cast<char*>(scratch(bytes * available_threads()));
  const auto multiply = [&](int64_t first, int64_t last, PanelRange range, int64_t thread) {
    const int64_t terms = parts.size() > 1 ? kTerms : k;
    for (int64_t row = first; row < last; row += block) {
      for (size_t part = 0; part < parts.size(); ++part) {
        const int64_t begin = part * terms;
        kernels.matmul(
            {.rows = std::min(block, last - row),
             .k = std::min(terms, k - begin),
             .columns = columns,
             .panels = range,
             .a = reinterpret_cast<const float*>(x + row * k + begin),
             .a_stride = k,
             .b = parts[part].view(),
             .bias = part == 0 && bias_.defined() ? bias_.const_data_ptr<float>() : nullptr,
             .accumulate = part > 0,
             .out = reinterpret_cast<float*>(y + row * columns),
             .out_stride = columns,
             .scratch = own + thread * bytes,
             .elements = kRounded ? Elements::kBfloat16 : Elements::kFloats,
             .bfloat16_out = kRounded});
      }
      if constexpr (!kRounded)
        for (int64_t r = row; r < std::min(row + block, last); ++r)
          if (is_int8(format) && !is_within(x + r * k, k, kInt8Largest))
            run_unrounded(x + r * k, y + r * columns, range.begin * kernels.panel_units(),
                          std::min(range.end * kernels.panel_units(), columns));
    }
  };
  // Each thread has panels of its own and reads their weights alone, unless there are too few.
  if (panels >= kPanelsEach * available_threads() || rows <= kBlockRows)
    return each_block(panels, kPanelsEach, rows * k * columns / panels,
                      [&](int64_t begin, int64_t end, int64_t thread) {
                        multiply(0, rows, {begin, end}, thread);
                      });
  each_block(rows, kernels.share_rows(format), k * columns,
             [&](int64_t begin, int64_t end, int64_t thread) {
               multiply(begin, end, {0, panels}, thread);
             });
}

at::Tensor Linear::run(const at::Tensor& x) const {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = output();
  const auto packed = parts();
  const int64_t rows = x.numel() / input();
  if (x.scalar_type() == at::kBFloat16 && is_pairs(packed->front().format)) {
    const at::Tensor y = recycled(shape, at::kBFloat16);
    run(*packed, static_cast<const Bfloat16*>(x.contiguous().const_data_ptr()), rows,
        static_cast<Bfloat16*>(y.mutable_data_ptr()));
    return y;
  }
  const at::Tensor y = recycled(shape, at::kFloat);
  run(*packed, converted(x, at::kFloat).const_data_ptr<float>(), rows, y.mutable_data_ptr<float>());
  return converted(y, x.scalar_type());
}

at::Tensor floats(int64_t rows, int64_t columns) {
  const c10::InferenceMode normal(false);
  return at::detail::empty_cpu({rows, columns}, at::kFloat);
}

Stream::Stream(int64_t batch, int64_t input)
    : batch_(batch), input_(input), width_(input), one_step_({batch}, batch) {}

void Stream::add(Stage stage, int64_t width) {
  stages_.push_back(std::move(stage));
  width_ = width;
  between_.push_back(floats(batch_, width));
}

void Stream::add_recurrent(std::shared_ptr<const Network> network) {
  std::vector<CellState<float>> states;
  for (const Layer& layer : *network->stack())
    for (const PackedCell& cell : layer) {
      auto& own = states_.emplace_back();
      own.push_back(floats(batch_, cell.output));
      if (cell.spec->has_c) own.push_back(floats(batch_, cell.hidden));
      states.push_back(in_place<float>(own.front().mutable_data_ptr(),
                                       own.size() > 1 ? own[1].mutable_data_ptr() : nullptr));
    }
  reset(std::nullopt);
  const int64_t width = network->output();
  add(Recurrent{std::move(network), std::move(states)}, width);
}

void Stream::add_linear(std::shared_ptr<const Linear> linear) {
  const int64_t width = linear->output();
  add(Product{std::move(linear)}, width);
}

void Stream::add_layer_norm(const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& bias, double eps) {
  add(LayerNorm{weight.value_or(at::Tensor()), bias.value_or(at::Tensor()), eps}, width_);
}

void Stream::add_activation(const std::string& name, double parameter) {
  for (int kind = 0; kind < 6; ++kind)
    if (name == kActivations[kind]) return add(Activation{kind, parameter}, width_);
  TORCH_INTERNAL_ASSERT(false, name);
}

void Stream::run(Recurrent& recurrent, const float* x, float* y, int64_t) {
  if (recurrent.packed_for != &cpu_kernels()) {
    recurrent.stack = recurrent.network->stack();
    recurrent.packed_for = &cpu_kernels();
  }
  run_stack<float>(*recurrent.stack, one_step_, x, recurrent.states, y);
}

void Stream::run(Product& product, const float* x, float* y, int64_t) {
  if (product.packed_for != &cpu_kernels()) {
    product.parts = product.linear->parts();
    product.packed_for = &cpu_kernels();
  }
  product.linear->run(*product.parts, x, batch_, y);
}

void Stream::run(LayerNorm& norm, const float* x, float* y, int64_t n) {
  for (int64_t b = 0; b < batch_; ++b, x += n, y += n) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < n; ++i) sum += x[i];
    const double mean = sum / n;
    for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const double scale = 1 / std::sqrt(squares / n + norm.eps);
    for (int64_t i = 0; i < n; ++i) {
      double value = (x[i] - mean) * scale;
      if (norm.weight.defined()) value *= norm.weight.const_data_ptr<float>()[i];
      if (norm.bias.defined()) value += norm.bias.const_data_ptr<float>()[i];
      y[i] = static_cast<float>(value);
    }
  }
}

void Stream::run(Activation& activation, const float* x, float* y, int64_t width) {
  for (int64_t i = 0; i < batch_ * width; ++i)
    y[i] = activated(activation.kind, x[i], static_cast<float>(activation.parameter));
}

void Stream::expect_whole_step() const {
  TORCH_CHECK(!mutex_.abandoned(),
              "Stream: expected no step in another thread when this process was forked, got one "
              "half-way; reset() or a new state begins another sequence");
}

void Stream::step(const float* x, float* out) {
  const std::lock_guard lock(mutex_);
  expect_whole_step();
  // A layer may write before it has read all that overlaps.
  const bool apart = x + batch_ * input_ <= out || out + batch_ * width_ <= x;
  for (size_t i = 0; i < stages_.size(); ++i) {
    const bool last = i + 1 == stages_.size();
    float* const y = last && apart ? out : between_[i].mutable_data_ptr<float>();
    std::visit([&](auto& stage) { run(stage, x, y, between_[i].size(1)); }, stages_[i]);
    x = y;
  }
  if (!apart) std::copy_n(x, batch_ * width_, out);
}

void Stream::reset(const std::optional<at::Tensor>& rows) {
  const std::lock_guard lock(mutex_);
  if (rows)
    expect_whole_step();
  else
    mutex_.recover();
  const bool* const among = rows ? rows->const_data_ptr<bool>() : nullptr;
  for (const auto& own : states_)
    for (const at::Tensor& t : own)
      for (int64_t b = 0; b < batch_; ++b)
        if (among == nullptr || among[b])
          std::fill_n(t.mutable_data_ptr<float>() + b * t.size(1), t.size(1), 0.0f);
}

States Stream::states() {
  const std::lock_guard lock(mutex_);
  States copies;
  for (const auto& own : states_)
    std::transform(own.begin(), own.end(), std::back_inserter(copies.emplace_back()), copy_of);
  return copies;
}

void Stream::set_states(const States& states) {
  TORCH_INTERNAL_ASSERT(states.size() == states_.size());
  const std::lock_guard lock(mutex_);
  mutex_.recover();
  for (size_t i = 0; i < states.size(); ++i) {
    TORCH_INTERNAL_ASSERT(states[i].size() == states_[i].size());
    for (size_t k = 0; k < states[i].size(); ++k) copy(states[i][k], states_[i][k]);
  }
}

}  // namespace iss
