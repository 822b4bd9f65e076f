// SPDX-License-Identifier: Apache-2.0

#include "cpu/plan.h"

#include <algorithm>

#include "cpu/kernels/args.h"

namespace iss {
namespace {

// The least work between two meetings, in multiplies: about 0.5 us, more than a barrier costs. A
// tile unit multiplies faster: it took 64 units of 10 rows, 2^17.3 multiplies, 1.5 times as long on
// two threads as on one, and 256 units, 2^21.3, 0.7 times.
constexpr int64_t kWorthABarrier = 1 << 14, kWorthABarrierInTiles = 1 << 18;
// So many weights stay in a core's L2 cache from step to step.
constexpr int64_t kCachedWeights = 1 << 17;
// With so many rows, multiplying takes longer than reading the weights from beyond that cache.
constexpr int64_t kManyRows = 16;
// The fewest rows that are worth a thread where all weights stay in its cache: a tile of two rows
// is more than half as fast as a tall one.
constexpr int64_t kFewRows = 2;
// A split by units reads each weight once, and may be this much less even than one by rows.
constexpr double kUneven = 1.15;

}  // namespace

int64_t PlanProblem::multiplies() const {
  int64_t per_row = 0;
  for (const CellSize& cell : cells) per_row += cell.all_multiplies();
  return rows * per_row;
}

int64_t PlanProblem::panel_units(const CellSize& cell) const {
  const int gates = backward ? 1 : static_cast<int>(cell.gates);
  return panel_vectors(gates) / gates * lanes;
}

Plan plan_threads(const PlanProblem& problem, int64_t by_work, int64_t threads) {
  if (by_work <= 1) return {Split::kRows, 1, "the work is worth no second thread"};
  int64_t per_row = 0, narrowest = INT64_MAX, widest = 0, panels = INT64_MAX;
  int64_t worth_a_barrier = kWorthABarrier;
  for (const CellSize& cell : problem.cells) {
    per_row += cell.all_multiplies();
    narrowest = std::min(narrowest, cell.multiplies());
    widest = std::max(widest, cell.weights());
    panels = std::min(panels, problem.panels(cell));
    if (cell.tiles) worth_a_barrier = kWorthABarrierInTiles;
  }
  const int64_t cells = static_cast<int64_t>(problem.cells.size());
  const int64_t rows_per_step = problem.rows / std::max<int64_t>(1, problem.steps);
  const int64_t by_step = rows_per_step * narrowest / worth_a_barrier;
  const int64_t members = std::max<int64_t>(1, std::min({by_work, panels, by_step}));
  const bool both_directions = problem.directions == 2;
  // The work of the member with most units, as a multiple of the mean.
  double uneven = 1;
  for (const CellSize& cell : problem.cells) {
    const int64_t each = (problem.panels(cell) + members - 1) / members;
    const int64_t most = std::min(each * problem.panel_units(cell), cell.hidden);
    uneven = std::max(uneven, static_cast<double>(most * members) / cell.hidden);
  }
  // A split by rows is best where the rows fill every thread's tile, unless they are few and the
  // weights exceed the cache: then each thread would read all weights in every step.
  if (problem.batch >= threads * problem.tile_rows) {
    if (widest <= kCachedWeights)
      return {Split::kRows, by_work, "each thread keeps all weights in its cache"};
    if (problem.batch >= threads * kManyRows)
      return {Split::kRows, by_work, "there are rows enough to pay for reading all weights"};
    if (uneven > kUneven || members < threads)
      return {Split::kRows, by_work, "the units do not divide evenly"};
    if (both_directions) return {Split::kRows, by_work, "there are rows enough for all threads"};
  }
  if (both_directions) {
    // With an odd number of threads one direction would be slower, and the other would wait.
    const int64_t even = std::min(by_work, std::max<int64_t>(2, 2 * by_step)) / 2 * 2;
    return {Split::kDirections, std::min(even, 2 * panels), "the two directions are independent"};
  }
  if (members > 1) return {Split::kUnits, members, "each thread reads its own part of the weights"};
  if (cells > 1 && problem.steps > 1)
    return {Split::kLayers, std::min(by_work, cells), "a step is too short to meet after it"};
  const int64_t worth_a_thread = per_row <= kCachedWeights ? kFewRows : problem.tile_rows;
  return {Split::kRows, std::clamp<int64_t>(problem.batch / worth_a_thread, 1, by_work),
          "a step is too short to meet after it"};
}

}  // namespace iss
