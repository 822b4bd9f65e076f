// SPDX-License-Identifier: Apache-2.0
// Layers of LSTM cells with packed weights, run over a sequence by as many threads as they feed:
// what lstm_forward (one cell), prepared models and streams (whole stacks) have in common.
#pragma once

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "memory.h"
#include "cpu/packed.h"
#include "sequence.h"

namespace iss {

// Rows of a product that are worked on together: few enough that they stay in the cache while the
// panels pass by; a multiple of every tile.
inline constexpr int64_t kBlockRows = 66;

// One direction of one layer.
struct Cell {
  int64_t input, hidden, output;  // I, H, P
  bool reverse;
  // w_ih is undefined where CellState::gates holds the projected inputs already, w_hr where there
  // is no projection.
  Matrix w_ih, w_hh, w_hr;
  at::Tensor bias;  // [4H], b_ih + b_hh; undefined without
};

using Layer = std::vector<Cell>;  // the one or two directions
using Stack = std::vector<Layer>;

// The memory of one cell during a call.
template <typename T>
struct CellState {
  const T* h0;  // [B, P]
  T* c;         // [B, H]  in: c_0; out: c_n
  T* h_n;       // [B, P]  may be h0
  T* gates;     // [N, 4H] out: activated; nullptr when not training
  T* cells;     // [N, H]  nullptr when not training
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
  const T *gates, *cells;  // [N, 4H], [N, H]
  const T *dy, *dh_n;      // [N, P], [B, P]
  T* dh0;                  // [B, P]  nullptr where it is not needed
  T* dc;                   // [B, H]  in: gradient of c_n, or of the cells after the steps; out: of
                           // c_0, or of the cells before them
};

// Whether a state is that of a sequence's beginning: its product with finite factors adds nothing,
// and is left out.
template <typename T>
bool all_zero(const T* state, int64_t count) {
  return std::all_of(state, state + count, [](T value) { return value == 0; });
}

// What some steps leave, n = steps.rows.
template <typename T>
struct StepGradients {
  StepRange steps;
  T* dgates;   // [n, 4H] before the activations
  T* outputs;  // [n, P]  gradient of a step's output, as it left the cell; with a projection alone
  T* h_prev;   // [n, P]  the output that each step started from; nullptr where it is not needed
};

// The backward pass of a cell, last step first, in pieces of some hundred rows: what a piece leaves
// is used while it is in the cache, and takes no more memory for a longer sequence.
// cell: w_hh packed as [4H, P], w_hr as [P, H]; its w_ih and bias are not used.
template <typename T>
class Backward {
 public:
  using Use = std::function<void(const StepGradients<T>&, bool accumulate)>;

  Backward(const Cell& cell, const Sequence& sequence, bool need_h_prev);

  int64_t most_rows() const { return most_rows_; }  // of a piece
  void lay_out(Arena& arena);
  // Calls use(what it leaves, whether others came before) for each piece.
  void run(const CellGradient<T>& gradient, const Use& use) const;

 private:
  const Cell& cell_;
  const Sequence& sequence_;
  bool need_h_prev_;
  Vector<std::pair<int64_t, int64_t>> pieces_;  // [first, last) of the steps taken
  int64_t most_rows_ = 0;
  T *dgates_[2] = {}, *outputs_ = nullptr, *h_prev_ = nullptr;
};

}  // namespace iss
