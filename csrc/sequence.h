// SPDX-License-Identifier: Apache-2.0
// Which rows of the [N, ...] buffers belong to which step, and where the state of a row is reset. A
// padded batch is a packed sequence whose steps all have B rows, so there is one path for both.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "memory.h"

namespace iss {

// Consecutive steps, begin <= t < end, and their rows.
struct StepRange {
  int64_t begin = 0, end = 0, first_row = 0, rows = 0;
};

struct Sequence {
  int64_t steps, batch, rows;
  Vector<int64_t> sizes, offsets;  // by step: the number of rows that still run; the first row
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

  // The time t of the k-th step of the walk.
  int64_t step(int64_t k, bool reverse) const { return reverse ? steps - 1 - k : k; }

  // The k-th steps of the walk, first <= k < last.
  StepRange steps_taken(int64_t first, int64_t last, bool reverse) const {
    if (first == last) return {};
    const int64_t begin = std::min(step(first, reverse), step(last - 1, reverse));
    const int64_t end = begin + last - first;
    return {begin, end, offsets[begin], offsets[end - 1] + sizes[end - 1] - offsets[begin]};
  }

  // Calls visit(batch_row, rows, row, previous) for the rows [begin, end) of the batch that run at
  // the k-th step of the walk, in at most two pieces: rows that come from the step before
  // (previous: their row there), and rows that start here (previous: -1).
  template <typename Visit>
  void each_piece(int64_t k, bool reverse, int64_t begin, int64_t end, const Visit& visit) const {
    const int64_t now = step(k, reverse), before = k > 0 ? step(k - 1, reverse) : -1;
    end = std::min(end, sizes[now]);
    const int64_t middle =
        before < 0 ? begin : std::clamp(sizes[before], begin, std::max(begin, end));
    if (begin < middle) visit(begin, middle - begin, offsets[now] + begin, offsets[before] + begin);
    if (middle < end) visit(middle, end - middle, offsets[now] + middle, int64_t{-1});
  }

  // For the rows of a piece: whether the state is zero before this step of the walk; nullptr: no
  // resets. A reset at step t cuts between t - 1 and t, so in a reverse walk before step t - 1.
  const bool* resets_before(int64_t row, int64_t previous, bool reverse) const {
    if (resets == nullptr || (reverse && previous < 0)) return nullptr;
    return resets + (reverse ? previous : row);
  }

  // The same for the step that follows the k-th, from row b of the batch on.
  const bool* resets_after(int64_t k, bool reverse, int64_t b) const {
    if (resets == nullptr || k + 1 == steps) return nullptr;
    return resets + offsets[step(reverse ? k : k + 1, reverse)] + b;
  }

  // The row of the last step of batch row b; -1 if it has none.
  int64_t last_row(int64_t b, bool reverse) const {
    for (int64_t k = steps - 1; k >= 0; --k)
      if (b < sizes[step(k, reverse)]) return offsets[step(k, reverse)] + b;
    return -1;
  }
};

}  // namespace iss
