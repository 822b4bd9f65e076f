// SPDX-License-Identifier: Apache-2.0
// Which rows of the [N, ...] buffers belong to which step, and which of them begin anew there. A
// padded batch is a packed one whose steps all have B rows: there is one path for both.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "memory.h"

namespace iss {

// Steps that follow each other, begin <= t < end, and their rows.
struct StepRange {
  int64_t begin = 0, end = 0, first_row = 0, rows = 0;
};

struct Sequence {
  int64_t steps, batch, rows;
  Vector<int64_t> sizes, offsets;  // per step: how many rows of the batch still run; first row
  const bool* resets = nullptr;    // [N] rows whose state is zero before their step; nullptr: none

  Sequence(Vector<int64_t> rows_by_step, int64_t batch)
      : steps(static_cast<int64_t>(rows_by_step.size())),
        batch(batch),
        rows(0),
        sizes(std::move(rows_by_step)) {
    offsets.reserve(sizes.size());
    for (const int64_t size : sizes) {
      offsets.push_back(rows);
      rows += size;
    }
  }

  // The k-th step taken.
  int64_t step(int64_t k, bool reverse) const { return reverse ? steps - 1 - k : k; }

  // Of the k-th steps taken, first <= k < last.
  StepRange steps_taken(int64_t first, int64_t last, bool reverse) const {
    if (first == last) return {};
    const int64_t begin = std::min(step(first, reverse), step(last - 1, reverse));
    const int64_t end = begin + last - first;
    return {begin, end, offsets[begin], offsets[end - 1] + sizes[end - 1] - offsets[begin]};
  }

  // The rows [begin, end) of the batch at the k-th step taken, in at most two pieces: those that
  // come from the step before (previous: their row there) and those that start here (previous: -1).
  // visit(batch_row, rows, row, previous)
  template <typename Visit>
  void each_piece(int64_t k, bool reverse, int64_t begin, int64_t end, const Visit& visit) const {
    const int64_t now = step(k, reverse), before = k > 0 ? step(k - 1, reverse) : -1;
    end = std::min(end, sizes[now]);
    const int64_t middle =
        before < 0 ? begin : std::clamp(sizes[before], begin, std::max(begin, end));
    if (begin < middle) visit(begin, middle - begin, offsets[now] + begin, offsets[before] + begin);
    if (middle < end) visit(middle, end - middle, offsets[now] + middle, int64_t{-1});
  }

  // Of the rows that each_piece visits, those whose state is zero before this step, in the order of
  // the walk: a reverse one is cut between steps t and t - 1 where `resets` has step t. nullptr:
  // none.
  const bool* resets_before(int64_t row, int64_t previous, bool reverse) const {
    if (resets == nullptr || (reverse && previous < 0)) return nullptr;
    return resets + (reverse ? previous : row);
  }

  // The same before the step that follows the k-th, for row b of the batch and those after it.
  const bool* resets_after(int64_t k, bool reverse, int64_t b) const {
    if (resets == nullptr || k + 1 == steps) return nullptr;
    return resets + offsets[step(reverse ? k : k + 1, reverse)] + b;
  }

  // The row of the last step that batch row b takes; -1 if there is none.
  int64_t last_row(int64_t b, bool reverse) const {
    for (int64_t k = steps - 1; k >= 0; --k)
      if (b < sizes[step(k, reverse)]) return offsets[step(k, reverse)] + b;
    return -1;
  }
};

}  // namespace iss
