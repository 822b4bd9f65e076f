// SPDX-License-Identifier: Apache-2.0

#include "cpu/recurrence.h"

#include <atomic>
#include <cstring>
#include <memory>
#include <type_traits>

#include "cpu/kernels/table.h"
#include "memory.h"
#include "cpu/plan.h"
#include "cpu/team.h"

namespace iss {
namespace {

// Projected inputs are made for so many steps at a time that they stay in a core's L2 cache, but
// for kBlockRows rows at least: fewer would read w_ih too often.
constexpr int64_t kChunkBytes = 1 << 18;

template <typename T>
void copy_rows(const T* from, int64_t rows, int64_t from_stride, int64_t columns, T* to) {
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(to + r * columns, from + r * from_stride, columns * sizeof(T));
}

// A cell at work: where it reads and writes.
template <typename T>
struct Job {
  const Cell& cell;
  const CellState<T>& state;
  const Sequence& sequence;
  const T* x;  // [N, I]
  T* y;        // [N, P], y_stride elements from row to row
  int64_t y_stride;
  int64_t chunk;   // steps whose inputs are projected together
  T* gates_x;      // [rows of a chunk, 4H]; unused when training
  T* unprojected;  // [B, H] with a projection
};

// gates_x = x @ w_ih.T + bias for `rows` rows from `row`: [rows, I] -> [rows, 4H].
template <typename T>
void project(const Job<T>& job, int64_t row, int64_t rows, PanelRange panels, T* gates_x,
             void* scratch) {
  const Cell& cell = job.cell;
  if (!cell.w_ih.panels.defined()) return;
  const int64_t columns = 4 * cell.hidden;
  for (int64_t first = 0; first < rows; first += kBlockRows)
    cpu_kernels().of<T>().matmul(
        {.rows = std::min(kBlockRows, rows - first),
         .k = cell.input,
         .columns = columns,
         .panels = panels,
         .a = job.x + (row + first) * cell.input,
         .a_stride = cell.input,
         .b = cell.w_ih.view(),
         .bias = cell.bias.defined() ? cell.bias.const_data_ptr<T>() : nullptr,
         .accumulate = false,
         .out = gates_x + first * columns,
         .out_stride = columns,
         .scratch = scratch});
}

// The steps [first, last) that a cell takes, inputs first.
// False where the share's member has left its team on the way.
template <typename T>
bool run_chunk(const Job<T>& job, const Share& share, int64_t first, int64_t last, void* scratch) {
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  const auto& [cell, state, sequence, x, y, y_stride, chunk, gates_chunk, unprojected] = job;
  const int64_t hidden = cell.hidden, output = cell.output;
  const bool reverse = cell.reverse, projected = cell.w_hr.panels.defined();
  const StepRange steps = sequence.steps_taken(first, last, reverse);
  const bool whole = share.begin == 0 && share.end == sequence.batch;
  // When training, the activated gates replace the projected inputs in place. Otherwise these are
  // kept for a chunk; threads that share the batch, which may be in different chunks, each keep
  // their own rows.
  T* const gates_x = state.gates ? state.gates : gates_chunk;
  const auto gates_at = [&](int64_t t, int64_t b) {
    const int64_t row =
        state.gates ? sequence.offsets[t] + b
        : whole
            ? sequence.offsets[t] + b - steps.first_row
            : chunk * share.begin + (t - steps.begin) * (share.end - share.begin) + b - share.begin;
    return gates_x + row * 4 * hidden;
  };

  const PanelRange columns = share.of(kernels.panels(4 * hidden, false));
  if (whole)
    project(job, steps.first_row, steps.rows, columns, gates_at(steps.begin, 0), scratch);
  else
    for (int64_t t = steps.begin; t < steps.end; ++t) {
      const int64_t rows = std::min(share.end, sequence.sizes[t]) - share.begin;
      const int64_t row = sequence.offsets[t] + share.begin;
      if (rows > 0) project(job, row, rows, columns, gates_at(t, share.begin), scratch);
    }
  if (!share.meet()) return false;

  for (int64_t k = first; k < last; ++k) {
    const int64_t t = sequence.step(k, reverse);
    sequence.each_piece(
        k, reverse, share.begin, share.end,
        [&](int64_t b, int64_t rows, int64_t row, int64_t previous) {
          const bool product =
              previous >= 0 || !cell.w_hh.finite || !all_zero(state.h0 + b * output, rows * output);
          kernels.lstm_step(
              {.rows = rows,
               .hidden = hidden,
               .k = product ? output : 0,
               .panels = share.of(kernels.panels(hidden, true), k % 2 == 1),
               .h_prev = previous < 0 ? state.h0 + b * output : y + previous * y_stride,
               .h_prev_stride = previous < 0 ? output : y_stride,
               .c_prev = state.c + b * hidden,
               .w_hh = product ? cell.w_hh.view() : Packed{},
               .gates_x = gates_at(t, b),
               .c = state.c + b * hidden,
               .h = projected ? unprojected + b * hidden : y + row * y_stride,
               .h_stride = projected ? hidden : y_stride,
               .gates = state.gates ? gates_at(t, b) : nullptr,
               .cells = state.cells ? state.cells + row * hidden : nullptr,
               .scratch = scratch});
        });
    if (!share.meet()) return false;
    if (!projected) continue;
    sequence.each_piece(k, reverse, share.begin, share.end,
                        [&](int64_t b, int64_t rows, int64_t row, int64_t) {
                          kernels.matmul({.rows = rows,
                                          .k = hidden,
                                          .columns = output,
                                          .panels = share.of(kernels.panels(output, false)),
                                          .a = unprojected + b * hidden,
                                          .a_stride = hidden,
                                          .b = cell.w_hr.view(),
                                          .bias = nullptr,
                                          .accumulate = false,
                                          .out = y + row * y_stride,
                                          .out_stride = y_stride,
                                          .scratch = scratch});
                        });
    if (!share.meet()) return false;
  }
  return true;
}

// y of each row's last step -> h_n.
template <typename T>
void keep_last(const Job<T>& job, int64_t begin, int64_t end) {
  const int64_t output = job.cell.output;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t last = job.sequence.last_row(b, job.cell.reverse);
    const T* from = last < 0 ? job.state.h0 + b * output : job.y + last * job.y_stride;
    T* const to = job.state.h_n + b * output;
    if (from != to) copy_rows(from, 1, output, output, to);
  }
}

// One cell from beginning to end. False where the share's member has left its team on the way.
template <typename T>
bool run_cell(const Job<T>& job, const Share& share, void* scratch) {
  for (int64_t first = 0; first < job.sequence.steps; first += job.chunk)
    if (!run_chunk(job, share, first, std::min(first + job.chunk, job.sequence.steps), scratch))
      return false;
  if (share.member == 0) keep_last(job, share.begin, share.end);
  return true;
}

// Split::kLayers. A thread takes the next chunk of any layer that has its input and that nobody
// works on: of the layer it took last, whose weights it has in its cache, or else of the topmost.
template <typename T, typename ScratchOf>
void run_layers(const std::vector<Job<T>>& jobs, int64_t chunk, int64_t threads,
                const ScratchOf& scratch_of) {
  const int64_t layers = static_cast<int64_t>(jobs.size()), steps = jobs[0].sequence.steps;
  const Share whole{0, jobs[0].sequence.batch};
  struct Progress {
    alignas(64) std::atomic<bool> taken = false;
    std::atomic<int64_t> done = 0;  // steps
  };
  const auto progress = std::make_unique<Progress[]>(layers);
  const auto done = [&](int64_t l) {
    return l < 0 ? steps : progress[l].done.load(std::memory_order_acquire);
  };
  run_team(threads, [&](int64_t member, int64_t) {
    // Whether there was a chunk to take of the layer.
    const auto take = [&](int64_t l) {
      if (done(l) == done(l - 1) || progress[l].taken.exchange(true, std::memory_order_acquire))
        return false;
      const int64_t first = done(l), last = std::min(first + chunk, steps);
      const bool ready = first < last && done(l - 1) >= last;
      if (ready) {
        run_chunk(jobs[l], whole, first, last, scratch_of(member));
        if (last == steps) keep_last(jobs[l], 0, whole.end);
        progress[l].done.store(last, std::memory_order_release);
      }
      progress[l].taken.store(false, std::memory_order_release);
      return ready;
    };
    int64_t mine = std::min(member, layers - 1);
    const auto take_any = [&] {
      if (take(mine)) return true;
      for (int64_t l = layers - 1; l >= 0; --l)
        if (l != mine && take(l)) return mine = l, true;
      return false;
    };
    while (done(layers - 1) < steps)
      spin_until(
          [&] { return take_any() || done(layers - 1) == steps; },
          [](Clock::time_point since, Clock::time_point now) { return now - since > kLate; });
  });
}

}  // namespace

template <typename T>
void run_stack(const Stack& stack, const Sequence& sequence, const T* x,
               const std::vector<CellState<T>>& states, T* y) {
  const Call call;
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  const auto [split, threads] = plan<T>(stack, sequence, true);
  const int64_t directions = static_cast<int64_t>(stack[0].size());
  const int64_t layers = static_cast<int64_t>(stack.size());

  int64_t widest = 1;
  for (const Layer& layer : stack)
    for (const Cell& cell : layer) widest = std::max(widest, cell.hidden);
  // Layers that follow each other do so chunk by chunk, so there should be some chunks.
  const int64_t fewest = split == Split::kLayers ? 8 : 1;
  const int64_t step_rows = std::max<int64_t>(1, sequence.batch);
  const int64_t cached = kChunkBytes / (step_rows * 4 * widest * int64_t{sizeof(T)});
  const int64_t chunk = std::clamp<int64_t>(std::max(cached, kBlockRows / step_rows), 1,
                                            std::max<int64_t>(1, sequence.steps / fewest));

  std::vector<Job<T>> jobs;
  jobs.reserve(layers * directions);
  int64_t quantising = 0;  // bytes that a thread needs to quantise rows
  const auto lay_out = [&](Arena arena) {
    jobs.clear();
    const T* input = x;
    for (int64_t l = 0; l < layers; ++l) {
      int64_t width = 0;
      for (const Cell& cell : stack[l]) width += cell.output;
      T* const output = l + 1 == layers ? y : arena.take<T>(sequence.rows * width);
      int64_t column = 0;
      for (const Cell& cell : stack[l]) {
        const CellState<T>& state = states[jobs.size()];
        T* const gates = arena.take<T>(state.gates ? 0 : chunk * sequence.batch * 4 * cell.hidden);
        T* const unprojected =
            arena.take<T>(cell.w_hr.panels.defined() ? sequence.batch * cell.hidden : 0);
        if (cell.w_hh.format == Format::kInt8)
          quantising = std::max(
              {quantising, kernels.scratch_bytes(std::min(kBlockRows, sequence.rows), cell.input),
               kernels.scratch_bytes(sequence.batch, std::max(cell.hidden, cell.output))});
        jobs.push_back(
            {cell, state, sequence, input, output + column, width, chunk, gates, unprojected});
        column += cell.output;
      }
      input = output;
    }
    quantising = (quantising + 63) / 64 * 64;
    arena.take<char>(quantising * threads);
    return arena;
  };
  const int64_t bytes = lay_out({nullptr}).used;
  const Arena arena = lay_out({static_cast<char*>(scratch(bytes))});
  char* const own = arena.base + arena.used - quantising * threads;
  if (split == Split::kRows) {
    each_share_of_rows(sequence, sequence.steps_taken(0, sequence.steps, false), threads,
                       [&](const auto& share, int64_t thread) {
                         for (const Job<T>& job : jobs)
                           run_cell(job, share, own + thread * quantising);
                       });
    return;
  }
  if (split == Split::kLayers) {
    run_layers(jobs, chunk, threads, [&](int64_t member) { return own + member * quantising; });
    return;
  }
  Team of_direction[2], everyone;
  run_team(threads, [&](int64_t member, int64_t members) {
    // Half of the members take the forward cells, half the backward ones.
    const bool divided = split == Split::kDirections && members > 1;
    const int64_t size = divided ? members / 2 : members;
    const int64_t direction = divided ? member / size : 0;
    // An odd one is left where there are fewer threads than asked for.
    bool stays = direction <= 1;
    const Share share{0, sequence.batch, divided ? member % size : member, size,
                      stays ? &of_direction[direction] : nullptr};
    for (int64_t l = 0; l < layers; ++l) {
      for (int64_t d = direction; stays && d < directions; d += divided ? 2 : 1)
        stays = run_cell(jobs[l * directions + d], share, own + member * quantising);
      if (divided)
        everyone.meet(members, false);  // a cell by units ends at a meeting of its own
      else if (!stays)
        return;
    }
  });
}

template void run_stack<float>(const Stack&, const Sequence&, const float*,
                               const std::vector<CellState<float>>&, float*);
template void run_stack<double>(const Stack&, const Sequence&, const double*,
                                const std::vector<CellState<double>>&, double*);

}  // namespace iss
