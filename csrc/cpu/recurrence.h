// SPDX-License-Identifier: Apache-2.0
// The walk over time: layers of recurrent cells with packed weights run over a sequence, on as many
// threads as the work is worth. recurrent_forward runs one cell; prepared models and streams run
// whole stacks. Nothing here knows the equations of a cell.
#pragma once

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "cells/spec.h"
#include "cpu/packed.h"
#include "cpu/plan.h"
#include "memory.h"
#include "sequence.h"

namespace iss {

inline bool can_begin_with_inputs(const CellSpec& spec, at::ScalarType weights) {
  return format_of(weights) == Format::kTiles && !spec.bias_parts;
}

// One direction of one layer.
struct PackedCell {
  const CellSpec* spec;
  int64_t input, hidden, output;  // I, H, P
  bool reverse;
  // Undefined: w_ih where CellState::inputs holds the projected inputs, w_hr without a projection.
  Matrix w_ih, w_hh, w_hr;
  at::Tensor bias;  // [G H] of the inputs; undefined without
  // The bias that is not added to the inputs: that of the last product [H] (GRU), or those of the
  // micro-steps without an input [(D - 1) G H]. Undefined for other cells and without a bias.
  at::Tensor product_bias;
  int64_t depth = 1;  // D, parts of w_hh: micro-steps of a step
  // The sums of a step's product begin with the projected inputs (StepArgs::initial), and biases
  // are added at the end. w_ih is packed with all gates. Where can_begin_with_inputs, and nothing
  // is saved: projected inputs have no other use then.
  bool begins_with_inputs = false;

  int64_t gates() const { return spec->gates * hidden; }  // G H
};

inline CellSize size_of(const PackedCell& cell) {
  return {cell.spec->gates,
          cell.input,
          cell.hidden,
          cell.output,
          cell.w_hr.panels.defined(),
          cell.depth,
          in_tiles(cell.w_hh.format)};
}

using Layer = std::vector<PackedCell>;  // the one or two directions
using Stack = std::vector<Layer>;

// b_ih and b_hh as the kernels take them: PackedCell::bias and product_bias. Any of these tensors
// may be undefined.
std::pair<at::Tensor, at::Tensor> merged_biases(const CellSpec& spec, const at::Tensor& b_ih,
                                                const at::Tensor& b_hh, int64_t depth = 1);

// The memory of one cell during a call.
template <typename T>
struct CellState {
  const T* h0;  // [B, P]
  T* c;         // [B, H]  in: c_0; out: c_n; nullptr for a cell without c
  T* h_n;       // [B, P]  may be h0
  T* inputs;    // [N, G H] memory for the projected inputs; without w_ih they are there already;
                // nullptr: the walk has memory for a chunk of them
  T* gates;     // [N, gates kept * H] may be `inputs`; nullptr when not training
  T* saved;     // [N, states kept * H]; nullptr when not training
  const T* masks = nullptr;  // [2, B, H] of a deep cell: of states, of candidates; nullptr: none
};

// x [N, I] -> y [N, sum of the last layer's P]. states by layer and direction.
template <typename T>
void run_stack(const Stack& stack, const Sequence& sequence, const T* x,
               const std::vector<CellState<T>>& states, T* y);

// The memory of one cell's gradient: what the forward saved, what is given, and what is asked for.
template <typename T>
struct CellGradient {
  const T *h0, *c0;        // [B, P], [B, H]
  const T* y;              // [N, P]
  const T *gates, *saved;  // as in CellState
  const T *dy, *dh_n;      // [N, P], [B, P]
  T* dh0;                  // [B, P]  nullptr where it is not needed
  // [B, H]  The gradient that goes from step to step without a product. A cell with c: of c_n in,
  // of c_0 out. A cell that carries h: of h_n in, of h_0 out, and dh0 is this. Others: nullptr.
  T* carried;
  const T* masks = nullptr;  // as in CellState
};

// Whether a state is zero, as at the beginning of a sequence. Its product with a finite matrix is
// left out.
template <typename T>
bool all_zero(const T* state, int64_t count) {
  return std::all_of(state, state + count, [](T value) { return value == 0; });
}

// What the backward walk leaves of some steps, n = steps.rows.
template <typename T>
struct StepGradients {
  StepRange steps;
  T* dinputs;      // [n, G H] gradient of the inputs
  T* dproducts;    // [n, D G H] gradient of the recurrent products. It is dinputs for most cells;
                   // the first G H columns of a deep cell's are its dinputs
  int64_t stride;  // of both, from row to row
  T* outputs;      // [n, P]  gradient of the projected output; with a projection only
  T* h_prev;       // [D, n, P]  the states that each product multiplied; nullptr: not needed
  T* masked;       // [B, H]  of a deep cell, for its own use
};

// The backward walk of a cell, last step first, in chunks of some 1000 rows. The results of a
// chunk are used while they are in the cache, and a longer sequence takes no more memory for them.
// cell: w_hh packed as [G H, P] (D of them), w_hr as [P, H]; its w_ih and biases are not used.
template <typename T>
class Backward {
 public:
  using Use = std::function<void(const StepGradients<T>&, bool accumulate)>;

  Backward(const PackedCell& cell, const Sequence& sequence, bool need_h_prev);

  int64_t most_rows() const { return most_rows_; }  // of a chunk
  void lay_out(Arena& arena);
  // Calls use(gradients, accumulate) for each chunk; accumulate is false for the first one.
  void run(const CellGradient<T>& gradient, const Use& use) const;

 private:
  const PackedCell& cell_;
  const Sequence& sequence_;
  bool need_h_prev_;
  Vector<std::pair<int64_t, int64_t>> chunks_;  // [first, last) of the steps taken
  int64_t most_rows_ = 0, scratch_bytes_ = 0;
  char* scratch_ = nullptr;  // of each thread, scratch_bytes_
  T *dinputs_[2] = {}, *dproducts_[2] = {}, *outputs_ = nullptr, *h_prev_ = nullptr,
    *masked_ = nullptr;
};

}  // namespace iss
