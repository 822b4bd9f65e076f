// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <cstring>

#include "cpu/plan.h"
#include "cpu/weight_gradients.h"
#include "cpu/recurrence.h"

namespace iss {
namespace {

// Steps [first, last) of a share, last first. A step's dy is complete when the product with the
// gates of the step that follows has been added to it; then the cell's own gradient follows from
// it.
template <typename T>
void walk_back(const Cell& cell, const Sequence& sequence, int64_t first, int64_t last,
               const CellGradient<T>& gradient, const T* dgates_after,
               const StepGradients<T>& result, const Share& share) {
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  const int64_t hidden = cell.hidden, output = cell.output;
  const bool projected = cell.w_hr.panels.defined();
  const int64_t first_row = result.steps.first_row;

  // to [rows, P] = or += dgates of `rows` rows @ w_hh.
  const auto through_w_hh = [&](const T* dgates, int64_t rows, bool accumulate, T* to) {
    kernels.matmul({.rows = rows,
                    .k = 4 * hidden,
                    .columns = output,
                    .panels = share.of(kernels.panels(output, false)),
                    .a = dgates,
                    .a_stride = 4 * hidden,
                    .b = cell.w_hh.view(),
                    .bias = nullptr,
                    .accumulate = accumulate,
                    .out = to,
                    .out_stride = output,
                    .scratch = nullptr});
  };
  const auto dgates_of = [&](int64_t row) {
    return result.dgates + (row - first_row) * 4 * hidden;
  };
  for (int64_t k = last - 1; k >= first; --k) {
    // The rows of the batch that go on to the step after this one, and their dgates there.
    const int64_t now = sequence.step(k, cell.reverse), row_now = sequence.offsets[now];
    const int64_t after = k + 1 < sequence.steps ? sequence.step(k + 1, cell.reverse) : -1;
    const int64_t going_on = after < 0 ? 0 : sequence.sizes[after];
    const T* const of_next = after < 0       ? nullptr
                             : k + 1 == last ? dgates_after
                                             : dgates_of(sequence.offsets[after]);
    T* const of_outputs = projected ? result.outputs + (row_now - first_row) * output : nullptr;
    if (projected) {
      const int64_t end = std::min(share.end, sequence.sizes[now]);
      const PanelRange outputs = share.of(kernels.panels(output, false));
      const int64_t column = outputs.begin * kernels.panel_columns();
      const int64_t columns = std::min(outputs.end * kernels.panel_columns(), output) - column;
      for (int64_t b = share.begin; b < end; ++b) {
        const T* const dy = gradient.dy + (row_now + b) * output + column;
        const T* const dh_n = gradient.dh_n + b * output + column;
        for (int64_t e = 0; e < columns; ++e)
          of_outputs[b * output + column + e] = b < going_on ? dy[e] : dy[e] + dh_n[e];
      }
      const int64_t rows = std::min(end, going_on) - share.begin;
      if (rows > 0)
        through_w_hh(of_next + share.begin * 4 * hidden, rows, true,
                     of_outputs + share.begin * output);
      if (!share.meet()) return;
    }
    sequence.each_piece(
        k, cell.reverse, share.begin, share.end,
        [&](int64_t begin, int64_t count, int64_t row_of_begin, int64_t previous) {
          const auto step = [&](int64_t b, int64_t rows, bool goes_on) {
            const int64_t row = row_of_begin + b - begin;
            const bool product = projected || goes_on;
            kernels.lstm_step_backward(
                {.rows = rows,
                 .hidden = hidden,
                 .k = projected ? output
                      : goes_on ? 4 * hidden
                                : 0,
                 .panels = share.of(kernels.panels(hidden, false), k % 2 == 1),
                 .a = projected ? of_outputs + b * output
                      : goes_on ? of_next + b * 4 * hidden
                                : dgates_of(row),
                 .a_stride = projected ? output : 4 * hidden,
                 .b = product ? (projected ? cell.w_hr : cell.w_hh).view() : Packed{},
                 .dy = projected ? nullptr : gradient.dy + row * output,
                 .dh_n = product ? nullptr : gradient.dh_n + b * output,
                 .gates = gradient.gates + row * 4 * hidden,
                 .cells = gradient.cells + row * hidden,
                 .c_prev = previous < 0 ? gradient.c0 + b * hidden
                                        : gradient.cells + (previous + b - begin) * hidden,
                 .dc = gradient.dc + b * hidden,
                 .dgates = dgates_of(row)});
          };
          const int64_t middle = std::clamp(going_on, begin, begin + count);
          if (begin < middle) step(begin, middle - begin, true);
          if (middle < begin + count) step(middle, begin + count - middle, false);
        });
    if (!share.meet()) return;
  }
  for (int64_t k = first; k < last; ++k)
    sequence.each_piece(
        k, cell.reverse, share.begin, share.end,
        [&](int64_t b, int64_t rows, int64_t row, int64_t previous) {
          if (previous < 0 && gradient.dh0 != nullptr)
            through_w_hh(dgates_of(row), rows, false, gradient.dh0 + b * output);
          if (result.h_prev != nullptr && k % share.members() == share.member)
            std::memcpy(result.h_prev + (row - first_row) * output,
                        previous < 0 ? gradient.h0 + b * output : gradient.y + previous * output,
                        rows * output * sizeof(T));
        });
}

}  // namespace

template <typename T>
Backward<T>::Backward(const Cell& cell, const Sequence& sequence, bool need_h_prev)
    : cell_(cell), sequence_(sequence), need_h_prev_(need_h_prev) {
  const int64_t pieces = std::max<int64_t>(1, (sequence.rows + kTerms - 1) / kTerms);
  for (int64_t last = sequence.steps, first; last > 0; last = first) {
    int64_t rows = 0;  // as many in each piece, but no more than kTerms; at least one step
    const auto fits = [&](int64_t k) {
      return rows * pieces < sequence.rows &&
             rows + sequence.sizes[sequence.step(k, cell.reverse)] <= kTerms;
    };
    for (first = last; first > 0 && (first == last || fits(first - 1)); --first)
      rows += sequence.sizes[sequence.step(first - 1, cell.reverse)];
    pieces_.emplace_back(first, last);
    most_rows_ = std::max(most_rows_, rows);
  }
}

template <typename T>
void Backward<T>::lay_out(Arena& arena) {
  const int64_t gates = most_rows_ * 4 * cell_.hidden, outputs = most_rows_ * cell_.output;
  dgates_[0] = arena.take<T>(gates);
  dgates_[1] = arena.take<T>(pieces_.size() > 1 ? gates : 0);
  outputs_ = arena.take<T>(cell_.w_hr.panels.defined() ? outputs : 0);
  h_prev_ = need_h_prev_ ? arena.take<T>(outputs) : nullptr;
}

template <typename T>
void Backward<T>::run(const CellGradient<T>& gradient, const Use& use) const {
  const Call call;
  const auto [split, most_threads] = plan<T>({{cell_}}, sequence_, false);
  const T* dgates_after = nullptr;
  for (size_t i = 0; i < pieces_.size(); ++i) {
    const auto [first, last] = pieces_[i];
    const StepGradients<T> result{.steps = sequence_.steps_taken(first, last, cell_.reverse),
                                  .dgates = dgates_[i % 2],
                                  .outputs = outputs_,
                                  .h_prev = h_prev_};
    const auto walk = [&, first, last](const Share& share) {
      walk_back(cell_, sequence_, first, last, gradient, dgates_after, result, share);
    };
    // One of them may have come late in the piece before.
    const int64_t threads = most_threads == 1 || i == 0
                                ? most_threads
                                : std::min(most_threads, free_threads(Clock::now()));
    if (split == Split::kRows) {
      each_share_of_rows(sequence_, result.steps, threads,
                         [&](const Share& share, int64_t) { walk(share); });
    } else {  // one cell: its units
      Team team;
      run_team(threads, [&](int64_t member, int64_t members) {
        walk({0, sequence_.batch, member, members, &team});
      });
    }
    use(result, i > 0);
    const int64_t row = sequence_.offsets[sequence_.step(first, cell_.reverse)];
    dgates_after = result.dgates + (row - result.steps.first_row) * 4 * cell_.hidden;
  }
}

template class Backward<float>;
template class Backward<double>;

}  // namespace iss
