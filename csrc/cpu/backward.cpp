// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <cstring>

#include "cpu/plan.h"
#include "cpu/stack.h"

namespace iss {
namespace {

// All steps of a share, last first. A step's dy is complete when the product with the gates of the
// step that follows has been added to it; then the cell's own gradient follows from it.
template <typename T, typename Barrier>
void walk_back(const Cell& cell, const Sequence& sequence, const CellGradient<T>& gradient,
               const Share<Barrier>& share) {
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  const int64_t hidden = cell.hidden, output = cell.output, steps = sequence.steps;
  const bool projected = cell.w_hr.panels.defined();
  const PanelRange outputs = share.of(kernels.panels(output, false));

  // to [rows, P] = or += dgates of `rows` rows from `from` @ w_hh.
  const auto through_w_hh = [&](int64_t from, int64_t rows, bool accumulate, T* to) {
    kernels.matmul({.rows = rows,
                    .k = 4 * hidden,
                    .columns = output,
                    .panels = outputs,
                    .a = gradient.dgates + from * 4 * hidden,
                    .a_stride = 4 * hidden,
                    .b = cell.w_hh.view(),
                    .bias = nullptr,
                    .accumulate = accumulate,
                    .out = to,
                    .out_stride = output,
                    .scratch = nullptr});
  };
  for (int64_t k = steps - 1; k >= 0; --k) {
    // The rows of the batch that go on to the step after this one, and where they are there.
    const int64_t after = k + 1 < steps ? sequence.step(k + 1, cell.reverse) : -1;
    const int64_t going_on = after < 0 ? 0 : sequence.sizes[after];
    if (projected) {
      const int64_t now = sequence.step(k, cell.reverse);
      const int64_t end = std::min({share.end, sequence.sizes[now], going_on});
      if (share.begin < end)
        through_w_hh(sequence.offsets[after] + share.begin, end - share.begin, true,
                     gradient.dy + (sequence.offsets[now] + share.begin) * output);
      share.barrier();
    }
    sequence.each_piece(
        k, cell.reverse, share.begin, share.end,
        [&](int64_t first, int64_t count, int64_t first_row, int64_t previous) {
          const auto step = [&](int64_t b, int64_t rows, bool goes_on) {
            const int64_t row = first_row + b - first;
            const bool product = projected || goes_on;
            kernels.lstm_step_backward(
                {.rows = rows,
                 .hidden = hidden,
                 .k = projected ? output
                      : goes_on ? 4 * hidden
                                : 0,
                 .panels = share.of(kernels.panels(hidden, false), k % 2 == 1),
                 .a = projected ? gradient.dy + row * output
                      : goes_on ? gradient.dgates + (sequence.offsets[after] + b) * 4 * hidden
                                : gradient.dgates,
                 .a_stride = projected ? output : 4 * hidden,
                 .b = product ? (projected ? cell.w_hr : cell.w_hh).view() : Packed{},
                 .dy = projected ? nullptr : gradient.dy + row * output,
                 .gates = gradient.gates + row * 4 * hidden,
                 .cells = gradient.cells + row * hidden,
                 .c_prev = previous < 0 ? gradient.c0 + b * hidden
                                        : gradient.cells + (previous + b - first) * hidden,
                 .dc = gradient.dc + b * hidden,
                 .dgates = gradient.dgates + row * 4 * hidden});
          };
          const int64_t middle = std::clamp(going_on, first, first + count);
          if (first < middle) step(first, middle - first, true);
          if (middle < first + count) step(middle, first + count - middle, false);
        });
    share.barrier();
  }
  for (int64_t k = 0; k < steps; ++k)
    sequence.each_piece(
        k, cell.reverse, share.begin, share.end,
        [&](int64_t b, int64_t rows, int64_t row, int64_t previous) {
          if (previous < 0 && gradient.need_dh0)
            through_w_hh(row, rows, false, gradient.dh + b * output);
          if (k % share.members == share.member)
            std::memcpy(gradient.h_prev + row * output,
                        previous < 0 ? gradient.h0 + b * output : gradient.y + previous * output,
                        rows * output * sizeof(T));
        });
}

}  // namespace

template <typename T>
void run_backward(const Cell& cell, const Sequence& sequence, const CellGradient<T>& gradient) {
  const int64_t output = cell.output;
  for (int64_t b = 0; b < sequence.batch; ++b) {
    const int64_t last = sequence.last_row(b, cell.reverse);
    for (int64_t e = 0; last >= 0 && e < output; ++e)
      gradient.dy[last * output + e] += gradient.dh[b * output + e];
  }
  const auto [split, threads] = plan<T>({{cell}}, sequence, false);
  if (split == Split::kRows)
    each_share_of_rows(sequence, threads, [&](const auto& share, int64_t) {
      walk_back(cell, sequence, gradient, share);
    });
  else  // one cell: its units
    run_team(threads, [&](int64_t member, int64_t members, const auto& barrier) {
      walk_back(cell, sequence, gradient,
                Share<decltype(barrier)>{0, sequence.batch, member, members, barrier});
    });
}

template void run_backward<float>(const Cell&, const Sequence&, const CellGradient<float>&);
template void run_backward<double>(const Cell&, const Sequence&, const CellGradient<double>&);

}  // namespace iss
