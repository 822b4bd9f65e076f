// SPDX-License-Identifier: Apache-2.0
// Inference from weights that no longer change: packed once, run without the dispatcher. A Network
// is one prepared recurrent module, a Linear one prepared nn.Linear; a Stream takes a chain of
// layers one time step at a time.
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

// One direction of one layer, as torch shapes it: float64, float32, float16, bfloat16, or int8 with
// one scale for each row. A tensor that the cell does not have is undefined.
struct CellWeights {
  at::Tensor w_ih, w_hh, w_hr;              // [G H, I], [D G H, P], [P, H]
  at::Tensor scale_ih, scale_hh, scale_hr;  // [G H], [D G H], [P]; of int8 alone
  at::Tensor b_ih, b_hh;                    // [G H], [D G H] in the compute dtype
  bool reverse;
};

// What is packed for the ISA in use, and again where that has changed.
template <typename Packed>
class PackedForIsa {
 public:
  // pack() -> Packed
  template <typename Pack>
  std::shared_ptr<const Packed> get(const Pack& pack) const;

 private:
  // Guarded by process_mutex().
  mutable std::shared_ptr<const Packed> packed_;
  mutable const void* packed_for_ = nullptr;
};

class Network {
 public:
  Network(const CellSpec& cell, std::vector<std::vector<CellWeights>> layers);

  const CellSpec& cell() const { return cell_; }
  // h, and c where it has one.
  int64_t states_per_cell() const { return cell_.has_c ? 2 : 1; }

  // Packed for the ISA in use; packed again where that has changed.
  std::shared_ptr<const Stack> stack() const;
  // What activations are: float64 for float64 weights, else float32.
  at::ScalarType dtype() const { return dtype_; }
  int64_t input() const;
  int64_t output() const;  // of all directions

  // x [T, B, I], or [N, I] with the sizes of each step; resets [T, B] or [N], bool, may be
  // undefined. states: h [B, P], and c [B, H] of a cell with c, by layer and direction; all
  // contiguous. The final states overwrite them. -> y [T, B, P] or [N, P]
  at::Tensor run(const at::Tensor& x, const std::optional<std::vector<int64_t>>& batch_sizes,
                 const at::Tensor& resets, const std::vector<at::Tensor>& states) const;

  // The same from a zero state, where all cells are of one size: x [T, B, I], contiguous -> y, and
  // h_n [cells, B, P], c_n [cells, B, H], undefined for a cell without c. For small calls, where
  // each dispatch of torch's would count.
  std::tuple<at::Tensor, at::Tensor, at::Tensor> run_from_zero(const at::Tensor& x) const;

 private:
  // states: where each state of `run` lies.
  template <typename T>
  void run_as(const at::Tensor& x, const Sequence& sequence, const std::vector<void*>& states,
              const at::Tensor& y) const;

  const CellSpec& cell_;
  std::vector<std::vector<CellWeights>> weights_;
  at::ScalarType dtype_;
  PackedForIsa<Stack> packed_;
};

// x @ weight.T + bias, as nn.Linear. weight [O, I]: float32, float16, bfloat16, or int8 with scales
// [O]; bias float32 [O]. scales and bias may be undefined.
class Linear {
 public:
  Linear(const at::Tensor& weight, const at::Tensor& scales, const at::Tensor& bias);

  int64_t input() const { return weight_.size(1); }
  int64_t output() const { return weight_.size(0); }

  // Some columns of the weight each, one after the other: terms that are summed before they are
  // added to the others, so that a long sum rounds less.
  using Parts = std::vector<Matrix>;
  std::shared_ptr<const Parts> parts() const;  // packed for the ISA in use

  // x [rows, input()] -> y [rows, output()], contiguous, both of E: float, or Bfloat16 where the
  // parts are of pairs.
  template <typename E>
  void run(const Parts& parts, const E* x, int64_t rows, E* y) const;
  // x [..., input()] of float32, bfloat16 or float16; y has its type.
  at::Tensor run(const at::Tensor& x) const;

 private:
  // Columns [begin, end) of a row of y where int8 weights meet an x with an element that cannot be
  // quantised, beyond kInt8Largest.
  void run_unrounded(const float* x, float* y, int64_t begin, int64_t end) const;

  at::Tensor weight_, scales_, bias_;
  PackedForIsa<Parts> packed_;
};

// [rows, columns] in float32, whatever torch's default dtype, device or mode is: it may be written
// in and outside of inference mode.
at::Tensor floats(int64_t rows, int64_t columns);

// By layer: h [B, P], and c [B, H] of a cell with c.
using States = std::vector<std::vector<at::Tensor>>;

// In float32, whatever the weights are stored as. Threads take turns.
class Stream {
 public:
  Stream(int64_t batch, int64_t input);

  void add_recurrent(std::shared_ptr<const Network> network);
  void add_linear(std::shared_ptr<const Linear> linear);
  void add_layer_norm(const std::optional<at::Tensor>& weight,
                      const std::optional<at::Tensor>& bias, double eps);
  // relu, tanh, sigmoid, silu, gelu, leaky_relu (parameter: the slope below 0)
  void add_activation(const std::string& name, double parameter);

  // x [B, input()] -> out [B, output()], contiguous; they may overlap.
  void step(const float* x, float* out);
  // Zeroes the states, or those of the rows that are true: bool [B], contiguous.
  void reset(const std::optional<at::Tensor>& rows);
  States states();  // copies
  void set_states(const States& states);

  int64_t batch() const { return batch_; }
  int64_t input() const { return input_; }
  int64_t output() const { return width_; }

 private:
  struct Recurrent {
    std::shared_ptr<const Network> network;
    std::vector<CellState<float>> states;
    std::shared_ptr<const Stack> stack = nullptr;
    const void* packed_for = nullptr;
  };
  struct Product {
    std::shared_ptr<const Linear> linear;
    std::shared_ptr<const Linear::Parts> parts = nullptr;
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
  using Stage = std::variant<Recurrent, Product, LayerNorm, Activation>;

  void add(Stage stage, int64_t width);
  void expect_whole_step() const;
  void run(Recurrent& recurrent, const float* x, float* y, int64_t width);
  void run(Product& product, const float* x, float* y, int64_t width);
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
