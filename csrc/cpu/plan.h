// SPDX-License-Identifier: Apache-2.0
// How threads divide a call, forward and backward. The plan follows from numbers alone, so it can
// be tested and explained without a tensor (iss_kernels.explain_plan).
#pragma once

#include <cstdint>
#include <span>

namespace iss {

enum class Split {
  kRows,        // each thread takes rows of the batch through all layers and steps; nobody waits
  kUnits,       // each thread takes units of every cell; they meet after each step
  kDirections,  // half of the threads take the forward cells, half the backward ones, by units
  kLayers,      // a thread takes the next chunk of any layer whose input is there
};

struct Plan {
  Split split;
  int64_t threads;
  const char* why;
};

struct CellSize {
  int64_t gates, input, hidden, output;  // G, I, H, P
  bool projected;
  int64_t depth = 1;   // D, micro-steps of a step
  bool tiles = false;  // whether w_hh is multiplied by a tile unit

  // Per row and micro-step: without the projected inputs. Per row and step: with them.
  int64_t multiplies() const { return gates * hidden * output + (projected ? hidden * output : 0); }
  int64_t all_multiplies() const { return gates * hidden * input + depth * multiplies(); }
  int64_t weights() const { return depth * gates * hidden * output; }  // of w_hh
};

struct PlanProblem {
  std::span<const CellSize> cells;  // by layer and direction
  int64_t directions;
  int64_t steps, batch, rows;  // rows: of all steps
  bool backward;
  int64_t lanes, tile_rows;  // of the kernels (cpu/kernels/table.h)

  int64_t multiplies() const;  // of the whole call
  // The units of a panel; threads divide panels.
  int64_t panel_units(const CellSize& cell) const;
  int64_t panels(const CellSize& cell) const {
    return (cell.hidden + panel_units(cell) - 1) / panel_units(cell);
  }
};

// by_work: how many threads the work is worth. threads: how many are free, at least by_work.
Plan plan_threads(const PlanProblem& problem, int64_t by_work, int64_t threads);

}  // namespace iss
