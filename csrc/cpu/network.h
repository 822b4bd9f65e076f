// SPDX-License-Identifier: Apache-2.0
// Inference from weights that no longer change: packed once, run without the dispatcher. A Network
// is the LSTM of a prepared model; a Stream takes a chain of layers one time step at a time.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include "locks.h"
#include "cpu/recurrence.h"

namespace iss {

// One direction of one layer, as nn.LSTM shapes it: float64, float32, float16, bfloat16, or int8
// with one scale for each row.
struct CellWeights {
  at::Tensor w_ih, w_hh;                    // [4H, I], [4H, P]
  std::optional<at::Tensor> bias, w_hr;     // [4H] in the compute dtype; [P, H]
  at::Tensor scale_ih, scale_hh, scale_hr;  // [4H], [4H], [P]; undefined but for int8
  bool reverse;
};

class Network {
 public:
  explicit Network(std::vector<std::vector<CellWeights>> layers);

  // Packed for the ISA in use; packed again where that has changed.
  std::shared_ptr<const Stack> stack() const;
  // What activations are: float64 for float64 weights, else float32.
  at::ScalarType dtype() const { return dtype_; }
  int64_t input() const;
  int64_t output() const;  // of all directions

  // x [T, B, I], or [N, I] with the sizes of each step; h, c: [B, P] and [B, H] by layer and
  // direction, contiguous; they are overwritten by h_n and c_n. -> y [T, B, P] or [N, P]
  at::Tensor run(const at::Tensor& x, const std::optional<std::vector<int64_t>>& batch_sizes,
                 const std::vector<at::Tensor>& h, const std::vector<at::Tensor>& c) const;

  // The same from a zero state, where all cells are of one size: x [T, B, I], contiguous -> y, and
  // h_n, c_n [cells, B, P or H]. For small calls, where each dispatch of torch's would count.
  std::tuple<at::Tensor, at::Tensor, at::Tensor> run_from_zero(const at::Tensor& x) const;

 private:
  template <typename T>
  void run_as(const at::Tensor& x, const Sequence& sequence, const std::vector<void*>& h,
              const std::vector<void*>& c, const at::Tensor& y) const;

  std::vector<std::vector<CellWeights>> weights_;
  at::ScalarType dtype_;
  // Guarded by process_mutex().
  mutable std::shared_ptr<const Stack> stack_;
  mutable const void* packed_for_ = nullptr;
};

// [rows, columns] in float32, whatever torch's default dtype, device or mode is: it may be written
// in and outside of inference mode.
at::Tensor floats(int64_t rows, int64_t columns);

// By layer: h [B, P], c [B, H].
using States = std::vector<std::pair<at::Tensor, at::Tensor>>;

// In float32, whatever the weights are stored as. Threads take turns.
class Stream {
 public:
  Stream(int64_t batch, int64_t input);

  void add_lstm(std::shared_ptr<const Network> network);
  void add_linear(const at::Tensor& weight, const std::optional<at::Tensor>& bias);
  void add_layer_norm(const std::optional<at::Tensor>& weight,
                      const std::optional<at::Tensor>& bias, double eps);
  // relu, tanh, sigmoid, silu, gelu, leaky_relu (parameter: the slope below 0)
  void add_activation(const std::string& name, double parameter);

  // x [B, input()] -> out [B, output()], contiguous; they may overlap.
  void step(const float* x, float* out);
  void reset();
  States states();  // copies
  void set_states(const States& states);

  int64_t batch() const { return batch_; }
  int64_t input() const { return input_; }
  int64_t output() const { return width_; }

 private:
  struct Lstm {
    std::shared_ptr<const Network> network;
    std::vector<CellState<float>> states;
    std::shared_ptr<const Stack> stack = nullptr;
    const void* packed_for = nullptr;
  };
  struct Linear {
    at::Tensor weight, bias;
    Matrix packed;
    const void* packed_for = nullptr;
  };
  struct LayerNorm {
    at::Tensor weight, bias;
    double eps;
  };
  struct Activation {
    int kind;
    double parameter;
  };
  using Stage = std::variant<Lstm, Linear, LayerNorm, Activation>;

  void add(Stage stage, int64_t width);
  void run(Lstm& lstm, const float* x, float* y, int64_t width);
  void run(Linear& linear, const float* x, float* y, int64_t width);
  void run(LayerNorm& norm, const float* x, float* y, int64_t width);
  void run(Activation& activation, const float* x, float* y, int64_t width);

  int64_t batch_, input_, width_;
  Sequence one_step_;
  std::vector<Stage> stages_;
  std::vector<at::Tensor> between_;  // [B, width] after each stage
  States states_;
  ObjectMutex mutex_;
};

}  // namespace iss
