// SPDX-License-Identifier: Apache-2.0
// One step in one launch, of a stream or of a sequence that has no other; this text is compiled
// once for each cell. A warp has one unit, i.e. G rows of w_ih and of w_hh, and goes along them
// with its lanes, for up to 8 rows of the batch at a time. What bounds it is the reading of
// weights, once, from L2 or memory; nothing is staged, for there is nobody to share with but the
// caches.
#pragma once

#include "cuda/cell.h"

namespace iss {
namespace {

constexpr int kMaxRows = 8;  // 4 x 8 sums are one for each lane
// One warp a block: units spread over all multiprocessors, however few they are.
constexpr int kStepThreads = 32;
// Sums of a unit and row: one for each gate, of x and h together, and one more where a bias joins
// the last gate's product with h before its input does.
template <typename Cell>
constexpr int kSums = Cell::kGates + (Cell::kProductBias ? 1 : 0);
// The most rows of a launch: a grid has so many blocks along y.
constexpr int64_t kLaunchRows = int64_t{65535} * kMaxRows;

// sums[g * kRows + r] += this lane's part of row_g(w) . row_r(a), for the last gate sums[kLast *
// kRows + r]. w: the unit's row of the first gate, the next gate gate_stride further; rows of a
// beyond the last are the last again.
template <int kGates, int kRows, int kLast, int kCount, typename T, typename W>
__device__ __forceinline__ void multiply(const T* a, int64_t a_stride, int last, const W* w,
                                         int64_t gate_stride, int64_t k, bool whole,
                                         Wide<T> (&sums)[kCount]) {
  const auto of = [](int gate) { return gate == kGates - 1 ? kLast : gate; };
  constexpr int kSize = Chunk<W>::kSize;
  const T* rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) rows[r] = a + min(r, last) * a_stride;
  const int64_t chunks = whole ? k / kSize : 0;
  // A load of each gate more in flight for each turn that is unrolled; the sums fill the registers.
#pragma unroll(kCount <= 4 ? 4 : 1)
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kStepThreads) {
    Chunk<W> weights[kGates];
#pragma unroll
    for (int g = 0; g < kGates; ++g)
      weights[g] = Chunk<W>::load(w + g * gate_stride + chunk * kSize);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int first = 0; first < kSize; first += Chunk<T>::kSize) {
        const Chunk<T> values = Chunk<T>::load(rows[r] + chunk * kSize + first);
#pragma unroll
        for (int g = 0; g < kGates; ++g)
#pragma unroll
          for (int i = 0; i < Chunk<T>::kSize; ++i)
            sums[of(g) * kRows + r] = fma(static_cast<Wide<T>>(widen(weights[g].values[first + i])),
                                          widen(values.values[i]), sums[of(g) * kRows + r]);
      }
  }
  // The rest, or all of it: lanes take neighbours, so that a warp still reads whole sectors.
#pragma unroll(kCount <= 4 ? 8 : 1)
  for (int64_t at = chunks * kSize + threadIdx.x; at < k; at += kStepThreads) {
    Wide<T> weights[kGates];
#pragma unroll
    for (int g = 0; g < kGates; ++g) weights[g] = widen(w[g * gate_stride + at]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Wide<T> value = widen(rows[r][at]);
#pragma unroll
      for (int g = 0; g < kGates; ++g)
        sums[of(g) * kRows + r] = fma(weights[g], value, sums[of(g) * kRows + r]);
    }
  }
}

// Rows [first, first + count) of the batch, 1 <= count <= kRows.
template <typename Cell, int kRows, typename T, typename W>
__device__ __forceinline__ void step(const SingleStepArgs<T, W>& args, int64_t first, int count,
                                     bool whole_x, bool whole_h) {
  using V = Wide<T>;
  constexpr int kGates = Cell::kGates, kCount = kSums<Cell> * kRows;
  const int64_t hidden = args.hidden, unit = blockIdx.x;
  V sums[kCount] = {};
  multiply<kGates, kRows, kGates - 1>(args.x + first * args.x_stride, args.x_stride, count - 1,
                                      args.w_ih + unit * args.w_ih_stride,
                                      hidden * args.w_ih_stride, args.input, whole_x, sums);
  multiply<kGates, kRows, kSums<Cell> - 1>(
      args.h_before + first * args.h_before_stride, args.h_before_stride, count - 1,
      args.w_hh + unit * args.w_hh_stride, hidden * args.w_hh_stride, args.output, whole_h, sums);
  const V sum = sum_lanes(sums);
  // Lane r < kRows collects the sums of row r.
  const int row = threadIdx.x % kRows;
  V gates[kGates], input[kGates], bias = 0;
#pragma unroll
  for (int g = 0; g < kGates; ++g) {
    gates[g] = __shfl_sync(~0u, sum, (g * kRows + row) * (32 / kCount));
    input[g] = args.b_hh ? widen(args.b_hh[g * hidden + unit]) : V(0);
    if (args.b_ih) gates[g] += widen(args.b_ih[g * hidden + unit]);
  }
  if constexpr (Cell::kProductBias) {  // what was summed up is the last gate's input
    bias = input[kGates - 1];
    input[kGates - 1] = gates[kGates - 1];
    gates[kGates - 1] = __shfl_sync(~0u, sum, (kGates * kRows + row) * (32 / kCount));
  }
  if (static_cast<int>(threadIdx.x) >= count) return;
  const int64_t of_batch = first + row, at = of_batch * hidden + unit;
  V before = 0, saved, out;
  if constexpr (Cell::kHasC) before = args.c_before ? args.c_before[at] : widen(args.c0[at]);
  if constexpr (needs_h<Cell>)
    before = widen(args.h_before[of_batch * args.h_before_stride + unit]);
  Cell::forward(gates, input, before, bias, saved, out);
  const T h = narrow<T>(out);
  args.h[of_batch * args.h_stride + unit] = h;
  if (args.h_n) args.h_n[at] = h;
  if constexpr (Cell::kSavedState)
    if (args.saved) args.saved[at] = saved;
  if constexpr (Cell::kHasC)
    if (args.c_n) args.c_n[at] = narrow<T>(saved);
  if (Cell::kSavedGates > 0 && args.gates) {
#pragma unroll
    for (int g = 0; g < kGates; ++g) args.gates[(of_batch * kGates + g) * hidden + unit] = gates[g];
  }
}

template <typename Cell, typename T, typename W>
__global__ void __launch_bounds__(kStepThreads)
    single_step(SingleStepArgs<T, W> args, int64_t launch_first, bool whole_x, bool whole_h) {
  const int64_t first = launch_first + int64_t{blockIdx.y} * kMaxRows;
  const int count = static_cast<int>(min(args.rows - first, int64_t{kMaxRows}));
  if (count == 1)
    step<Cell, 1>(args, first, count, whole_x, whole_h);
  else if (count == 2)
    step<Cell, 2>(args, first, count, whole_x, whole_h);
  else if (count <= 4)
    step<Cell, 4>(args, first, count, whole_x, whole_h);
  else
    step<Cell, 8>(args, first, count, whole_x, whole_h);
}

// Whether every row begins at a multiple of 16 bytes. Strides count even for a single row: its
// result has the same bits in any batch.
template <typename T>
bool rows_aligned(const T* p, int64_t stride) {
  return is_aligned(p) && stride % Chunk<T>::kSize == 0;
}

}  // namespace

template <CellKind cell, typename T, typename W>
int launch_single_step(const SingleStepArgs<T, W>& args, CudaStream stream) {
  if (args.rows == 0 || args.hidden == 0) return 0;
  const bool whole_x =
      rows_aligned(args.x, args.x_stride) && rows_aligned(args.w_ih, args.w_ih_stride);
  const bool whole_h = rows_aligned(args.h_before, args.h_before_stride) &&
                       rows_aligned(args.w_hh, args.w_hh_stride);
  int error = 0;
  for (int64_t first = 0; first < args.rows && error == 0; first += kLaunchRows) {
    const int64_t rows = min(args.rows - first, kLaunchRows);
    const dim3 grid(static_cast<unsigned>(args.hidden),
                    static_cast<unsigned>((rows + kMaxRows - 1) / kMaxRows));
    error =
        simt::launch(&single_step<typename CellOf<cell>::type, T, W>, grid, dim3(kStepThreads), 0,
                     static_cast<cudaStream_t>(stream), false, 1, args, first, whole_x, whole_h);
  }
  return error;
}

}  // namespace iss
