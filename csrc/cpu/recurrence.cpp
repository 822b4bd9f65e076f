// SPDX-License-Identifier: Apache-2.0

#include "cpu/recurrence.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <tuple>
#include <utility>

#include "cpu/kernels/table.h"
#include "cpu/plan.h"
#include "cpu/share.h"
#include "cpu/team.h"
#include "memory.h"

namespace iss {
namespace {

// Bytes of the projected inputs of a chunk, which stay in a core's L2 cache. A chunk has at least
// kBlockRows rows: with fewer, w_ih would be read too often.
constexpr int64_t kChunkBytes = 1 << 18;
// Bytes of w_ih that are not kept in that cache from chunk to chunk. A chunk then has as many rows
// as its product works on together.
constexpr int64_t kLargeBytes = 1 << 20;

// One cell of a call: what it reads and writes.
template <typename T>
struct Job {
  const PackedCell& cell;
  const CellState<T>& state;
  const Sequence& sequence;
  const T* x;  // [N, I]
  T* y;        // [N, P], y_stride elements from row to row
  int64_t y_stride;
  int64_t chunk;  // steps whose inputs are projected together
  // [rows of a chunk, G H]; unused where CellState has them. Where a step's product begins with
  // them, [panel][input_rows][columns of a panel].
  T* inputs;
  int64_t input_rows;
  T* unprojected;  // [B, H] with a projection
  // [2, B, H] of a deep cell that saves no states: a micro-step reads one and writes the other.
  T* states;
  T* masked;  // [3, B, H] with masks: these two states and h_0, times the mask of the states
  // A state [P] after a reset, where w_hh is not finite; the inputs [G H] of a micro-step, or the
  // biases, where there are none.
  const T* zeros;

  // Elements from row to row of `inputs`.
  int64_t inputs_stride() const {
    return cell.begins_with_inputs ? cpu_kernels().of<T>().panel_columns(cell.spec->gates)
                                   : cell.gates();
  }
};

// inputs = x @ w_ih.T + bias for `rows` rows from `row`: [rows, I] -> [rows, G H]. Without the bias
// where a step's product begins with them.
template <typename T>
void project(const Job<T>& job, int64_t row, int64_t rows, PanelRange panels, T* inputs,
             void* scratch) {
  const PackedCell& cell = job.cell;
  if (!cell.w_ih.panels.defined()) return;
  const int64_t columns = cell.gates(), block = Kernels<T>::block_rows(cell.w_ih.format);
  const bool initial = cell.begins_with_inputs;
  for (int64_t first = 0; first < rows; first += block)
    cpu_kernels().of<T>().matmul(
        {.rows = std::min(block, rows - first),
         .k = cell.input,
         .columns = columns,
         .panels = panels,
         .a = job.x + (row + first) * cell.input,
         .a_stride = cell.input,
         .b = cell.w_ih.view(),
         .bias = cell.bias.defined() && !initial ? cell.bias.const_data_ptr<T>() : nullptr,
         .accumulate = false,
         .out = inputs + first * job.inputs_stride(),
         .out_stride = columns,
         .scratch = scratch,
         .panel_rows = initial ? job.input_rows : 0});
}

// The state that micro-step d leaves of row b of the batch, `row` of all rows, and its stride.
template <typename T>
std::pair<T*, int64_t> state_after(const Job<T>& job, int64_t d, int64_t b, int64_t row) {
  const int64_t hidden = job.cell.hidden, kept = (job.cell.depth - 1) * hidden;
  if (d == job.cell.depth - 1) return {job.y + row * job.y_stride, job.y_stride};
  if (job.state.saved) return {job.state.saved + row * kept + d * hidden, kept};
  return {job.states + (d % 2 * job.sequence.batch + b) * hidden, hidden};
}

// Micro-step d of the k-th step, product and finish, for rows of the batch whose states come from
// the same step (Sequence::each_piece). w_hh: of that micro-step.
template <typename T>
void take_step(const Job<T>& job, void (*step)(const StepArgs<T>&), const Packed& w_hh,
               StepArgs<T>& args, int64_t k, int64_t d, int64_t b, int64_t row, int64_t previous) {
  const int64_t output = job.cell.output, depth = job.cell.depth;
  const bool is_first = d == 0 && previous < 0;
  if (d > 0) {
    std::tie(args.h_prev, args.h_prev_stride) = state_after(job, d - 1, b, row);
  } else {
    args.h_prev = is_first ? job.state.h0 + b * output : job.y + previous * job.y_stride;
    args.h_prev_stride = is_first ? output : job.y_stride;
    args.resets = job.sequence.resets_before(row, previous, job.cell.reverse);
  }
  if (!job.cell.spec->has_c) args.before = args.h_prev, args.before_stride = args.h_prev_stride;
  const bool product = !is_first || !job.cell.w_hh.finite ||
                       !all_zero(job.state.h0 + b * output, args.rows * output);
  if (product) args.k = output;
  if (product || args.initial) args.w_hh = w_hh;
  if (job.state.masks) {
    const int64_t all = job.sequence.batch * output, now = (k * depth + d) % 2;
    args.state_mask = job.state.masks + b * output;
    args.mask = args.state_mask + all;
    args.h_prev = job.masked + (is_first ? 2 : 1 - now) * all + b * output;
    args.h_prev_stride = output;
    args.masked = job.masked + now * all + b * output;
  }
  if (args.resets == nullptr || job.cell.w_hh.finite) return step(args);
  // The product of zeros with a matrix that is not finite is not zero. So rows with a reset and
  // rows without one are multiplied separately, in runs.
  for (int64_t end = 0, rows = args.rows; end < rows;) {
    const int64_t begin = end;
    const bool reset = args.resets[begin];
    while (end < rows && args.resets[end] == reset) ++end;
    StepArgs<T> run = args;
    run.rows = end - begin;
    run.h_prev = reset ? job.zeros : args.h_prev + begin * args.h_prev_stride;
    run.h_prev_stride = reset ? 0 : args.h_prev_stride;
    run.before = args.before + begin * args.before_stride;
    if (reset) run.before = job.zeros, run.before_stride = 0;
    run.resets = nullptr;
    run.inputs += begin * args.inputs_stride;
    if (run.initial) run.initial += begin * job.inputs_stride();
    if (run.c) run.c += begin * args.hidden;
    run.h += begin * args.h_stride;
    if (run.gates) run.gates += begin * args.gates_stride;
    if (run.saved) run.saved += begin * args.hidden;
    if (run.mask) {
      for (const T** mask : {&run.mask, &run.state_mask}) *mask += begin * args.hidden;
      run.masked += begin * args.hidden;
    }
    step(run);
  }
}

// Projects the inputs of steps [first, last) of a cell, then takes these steps. False if the member
// of the share has left its team.
template <typename T>
bool run_chunk(const Job<T>& job, const Share& share, int64_t first, int64_t last, void* scratch) {
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  const auto& [cell, state, sequence, x, y, y_stride, chunk, inputs_of_chunk, input_rows,
               unprojected, states, masked, zeros] = job;
  const CellSpec& spec = *cell.spec;
  const int64_t hidden = cell.hidden, output = cell.output, gates = cell.gates();
  const int64_t depth = cell.depth, gates_kept = spec.gates_kept(depth) * hidden;
  const bool reverse = cell.reverse, projected = cell.w_hr.panels.defined();
  const T* const product_bias =
      cell.product_bias.defined() ? cell.product_bias.template const_data_ptr<T>() : nullptr;
  const T* const bias = cell.bias.defined() ? cell.bias.template const_data_ptr<T>() : zeros;
  const bool initial = cell.begins_with_inputs;
  const int64_t inputs_stride = job.inputs_stride();
  const StepRange steps = sequence.steps_taken(first, last, reverse);
  const bool whole = share.begin == 0 && share.end == sequence.batch;
  // There is memory for the projected inputs of a chunk, unless the caller has some for all of
  // them. Threads that divide the batch may be in different chunks, so each has a part for its own
  // rows.
  const auto inputs_at = [&](int64_t t, int64_t b) {
    if (state.inputs) return state.inputs + (sequence.offsets[t] + b) * gates;
    const int64_t row = whole ? sequence.offsets[t] + b - steps.first_row
                              : chunk * share.begin +
                                    (t - steps.begin) * (share.end - share.begin) + b - share.begin;
    return inputs_of_chunk + row * inputs_stride;
  };

  const PanelRange columns = share.of(kernels.panels(gates));
  if (whole)
    project(job, steps.first_row, steps.rows, columns, inputs_at(steps.begin, 0), scratch);
  else
    for (int64_t t = steps.begin; t < steps.end; ++t) {
      const int64_t rows = std::min(share.end, sequence.sizes[t]) - share.begin;
      const int64_t row = sequence.offsets[t] + share.begin;
      if (rows > 0) project(job, row, rows, columns, inputs_at(t, share.begin), scratch);
    }
  if (!share.meet()) return false;

  const int64_t all_panels = kernels.panels(hidden, spec.gates);
  const auto step = kernels.of(spec.kind).step;
  Packed w_hh = cell.w_hh.view();
  for (int64_t k = first; k < last; ++k) {
    const int64_t t = sequence.step(k, reverse);
    for (int64_t d = 0; d < depth; ++d) {
      const PanelRange panels = share.of(all_panels, (k * depth + d) % 2 == 1);
      if (depth > 1) w_hh = cell.w_hh.view(d);
      const T* const no_input = d == 0         ? nullptr
                                : product_bias ? product_bias + (d - 1) * gates
                                               : zeros;
      sequence.each_piece(
          k, reverse, share.begin, share.end,
          [&](int64_t b, int64_t rows, int64_t row, int64_t previous) {
            const auto [h, h_stride] = projected ? std::pair{unprojected + b * hidden, hidden}
                                                 : state_after(job, d, b, row);
            StepArgs<T> args{
                .rows = rows,
                .hidden = hidden,
                .k = 0,
                .panels = panels,
                .h_prev = nullptr,
                .h_prev_stride = 0,
                .before = state.c ? state.c + b * hidden : nullptr,
                .before_stride = hidden,
                .resets = nullptr,
                .w_hh = {},
                .inputs = d > 0     ? no_input
                          : initial ? bias
                                    : inputs_at(t, b),
                .inputs_stride = d > 0 || initial ? 0 : inputs_stride,
                .product_bias = product_bias,
                .c = state.c ? state.c + b * hidden : nullptr,
                .h = h,
                .h_stride = h_stride,
                .gates = state.gates ? state.gates + row * gates_kept + d * gates : nullptr,
                .gates_stride = gates_kept,
                .saved = state.saved ? state.saved + row * hidden : nullptr,
                .scratch = scratch,
                .rough = rounds_rows(w_hh.format),
                .initial = initial ? inputs_at(t, b) : nullptr,
                .initial_rows = input_rows};
            take_step(job, step, w_hh, args, k, d, b, row, previous);
          });
      if (!share.meet()) return false;
    }
    if (!projected) continue;
    sequence.each_piece(k, reverse, share.begin, share.end,
                        [&](int64_t b, int64_t rows, int64_t row, int64_t) {
                          kernels.matmul({.rows = rows,
                                          .k = hidden,
                                          .columns = output,
                                          .panels = share.of(kernels.panels(output)),
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

// Copies y of each row's last step to h_n.
template <typename T>
void keep_last(const Job<T>& job, int64_t begin, int64_t end) {
  const int64_t output = job.cell.output;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t last = job.sequence.last_row(b, job.cell.reverse);
    const T* from = last < 0 ? job.state.h0 + b * output : job.y + last * job.y_stride;
    T* const to = job.state.h_n + b * output;
    if (from != to) std::memcpy(to, from, output * sizeof(T));
  }
}

// All steps of a cell. False if the member of the share has left its team.
template <typename T>
bool run_cell(const Job<T>& job, const Share& share, void* scratch) {
  for (int64_t first = 0; first < job.sequence.steps; first += job.chunk)
    if (!run_chunk(job, share, first, std::min(first + job.chunk, job.sequence.steps), scratch))
      return false;
  if (share.member == 0) keep_last(job, share.begin, share.end);
  return true;
}

// Split::kLayers. A thread takes the next chunk of a layer whose input is there and that no other
// thread works on: of the layer it took last, whose weights are in its cache, else of the topmost.
template <typename T, typename ScratchOf>
void run_layers(std::span<const Job<T>> jobs, int64_t chunk, int64_t threads,
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
    // Takes the next chunk of a layer; false if there is none to take.
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

std::pair<at::Tensor, at::Tensor> merged_biases(const CellSpec& spec, const at::Tensor& b_ih,
                                                const at::Tensor& b_hh, int64_t depth) {
  if (!spec.bias_parts)
    return {b_ih.defined() && b_hh.defined() ? b_ih + b_hh : b_ih.defined() ? b_ih : b_hh, {}};
  if (!b_hh.defined()) return {b_ih, {}};
  if (spec.deep) {  // the bias of the first micro-step is added to the inputs
    const int64_t first = b_hh.size(0) / depth;
    const at::Tensor of_inputs = b_hh.narrow(0, 0, first);
    return {b_ih.defined() ? b_ih + of_inputs : of_inputs,
            b_hh.narrow(0, first, b_hh.size(0) - first)};
  }
  // All products but the last are just added to their inputs, so their biases can be merged.
  const int64_t merged = b_hh.size(0) / spec.gates * (spec.gates - 1);
  const at::Tensor of_inputs = at::zeros_like(b_hh);
  if (b_ih.defined()) of_inputs.copy_(b_ih);
  of_inputs.narrow(0, 0, merged).add_(b_hh.narrow(0, 0, merged));
  return {of_inputs, b_hh.narrow(0, merged, b_hh.size(0) - merged)};
}

template <typename T>
void run_stack(const Stack& stack, const Sequence& sequence, const T* x,
               const std::vector<CellState<T>>& states, T* y) {
  const Call call;
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  const auto [split, threads, why] = plan_call<T>(
      [&] {
        c10::SmallVector<CellSize, 8> sizes;
        for (const Layer& layer : stack)
          for (const PackedCell& cell : layer) sizes.push_back(size_of(cell));
        return sizes;
      },
      static_cast<int64_t>(stack[0].size()), sequence, false);
  const int64_t directions = static_cast<int64_t>(stack[0].size());
  const int64_t layers = static_cast<int64_t>(stack.size());

  // The widest projected inputs, the longest state, and the inputs of micro-steps without any.
  int64_t widest = 1, longest_row = 0, idle = 0, least_rows = kBlockRows;
  for (const Layer& layer : stack)
    for (const PackedCell& cell : layer) {
      widest = std::max(widest, cell.gates());
      if (cell.w_ih.part_bytes > kLargeBytes)
        least_rows = std::max(least_rows, kernels.block_rows(cell.w_ih.format));
      longest_row = std::max({longest_row, cell.output, cell.hidden});
      if ((cell.depth > 1 && !cell.product_bias.defined()) ||
          (cell.begins_with_inputs && !cell.bias.defined()))
        idle = std::max(idle, cell.gates());
    }
  const int64_t all_zeros = std::max(sequence.resets ? longest_row : 0, idle);
  // Layers can only run at the same time if there are several chunks.
  const int64_t fewest = split == Split::kLayers ? 8 : 1;
  const int64_t step_rows = std::max<int64_t>(1, sequence.batch);
  const int64_t cached = kChunkBytes / (step_rows * widest * int64_t{sizeof(T)});
  const int64_t chunk = std::clamp<int64_t>(std::max(cached, least_rows / step_rows), 1,
                                            std::max<int64_t>(1, sequence.steps / fewest));

  c10::SmallVector<Job<T>, 4> jobs;
  jobs.reserve(layers * directions);
  int64_t quantising = 0;  // bytes that a thread needs to quantise or round rows
  T* zeros = nullptr;
  const auto lay_out = [&](Arena arena) {
    jobs.clear();
    zeros = arena.take<T>(all_zeros);
    const T* input = x;
    for (int64_t l = 0; l < layers; ++l) {
      int64_t width = 0;
      for (const PackedCell& cell : stack[l]) width += cell.output;
      T* const output = l + 1 == layers ? y : arena.take<T>(sequence.rows * width);
      int64_t column = 0;
      for (const PackedCell& cell : stack[l]) {
        const CellState<T>& state = states[jobs.size()];
        const bool initial = cell.begins_with_inputs;
        const int64_t input_rows = chunk * sequence.batch + (initial ? kTileSize - 1 : 0);
        const int64_t row_elements = initial ? kernels.panels(cell.hidden, cell.spec->gates) *
                                                   kernels.panel_columns(cell.spec->gates)
                                             : cell.gates();
        T* const inputs = arena.take<T>(state.inputs ? 0 : input_rows * row_elements);
        T* const unprojected =
            arena.take<T>(cell.w_hr.panels.defined() ? sequence.batch * cell.hidden : 0);
        const int64_t all = sequence.batch * cell.hidden;
        T* const between = arena.take<T>(cell.depth > 1 && !state.saved ? 2 * all : 0);
        T* const masked = arena.take<T>(state.masks ? 3 * all : 0);
        const Format format = cell.w_hh.format;
        quantising = std::max(
            {quantising,
             kernels.scratch_bytes(format, std::min(Kernels<T>::block_rows(format), sequence.rows),
                                   cell.input),
             kernels.scratch_bytes(format, sequence.batch, std::max(cell.hidden, cell.output))});
        jobs.push_back({cell, state, sequence, input, output + column, width, chunk, inputs,
                        input_rows, unprojected, between, masked, zeros});
        column += cell.output;
      }
      input = output;
    }
    arena.take<char>(quantising * threads);
    return arena;
  };
  const int64_t bytes = lay_out({nullptr}).used;
  const Arena arena = lay_out({static_cast<char*>(scratch(bytes))});
  std::fill_n(zeros, all_zeros, T(0));
  for (const Job<T>& job : jobs)
    if (const T* const masks = job.state.masks) {
      const int64_t all = sequence.batch * job.cell.hidden;
      std::transform(masks, masks + all, job.state.h0, job.masked + 2 * all, std::multiplies<T>());
    }
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
    run_layers<T>(jobs, chunk, threads, [&](int64_t member) { return own + member * quantising; });
    return;
  }
  Team of_direction[2], everyone;
  run_team(threads, [&](int64_t member, int64_t members) {
    // Half of the members take the forward cells, half the backward ones.
    const bool divided = split == Split::kDirections && members > 1;
    const int64_t size = divided ? members / 2 : members;
    const int64_t direction = divided ? member / size : 0;
    // With fewer threads than wanted their number may be odd; the odd one has nothing to do.
    bool stays = direction <= 1;
    const Share share{0, sequence.batch, divided ? member % size : member, size,
                      stays ? &of_direction[direction] : nullptr};
    for (int64_t l = 0; l < layers; ++l) {
      for (int64_t d = direction; stays && d < directions; d += divided ? 2 : 1)
        stays = run_cell(jobs[l * directions + d], share, own + member * quantising);
      if (divided)
        everyone.meet(members, false);  // a split by units needs none: a cell ends with a meeting
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
