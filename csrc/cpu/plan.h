// SPDX-License-Identifier: Apache-2.0
// How threads divide the work of a stack, forward and backward.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/kernels/table.h"
#include "cpu/recurrence.h"
#include "cpu/team.h"

namespace iss {

// Multiplies that take about 0.5 us: what it costs to meet at a barrier, and then some.
inline constexpr int64_t kWorthABarrier = 1 << 14;
// Weights that stay in a core's L2 cache from step to step.
inline constexpr int64_t kCachedWeights = 1 << 17;
// Rows that take longer to multiply than the weights take to come from beyond that cache.
inline constexpr int64_t kManyRows = 16;
// Rows that are worth a thread of their own where all weights stay in its cache: the fewest of
// which a tile is more than half as fast as a tall one.
inline constexpr int64_t kFewRows = 2;
// What a division by units may cost, which reads each weight once, over one by rows.
inline constexpr double kUneven = 1.15;

// How the threads divide the work.
enum class Split {
  kRows,        // each takes rows of the batch through all layers and steps; nobody waits
  kUnits,       // each takes units of every cell; they meet after each step
  kDirections,  // half of them take the forward cells, half the backward ones, each by units
  kLayers,      // each takes layers, and follows the one below from chunk to chunk
};

struct Plan {
  Split split;
  int64_t threads;
};

inline int64_t multiplies(const Cell& cell) {  // per row: of the step, without the projected inputs
  const int64_t projection = cell.w_hr.panels.defined() ? cell.hidden * cell.output : 0;
  return 4 * cell.hidden * cell.output + projection;
}

// gates: the panels of a unit's four gates are what is divided, as in forward.
template <typename T>
Plan plan(const Stack& stack, const Sequence& sequence, bool gates) {
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  if (available_threads() == 1) return {Split::kRows, 1};
  int64_t per_row = 0, narrowest = INT64_MAX, widest = 0, panels = INT64_MAX, cells = 0;
  for (const Layer& layer : stack)
    for (const Cell& cell : layer) {
      per_row += 4 * cell.hidden * cell.input + multiplies(cell);
      narrowest = std::min(narrowest, multiplies(cell));
      widest = std::max(widest, 4 * cell.hidden * cell.output);
      panels = std::min(panels, kernels.panels(cell.hidden, gates));
      ++cells;
    }
  const int64_t by_work = threads_for(sequence.rows * per_row);
  if (by_work <= 1) return {Split::kRows, 1};
  const int64_t threads = free_threads(Clock::now());
  const int64_t tile = kernels.tile_rows;
  const int64_t rows_per_step = sequence.rows / std::max<int64_t>(1, sequence.steps);
  const int64_t by_step = rows_per_step * narrowest / kWorthABarrier;
  const int64_t members = std::max<int64_t>(1, std::min({by_work, panels, by_step}));
  const bool both_directions = stack[0].size() == 2;
  // What the one with most units has to do, as a multiple of its share.
  double uneven = 1;
  for (const Layer& layer : stack)
    for (const Cell& cell : layer) {
      const int64_t all = kernels.panels(cell.hidden, gates),
                    width = (gates ? 1 : 4) * kernels.lanes;
      const int64_t most = std::min((all + members - 1) / members * width, cell.hidden);
      uneven = std::max(uneven, static_cast<double>(most * members) / cell.hidden);
    }
  // Rows that fill the register tile of every thread are best divided, unless they are few and each
  // thread would then read weights again in every step that its cache cannot hold.
  if (sequence.batch >= threads * tile &&
      (widest <= kCachedWeights || sequence.batch >= threads * kManyRows || uneven > kUneven ||
       both_directions || members < threads))
    return {Split::kRows, by_work};
  if (both_directions) {
    // An odd thread would leave one direction slower, and the other waiting.
    const int64_t even = std::min(by_work, std::max<int64_t>(2, 2 * by_step)) / 2 * 2;
    return {Split::kDirections, std::min(even, 2 * panels)};
  }
  if (members > 1) return {Split::kUnits, members};
  if (cells > 1 && sequence.steps > 1) return {Split::kLayers, std::min(by_work, cells)};
  const int64_t worth_a_thread = per_row <= kCachedWeights ? kFewRows : tile;
  return {Split::kRows, std::clamp<int64_t>(sequence.batch / worth_a_thread, 1, by_work)};
}

// What one thread does: rows [begin, end) of the batch, and what falls to member `member` of the
// team that divides the units, of `all` members at first.
struct Share {
  int64_t begin, end;
  int64_t member = 0, all = 1;
  Team* team = nullptr;  // of a thread that waits for nobody: none

  int64_t members() const { return team == nullptr ? 1 : team->members(all); }

  // This member's part of so many panels: the same one until the next meeting.
  PanelRange of(int64_t panels, bool backwards = false) const {
    const int64_t parts = members();
    return {panels * member / parts, panels * (member + 1) / parts, backwards};
  }

  // Waits for the other members. False where this one has left the team: then it stops.
  bool meet() const {
    if (team != nullptr) team->meet(all);
    return member < members();
  }
};

// Calls body(share, thread) for each thread's rows of the batch, chosen so that all threads have as
// many steps of a row to do, of those `steps`: Split::kRows.
template <typename Body>
void each_share_of_rows(const Sequence& sequence, const StepRange& steps, int64_t threads,
                        const Body& body) {
  if (threads == 1) return body(Share{0, sequence.batch}, 0);
  std::vector<int64_t> ends(threads, sequence.batch);
  int64_t row_end = steps.end, before = 0;  // of row b; the steps of all rows up to it
  for (int64_t b = 0, thread = 0; b < sequence.batch; ++b) {
    while (row_end > steps.begin && sequence.sizes[row_end - 1] <= b) --row_end;
    before += row_end - steps.begin;
    while (thread + 1 < threads && before * threads >= steps.rows * (thread + 1))
      ends[thread++] = b + 1;
  }
  together(threads, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      const int64_t first = thread == 0 ? 0 : ends[thread - 1];
      if (first < ends[thread]) body(Share{first, ends[thread]}, thread);
    }
  });
}

}  // namespace iss
