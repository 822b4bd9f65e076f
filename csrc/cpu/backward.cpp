// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <utility>

#include "cpu/recurrence.h"
#include "cpu/share.h"
#include "cpu/weight_gradients.h"

namespace iss {
namespace {

// Walks the steps [first, last) of a share, last first, and the micro-steps of each. The gradient
// of a step's output is dy plus the product of w_hh with the gradients of the step that follows;
// the finish of that product computes the cell's own gradients.
template <typename T>
void walk_back(const PackedCell& cell, const Sequence& sequence, int64_t first, int64_t last,
               const CellGradient<T>& gradient, const T* dproducts_after,
               const StepGradients<T>& result, const Share& share, void* scratch) {
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  const auto step_backward = kernels.of(cell.spec->kind).step_backward;
  const int64_t hidden = cell.hidden, output = cell.output, gates = cell.gates();
  const bool projected = cell.w_hr.panels.defined(), has_c = cell.spec->has_c;
  const int64_t first_row = result.steps.first_row, depth = cell.depth, stride = result.stride;
  const int64_t gates_kept = cell.spec->gates_kept(depth) * hidden;
  const int64_t states_kept = cell.spec->states_kept(depth) * hidden;
  const T* const masks = gradient.masks;

  // to [rows, P] = or += dproducts of `rows` rows, of a first micro-step, @ w_hh.
  const auto through_w_hh = [&](const T* dproducts, int64_t rows, bool accumulate, T* to) {
    kernels.matmul({.rows = rows,
                    .k = gates,
                    .columns = output,
                    .panels = share.of(kernels.panels(output)),
                    .a = dproducts,
                    .a_stride = stride,
                    .b = cell.w_hh.view(),
                    .bias = nullptr,
                    .accumulate = accumulate,
                    .out = to,
                    .out_stride = output,
                    .scratch = scratch});
  };
  const auto own_columns = [&] {
    const PanelRange panels = share.of(kernels.panels(output));
    return std::pair{panels.begin * kernels.panel_units(),
                     std::min(panels.end * kernels.panel_units(), output)};
  };
  // Zeroes the share's columns of those of `rows` rows [P] that a reset cuts off.
  const auto clear = [&](const bool* resets, int64_t rows, T* to) {
    const auto [begin, end] = own_columns();
    for (int64_t r = 0; resets != nullptr && r < rows; ++r)
      if (resets[r]) std::fill(to + r * output + begin, to + r * output + end, T(0));
  };
  // to += through * mask, in the share's columns.
  const auto add_masked = [&](const T* mask, const T* through, int64_t rows, T* to) {
    const auto [begin, end] = own_columns();
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t e = r * output + begin; e < r * output + end; ++e) to[e] += through[e] * mask[e];
  };
  const auto dproducts_of = [&](int64_t row, int64_t d = 0) {
    return result.dproducts + (row - first_row) * stride + d * gates;
  };
  // The state that micro-step d of row b of the batch starts from, `row` of all rows, and its
  // stride; previous: the row of the step before, -1 if there is none.
  const auto state_before = [&](int64_t d, int64_t b, int64_t row, int64_t previous) {
    if (d > 0) return std::pair{gradient.saved + row * states_kept + (d - 1) * hidden, states_kept};
    return std::pair{previous < 0 ? gradient.h0 + b * output : gradient.y + previous * output,
                     output};
  };
  for (int64_t k = last - 1; k >= first; --k) {
    // The rows of the batch that go on to the step after this one, and their gradients there.
    const int64_t now = sequence.step(k, cell.reverse), row_now = sequence.offsets[now];
    const int64_t after = k + 1 < sequence.steps ? sequence.step(k + 1, cell.reverse) : -1;
    const int64_t going_on = after < 0 ? 0 : sequence.sizes[after];
    const T* const of_next = after < 0       ? nullptr
                             : k + 1 == last ? dproducts_after
                                             : dproducts_of(sequence.offsets[after]);
    T* const of_outputs = projected ? result.outputs + (row_now - first_row) * output : nullptr;
    if (projected) {
      const int64_t end = std::min(share.end, sequence.sizes[now]);
      const PanelRange outputs = share.of(kernels.panels(output));
      const int64_t column = outputs.begin * kernels.panel_units();
      const int64_t columns = std::min(outputs.end * kernels.panel_units(), output) - column;
      // What comes from the step after, before dy is added to it: a reset stops it.
      const int64_t rows = std::min(end, going_on) - share.begin;
      T* const to = of_outputs + share.begin * output;
      if (rows > 0) {
        through_w_hh(of_next + share.begin * stride, rows, false, to);
        clear(sequence.resets_after(k, cell.reverse, share.begin), rows, to);
      }
      for (int64_t b = share.begin; b < end; ++b) {
        const T* const dy = gradient.dy + (row_now + b) * output + column;
        const T* const dh_n = gradient.dh_n + b * output + column;
        T* const row = of_outputs + b * output + column;
        for (int64_t e = 0; e < columns; ++e)
          row[e] = b < going_on ? row[e] + dy[e] : dy[e] + dh_n[e];
      }
      if (!share.meet()) return;
    }
    for (int64_t d = depth - 1; d >= 0; --d) {
      const bool top = d == depth - 1;
      sequence.each_piece(
          k, cell.reverse, share.begin, share.end,
          [&](int64_t begin, int64_t count, int64_t row_of_begin, int64_t previous) {
            const auto step = [&](int64_t b, int64_t rows, bool goes_on) {
              const int64_t row = row_of_begin + b - begin;
              const int64_t before = previous < 0 ? -1 : previous + b - begin;
              const bool product = projected || !top || goes_on;
              auto [state, state_stride] = state_before(d, b, row, before);
              if (has_c) {
                state = before < 0 ? gradient.c0 + b * hidden : gradient.saved + before * hidden;
                state_stride = hidden;
              }
              step_backward(
                  {.rows = rows,
                   .hidden = hidden,
                   .k = projected ? output
                        : product ? gates
                                  : 0,
                   .panels = share.of(kernels.panels(hidden), (k * depth + d) % 2 == 1),
                   .a = projected ? of_outputs + b * output
                        : !top    ? dproducts_of(row, d + 1)
                        : goes_on ? of_next + b * stride
                                  : dproducts_of(row),
                   .a_stride = projected ? output : stride,
                   .b = !product    ? Packed{}
                        : projected ? cell.w_hr.view()
                                    : cell.w_hh.view(top ? 0 : d + 1),
                   .resets = d > 0 ? nullptr : sequence.resets_before(row, before, cell.reverse),
                   .resets_after = top && goes_on && !projected
                                       ? sequence.resets_after(k, cell.reverse, b)
                                       : nullptr,
                   .dy = projected || !top ? nullptr : gradient.dy + row * output,
                   .dh_n = product || cell.spec->carries_h ? nullptr : gradient.dh_n + b * output,
                   .mask = masks ? masks + (sequence.batch + b) * hidden : nullptr,
                   .state_mask = masks ? masks + b * hidden : nullptr,
                   .gates = gradient.gates + row * gates_kept + d * gates,
                   .gates_stride = stride,
                   .saved = gradient.saved + row * hidden,
                   .before = state,
                   .before_stride = state_stride,
                   .y = gradient.y + row * output,
                   .y_stride = output,
                   .carried = gradient.carried ? gradient.carried + b * hidden : nullptr,
                   .dinputs = result.dinputs + (row - first_row) * stride + d * gates,
                   .dproducts = dproducts_of(row, d),
                   .scratch = scratch});
            };
            const int64_t middle = std::clamp(going_on, begin, begin + count);
            if (begin < middle) step(begin, middle - begin, true);
            if (middle < begin + count) step(middle, begin + count - middle, false);
          });
      if (!share.meet()) return;
    }
  }
  for (int64_t k = first; k < last; ++k)
    sequence.each_piece(
        k, cell.reverse, share.begin, share.end,
        [&](int64_t b, int64_t rows, int64_t row, int64_t previous) {
          const bool* const resets = sequence.resets_before(row, previous, cell.reverse);
          if (previous < 0 && gradient.dh0 != nullptr) {
            T* const to = gradient.dh0 + b * output;
            if (masks) {
              T* const through = result.masked + b * output;
              through_w_hh(dproducts_of(row), rows, false, through);
              add_masked(masks + b * output, through, rows, to);
            } else {
              through_w_hh(dproducts_of(row), rows, cell.spec->carries_h, to);
            }
            clear(resets, rows, to);
          }
          if (result.h_prev == nullptr || k % share.members() != share.member) return;
          for (int64_t d = 0; d < depth; ++d) {
            const auto [from, from_stride] = state_before(d, b, row, previous);
            T* const to = result.h_prev + (d * result.steps.rows + row - first_row) * output;
            for (int64_t r = 0; r < rows; ++r) {
              const T* const state = from + r * from_stride;
              T* const at = to + r * output;
              if (d == 0 && resets != nullptr && resets[r])
                std::fill_n(at, output, T(0));
              else if (masks)
                std::transform(state, state + output, masks + (b + r) * output, at,
                               std::multiplies<T>());
              else
                std::memcpy(at, state, output * sizeof(T));
            }
          }
        });
}

}  // namespace

template <typename T>
Backward<T>::Backward(const PackedCell& cell, const Sequence& sequence, bool need_h_prev)
    : cell_(cell), sequence_(sequence), need_h_prev_(need_h_prev) {
  const int64_t chunks =
      std::max<int64_t>(1, (sequence.rows + kGradientTerms - 1) / kGradientTerms);
  for (int64_t last = sequence.steps, first; last > 0; last = first) {
    int64_t rows = 0;  // chunks of equal size, of at most kGradientTerms rows but at least one step
    const auto fits = [&](int64_t k) {
      return rows * chunks < sequence.rows &&
             rows + sequence.sizes[sequence.step(k, cell.reverse)] <= kGradientTerms;
    };
    for (first = last; first > 0 && (first == last || fits(first - 1)); --first)
      rows += sequence.sizes[sequence.step(first - 1, cell.reverse)];
    chunks_.emplace_back(first, last);
    most_rows_ = std::max(most_rows_, rows);
  }
}

template <typename T>
void Backward<T>::lay_out(Arena& arena) {
  const int64_t gates = most_rows_ * cell_.depth * cell_.gates();
  const int64_t outputs = most_rows_ * cell_.output;
  const bool split = cell_.spec->bias_parts && !cell_.spec->deep;
  for (const int i : {0, 1}) {
    dinputs_[i] = arena.take<T>(i == 0 || chunks_.size() > 1 ? gates : 0);
    dproducts_[i] = split ? arena.take<T>(i == 0 || chunks_.size() > 1 ? gates : 0) : dinputs_[i];
  }
  outputs_ = arena.take<T>(cell_.w_hr.panels.defined() ? outputs : 0);
  h_prev_ = need_h_prev_ ? arena.take<T>(cell_.depth * outputs) : nullptr;
  masked_ = arena.take<T>(cell_.spec->deep ? sequence_.batch * cell_.hidden : 0);
  scratch_bytes_ = cpu_kernels().of<T>().scratch_bytes(cell_.w_hh.format, sequence_.batch,
                                                       std::max(cell_.gates(), cell_.output));
  scratch_ = arena.take<char>(available_threads() * scratch_bytes_);
}

template <typename T>
void Backward<T>::run(const CellGradient<T>& gradient, const Use& use) const {
  const Call call;
  const auto [split, most_threads, why] =
      plan_call<T>([&] { return std::array{size_of(cell_)}; }, 1, sequence_, true);
  const T* dproducts_after = nullptr;
  for (size_t i = 0; i < chunks_.size(); ++i) {
    const auto [first, last] = chunks_[i];
    const StepGradients<T> result{.steps = sequence_.steps_taken(first, last, cell_.reverse),
                                  .dinputs = dinputs_[i % 2],
                                  .dproducts = dproducts_[i % 2],
                                  .stride = cell_.depth * cell_.gates(),
                                  .outputs = outputs_,
                                  .h_prev = h_prev_,
                                  .masked = masked_};
    const auto walk = [&, first, last](const Share& share, int64_t thread) {
      walk_back(cell_, sequence_, first, last, gradient, dproducts_after, result, share,
                scratch_ + thread * scratch_bytes_);
    };
    // A thread may have been late in the chunk before.
    const int64_t threads = most_threads == 1 || i == 0
                                ? most_threads
                                : std::min(most_threads, free_threads(Clock::now()));
    if (split == Split::kRows) {
      each_share_of_rows(sequence_, result.steps, threads, walk);
    } else {  // one cell: its units
      Team team;
      run_team(threads, [&](int64_t member, int64_t members) {
        walk({0, sequence_.batch, member, members, &team}, member);
      });
    }
    use(result, i > 0);
    const int64_t row = sequence_.offsets[sequence_.step(first, cell_.reverse)];
    dproducts_after = result.dproducts + (row - result.steps.first_row) * result.stride;
  }
}

template class Backward<float>;
template class Backward<double>;

}  // namespace iss
