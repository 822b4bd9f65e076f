// SPDX-License-Identifier: Apache-2.0
// The registry of cells, for host code: what differs between them in numbers. Their equations are
// in cells/*-inl.h, their shapes in iss_kernels/cells.py, which a test compares with this.
#pragma once

#include <cstdint>
#include <string_view>

namespace iss {

enum class CellKind { kLstm, kGru, kRnnTanh, kRnnRelu, kRhn, kRhnCarry };
inline constexpr int kCellKinds = 6;

struct CellSpec {
  std::string_view name;
  CellKind kind;
  int gates;        // G: rows of w_ih and of each w_hh for one unit
  bool has_c;       // a state c [B, H] beside h
  int saved_gates;  // what the forward keeps for the gradient: see gates_kept, states_kept
  int saved_states;
  bool projects;    // may have a w_hr [P, H]
  bool deep;        // w_hh and b_hh hold the micro-steps of a step, one below the other
  bool bias_parts;  // b_ih and b_hh have gradients of their own
  bool carries_h;   // a part of the gradient of h goes to the step before without a product

  // For the gradient the forward keeps [N, gates_kept * H] and [N, states_kept * H]; of a deep cell
  // the gates of each of D micro-steps, and the states between them.
  int64_t gates_kept(int64_t depth) const { return saved_gates * depth; }
  int64_t states_kept(int64_t depth) const { return saved_states * (deep ? depth - 1 : 1); }
};

inline constexpr CellSpec kCells[kCellKinds] = {
    {"lstm", CellKind::kLstm, 4, true, 4, 1, true, false, false, false},
    {"gru", CellKind::kGru, 3, false, 3, 1, false, false, true, true},
    {"rnn_tanh", CellKind::kRnnTanh, 1, false, 0, 0, false, false, false, false},
    {"rnn_relu", CellKind::kRnnRelu, 1, false, 0, 0, false, false, false, false},
    {"rhn", CellKind::kRhn, 2, false, 2, 1, false, true, true, true},
    {"rhn_carry", CellKind::kRhnCarry, 3, false, 3, 1, false, true, true, true},
};

// nullptr for a name that is none of them.
inline const CellSpec* find_cell(std::string_view name) {
  for (const CellSpec& cell : kCells)
    if (cell.name == name) return &cell;
  return nullptr;
}

}  // namespace iss
