// SPDX-License-Identifier: Apache-2.0
// The pointwise half of one step, forward and backward, for Tier::kSteps; this text is compiled
// once for each cell. Bound by memory: a thread has 16 bytes of T's units, or one unit where rows
// do not divide into 16 bytes.
#pragma once

#include "cuda/cell.h"

namespace iss {
namespace {

constexpr int kPointwiseThreads = 256;

// N elements from or to p: 16 bytes at a time where N > 1.
template <int N, typename T>
__device__ __forceinline__ void read(const T* p, Wide<T> (&values)[N]) {
  if constexpr (N == 1) {
    values[0] = widen(*p);
  } else {
#pragma unroll
    for (int first = 0; first < N; first += Chunk<T>::kSize) {
      const Chunk<T> chunk = Chunk<T>::load(p + first);
#pragma unroll
      for (int i = 0; i < Chunk<T>::kSize; ++i) values[first + i] = widen(chunk.values[i]);
    }
  }
}
template <int N, typename T>
__device__ __forceinline__ void write(const Wide<T> (&values)[N], T* p) {
  if constexpr (N == 1) {
    *p = narrow<T>(values[0]);
  } else {
#pragma unroll
    for (int first = 0; first < N; first += Chunk<T>::kSize) {
      Chunk<T> chunk;
#pragma unroll
      for (int i = 0; i < Chunk<T>::kSize; ++i) chunk.values[i] = narrow<T>(values[first + i]);
      chunk.store(p + first);
    }
  }
}

// Row and first unit of this thread, of `units` per thread; row < rows where it has any.
struct Place {
  int64_t row, unit;
  __device__ __forceinline__ Place(int64_t hidden, int units) {
    const int64_t thread = int64_t{blockIdx.x} * kPointwiseThreads + threadIdx.x;
    const int64_t in_row = hidden / units;
    row = thread / in_row;
    unit = (thread - row * in_row) * units;
  }
};

template <typename Cell, typename T, int N>
__global__ void __launch_bounds__(kPointwiseThreads)
    pointwise_forward(PointwiseForwardArgs<T> args) {
  using V = Wide<T>;
  constexpr int kGates = Cell::kGates;
  const int64_t hidden = args.hidden;
  const Place at(hidden, N);
  if (at.row >= args.rows) return;
  const int64_t at_unit = at.row * hidden + at.unit, at_gate = at.row * kGates * hidden + at.unit;
  const bool cut = args.cuts && args.cuts[at.row];
  V gates[kGates][N], inputs[kGates][N], before[N] = {}, bias[N] = {}, saved[N], h[N];
  V state_mask[N] = {};
#pragma unroll
  for (int g = 0; g < kGates; ++g) {
    read(args.products + at_gate + g * hidden, gates[g]);
    read(args.inputs + at.row * args.inputs_stride + at.unit + g * hidden, inputs[g]);
  }
  if constexpr (Cell::kHasC) read(args.c + at_unit, before);
  if constexpr (needs_h<Cell>) read(args.h_before + at_unit, before);
  if (Cell::kProductBias && args.product_bias) read(args.product_bias + at.unit, bias);
  if constexpr (Cell::kMasked) {
    if (args.mask)
      read(args.mask + at_unit, bias);
    else
      for (V& of_unit : bias) of_unit = V(1);
    if (args.state_mask) read(args.state_mask + at_unit, state_mask);
  }
#pragma unroll
  for (int k = 0; k < N; ++k) {
    V of_unit[kGates], input[kGates];
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      of_unit[g] = cut ? V(0) : gates[g][k];
      input[g] = inputs[g][k];
    }
    Cell::forward(of_unit, input, cut ? V(0) : before[k], bias[k], saved[k], h[k]);
#pragma unroll
    for (int g = 0; g < kGates; ++g) gates[g][k] = of_unit[g];
  }
  if constexpr (Cell::kHasC) write(saved, args.c + at_unit);
  write(h, args.h + at_unit);
  if (Cell::kSavedGates > 0 && args.gates) {
#pragma unroll
    for (int g = 0; g < kGates; ++g)
      write(gates[g], args.gates + at.row * args.gates_stride + at.unit + g * hidden);
  }
  if (Cell::kSavedState && args.saved) write(saved, args.saved + at_unit);
  if constexpr (Cell::kMasked) {
    if (args.states) write(h, args.states + at.row * args.states_stride + at.unit);
    if (!args.state_mask) return;
#pragma unroll
    for (int k = 0; k < N; ++k) h[k] *= state_mask[k];
    write(h, args.masked + at_unit);
  }
}

template <typename Cell, typename T, int N>
__global__ void __launch_bounds__(kPointwiseThreads)
    pointwise_backward(PointwiseBackwardArgs<T> args) {
  using V = Wide<T>;
  constexpr int kGates = Cell::kGates;
  const int64_t hidden = args.hidden;
  const Place at(hidden, N);
  if (at.row >= args.rows) return;
  const int64_t at_unit = at.row * hidden + at.unit, at_gate = at.row * args.gates_stride + at.unit;
  const bool cut = args.cuts && args.cuts[at.row];
  // gates: then the gradients of inputs.
  V gates[kGates][N] = {}, dproducts[kGates][N], saved[N] = {}, before[N] = {}, y[N] = {};
  V dh[N] = {}, carried[N] = {};
  if constexpr (Cell::kSavedGates > 0) {
#pragma unroll
    for (int g = 0; g < kGates; ++g) read(args.gates + at_gate + g * hidden, gates[g]);
  }
  if constexpr (Cell::kSavedState) read(args.saved + at_unit, saved);
  if constexpr (Cell::kHasC) read(args.c_before + at_unit, before);
  if constexpr (needs_h<Cell>) {
    if (Cell::kMasked && args.states)
      read(args.states + at.row * args.states_stride + at.unit, before);
    else
      read(args.h_before + at_unit, before);
  }
  if constexpr (needs_y<Cell>) read(args.y + at_unit, y);
  if constexpr (Cell::kCarries) read(args.carried + at_unit, carried);
  if (!Cell::kMasked || args.dh) read(args.dh + at_unit, dh);
  if constexpr (Cell::kMasked) {
    V state_mask[N] = {}, through[N] = {};
    if (args.through) read(args.through + at_unit, through);
    if (args.state_mask) read(args.state_mask + at_unit, state_mask);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      dh[k] += args.state_mask ? through[k] * state_mask[k] : through[k];
      saved[k] = V(1);
    }
    if (args.mask) read(args.mask + at_unit, saved);
  }
#pragma unroll
  for (int k = 0; k < N; ++k) {
    V of_unit[kGates], dinput[kGates], dproduct[kGates], dbefore = 0;
#pragma unroll
    for (int g = 0; g < kGates; ++g) of_unit[g] = gates[g][k];
    Cell::backward(needs_h<Cell> ? dh[k] + carried[k] : dh[k], carried[k], of_unit, saved[k],
                   cut ? V(0) : before[k], y[k], dinput, dproduct, dbefore);
    carried[k] = cut ? V(0) : dbefore;
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      gates[g][k] = dinput[g];
      if constexpr (Cell::kSplit) dproducts[g][k] = dproduct[g];
    }
  }
#pragma unroll
  for (int g = 0; g < kGates; ++g) {
    write(gates[g], args.dinputs + at_gate + g * hidden);
    if constexpr (Cell::kSplit) write(dproducts[g], args.dproducts + at_gate + g * hidden);
  }
  if constexpr (Cell::kCarries) write(carried, args.carried + at_unit);
}

template <typename Args>
int launch(void (*kernel)(Args), const Args& args, int units, CudaStream stream) {
  const int64_t threads = args.rows * (args.hidden / units);
  if (threads == 0) return 0;
  const dim3 grid(static_cast<unsigned>((threads + kPointwiseThreads - 1) / kPointwiseThreads));
  return simt::launch(kernel, grid, dim3(kPointwiseThreads), 0, static_cast<cudaStream_t>(stream),
                      false, 1, args);
}

template <typename... P>
bool all_aligned(const P*... pointers) {
  return (is_aligned(pointers) && ...);
}

}  // namespace

template <CellKind cell, typename T>
int launch_pointwise_forward(const PointwiseForwardArgs<T>& args, CudaStream stream) {
  using Cell = typename CellOf<cell>::type;
  constexpr int kUnits = Chunk<T>::kSize;
  const bool whole =
      args.hidden % kUnits == 0 &&
      all_aligned(args.products, args.inputs, args.product_bias, args.h_before, args.c, args.h,
                  args.gates, args.saved, args.mask, args.state_mask, args.masked, args.states);
  return whole ? launch(&pointwise_forward<Cell, T, kUnits>, args, kUnits, stream)
               : launch(&pointwise_forward<Cell, T, 1>, args, 1, stream);
}

template <CellKind cell, typename T>
int launch_pointwise_backward(const PointwiseBackwardArgs<T>& args, CudaStream stream) {
  using Cell = typename CellOf<cell>::type;
  constexpr int kUnits = Chunk<T>::kSize;
  const bool whole = args.hidden % kUnits == 0 &&
                     all_aligned(args.dh, args.gates, args.saved, args.c_before, args.h_before,
                                 args.y, args.carried, args.dinputs, args.dproducts, args.mask,
                                 args.state_mask, args.through, args.states);
  return whole ? launch(&pointwise_backward<Cell, T, kUnits>, args, kUnits, stream)
               : launch(&pointwise_backward<Cell, T, 1>, args, 1, stream);
}

}  // namespace iss
