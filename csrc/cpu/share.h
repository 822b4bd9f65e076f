// SPDX-License-Identifier: Apache-2.0
// What one thread does of a call: some rows of the batch, or some units of every cell.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels/table.h"
#include "cpu/plan.h"
#include "cpu/team.h"
#include "sequence.h"

namespace iss {

// How the threads that torch has now divide a call.
// sizes(): a range of CellSize, by layer and direction.
template <typename T, typename Sizes>
Plan plan_call(const Sizes& sizes, int64_t directions, const Sequence& sequence, bool backward) {
  if (available_threads() == 1) return {Split::kRows, 1, "torch has one thread"};
  const auto cells = sizes();
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  const PlanProblem problem{.cells = cells,
                            .directions = directions,
                            .steps = sequence.steps,
                            .batch = sequence.batch,
                            .rows = sequence.rows,
                            .backward = backward,
                            .lanes = kernels.lanes,
                            .tile_rows = kernels.tile_rows};
  const int64_t by_work = threads_for(problem.multiplies());
  return plan_threads(problem, by_work, by_work == 1 ? 1 : free_threads(Clock::now()));
}

// A share: rows [begin, end) of the batch, and of each matrix the panels of member `member`. The
// team had `all` members at the start.
struct Share {
  int64_t begin, end;
  int64_t member = 0, all = 1;
  Team* team = nullptr;  // nullptr for a thread that waits for nobody

  int64_t members() const { return team == nullptr ? 1 : team->members(all); }

  // This member's panels of so many. They stay the same until the next meeting.
  PanelRange of(int64_t panels, bool backwards = false) const {
    const int64_t parts = members();
    if (parts == 1) return {0, panels, backwards};
    return {panels * member / parts, panels * (member + 1) / parts, backwards};
  }

  // Waits for the other members. False if this member has left the team; then it stops.
  bool meet() const {
    if (team != nullptr) team->meet(all);
    return member < members();
  }
};

// Split::kRows: calls body(share, thread) for each thread. The rows of the batch are divided so
// that every thread has the same number of rows of `steps`, summed over these steps.
template <typename Body>
void each_share_of_rows(const Sequence& sequence, const StepRange& steps, int64_t threads,
                        const Body& body) {
  if (threads == 1) return body(Share{0, sequence.batch}, 0);
  std::vector<int64_t> ends(threads, sequence.batch);
  int64_t row_end = steps.end, before = 0;  // the end of row b; the steps of all rows up to it
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
