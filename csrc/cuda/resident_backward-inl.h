// SPDX-License-Identifier: Apache-2.0
// The gradient of all time steps of a layer in one launch, but for the products that make the
// gradients of weights; this text is compiled once for each cell. Groups, blocks and units are
// those of forward (resident_forward-inl.h).
//
// dh of a step is dproducts @ w_hh of the step after it, a sum over all G H products. A block
// multiplies the gradients of its own units' products, which it has just made, with its rows of
// w_hh: a part of dh for all units. Each part goes to the block that owns the unit, which adds up
// parts in the order of blocks: no atomics, the same bits every time. Parts of dh are 1/G of what
// an exchange of dproducts would take, and only a block's own dproducts lie in shared memory.
//
// A step costs what a step forward does, and one more barrier within the block. The gradients of
// products go to memory after arrive(), from shared memory, where they are operands: with TF32 they
// keep 10 bits, as any product with them would.
#pragma once

#include "cuda/resident.h"

namespace iss {
namespace {

// What one element (a row's unit) needs at one step, as far as its cell needs it.
template <typename Cell, typename T>
struct ItemInputs {
  Wide<T> gates[Cell::kGates], saved, before, y;
  T dy;
};

template <typename Cell, Math math, Tier tier, int kRows>
__global__ void __launch_bounds__(max_threads(math), 1)
    resident_backward_kernel(ResidentBackwardArgs<Element<math>> args, LayerTiles tiles) {
  using T = Element<math>;
  using W = Wide<T>;
  constexpr int kGates = Cell::kGates, kEights = kWeightRows / kUnits;
  // As many loads together as the registers allow: the gradients that a split cell keeps take some.
  constexpr bool kFew = uses_tensor_cores(math) && math != Math::kTf32 && kRows <= 8;
  using P = WarpProduct<math, kRows, kEights, kFew && !Cell::kSplit ? 4 : 1>;
  constexpr int kSpread = column_step(math, kRows);

  SIMT_DYN_SHARED(uint4, shared);
  const int hidden = static_cast<int>(args.hidden), units = tiles.units;
  const int batch = static_cast<int>(args.sequence.batch);
  const SharedLayout layout = shared_layout(math, tier, true, kGates, hidden, tiles, blockDim.x);
  const int chunks = chunks_of(math, kGates * units), stride = chunks + 1;
  uint4* const weights = shared + layout.weights;  // row j, column gate * units + u
  uint4* const vectors = shared + layout.vectors;
  W* const sums = reinterpret_cast<W*>(shared + layout.sums);
  const int count = tiles.rows * units;  // of elements that this block owns

  Group<tier> group(tiles, args.arrivals);
  const int first_unit = group.rank * units;
  const int parts = tiles.blocks * tiles.splits;  // of a sum over the whole group
  const int buffer = parts * count;
  W* const exchange = reinterpret_cast<W*>(static_cast<uint4*>(args.exchange) +
                                           group.index * exchange_of(math, true, hidden, tiles));

  // Warps: tiles of 32 units of one pass, then the other passes; all of that per split.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int per_split = blockDim.x / 32 / tiles.splits;
  const int split = warp / per_split, worker = warp % per_split;
  const int unit_tiles = static_cast<int>(ceil_div(hidden, kWeightRows));
  const int products = unit_tiles * (tiles.rows > kRows ? tiles.rows / kRows : 1);
  const int lane_row = P::batch_row(lane);
  const KRange k = k_range(chunks, split, tiles.splits);
  // Of eight units to the block that owns them, by a multiplication: good below 1024 eights.
  const unsigned per_owner = (1u << 20) / (units / kUnits) + 1;

  fill<math, true>(weights, unit_tiles * kWeightRows, chunks, stride, [&](int row, int column) {
    const int u = first_unit + column % units, gate = column / units;
    const bool inside = row < hidden && u < hidden && gate < kGates;
    return inside ? operand<math>(args.w_hh[(gate * args.hidden + u) * hidden + row]) : T{};
  });
  fill<math, false>(vectors, tiles.rows * kSpread, chunks, stride, [](int, int) { return T{}; });
  group.sync_shared();

  int parity = 0;  // of the products, over all tiles of rows
  for (int batch_first = group.index * tiles.rows; batch_first < batch;
       batch_first += tiles.groups * tiles.rows) {
    int batch_row[kItems];                    // of this thread's elements, -1 where there is none
    int unit[kItems];                         // within this block
    W dh[kItems] = {}, carried[kItems] = {};  // carried: of an LSTM the gradient of c
#pragma unroll
    for (int n = 0; n < kItems; ++n) {
      const int item = threadIdx.x + n * blockDim.x;
      batch_row[n] = batch_first + item / units;
      unit[n] = item % units;
      if (item >= count || first_unit + unit[n] >= hidden || batch_row[n] >= batch)
        batch_row[n] = -1;
      if (batch_row[n] < 0) continue;
      const int64_t at = int64_t{batch_row[n]} * hidden + first_unit + unit[n];
      dh[n] = widen(args.dh_n[at]);
      if constexpr (Cell::kHasC) carried[n] = widen(args.dc_n[at]);
    }
    const auto own_vectors = [&](int n) {
      return reinterpret_cast<T*>(vectors + (batch_row[n] - batch_first) * kSpread * stride) +
             unit[n];
    };
    const auto runs = [&](int n, const StepRows& rows) {
      return batch_row[n] >= 0 && batch_row[n] < rows.n;
    };
    // Whether the state before the step of `rows` is zero. It is not loaded ahead, for want of
    // registers: other rows and steps share its cache line.
    const auto cuts = [&](int n, const StepRows& rows) {
      return args.sequence.cuts && args.sequence.cuts[rows.first + batch_row[n]];
    };
    ItemInputs<Cell, T> inputs[kItems] = {};
    // before: the rows of the step before in the layer's order; none where there is no such step.
    const auto load = [&](const StepRows& rows, const StepRows& before) {
#pragma unroll
      for (int n = 0; n < kItems; ++n) {
        if (!runs(n, rows)) continue;
        auto& in = inputs[n];
        const int64_t own = first_unit + unit[n], row = rows.first + batch_row[n];
        const int64_t at = row * hidden + own;
        // The state before the step, of every step and at the beginning.
        const auto state_before = [&](const auto* states, const T* first) {
          return batch_row[n] < before.n
                     ? widen(states[(before.first + batch_row[n]) * hidden + own])
                     : widen(first[int64_t{batch_row[n]} * hidden + own]);
        };
        if constexpr (Cell::kSavedGates > 0) {
          const W* gates = args.gates + row * kGates * hidden + own;
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) in.gates[gate] = gates[gate * hidden];
        }
        if constexpr (Cell::kSavedState) in.saved = args.saved[at];
        if constexpr (Cell::kHasC) in.before = state_before(args.saved, args.c0);
        if constexpr (needs_h<Cell>) in.before = state_before(args.y, args.h0);
        if constexpr (needs_y<Cell>) in.y = widen(args.y[at]);
        in.dy = args.dy[at];
      }
    };

    Walk<true> walk(args.sequence);  // one step ahead
    StepRows rows = {};
    int64_t left = args.sequence.steps + 1;
    const auto look_ahead = [&] {
      rows = walk.rows;
      if (--left == 0) return;
      if (left > 1)
        walk.go_on();
      else
        walk.rows = {};
      load(rows, walk.rows);
    };
    look_ahead();
    while (left > 0) {
      T dinputs[kItems][kGates];  // where they are not the products' too
#pragma unroll
      for (int n = 0; n < kItems; ++n) {
        if (batch_row[n] < 0) continue;
        W dproduct[kGates] = {};
        if (runs(n, rows)) {
          const auto& in = inputs[n];
          const bool cut = cuts(n, rows);
          W dinput[kGates], dbefore = 0;
          Cell::backward(dh[n] + widen(in.dy), carried[n], in.gates, in.saved,
                         cut ? W(0) : in.before, in.y, dinput, dproduct, dbefore);
          carried[n] = cut ? W(0) : dbefore;
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) {
            if constexpr (Cell::kSplit)
              dinputs[n][gate] = narrow<T>(dinput[gate]);
            else
              dproduct[gate] = dinput[gate];
          }
        }
        T* to = own_vectors(n);
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate)
          to[gate * units] = operand<math>(narrow<T>(dproduct[gate]));
      }
      const StepRows done = rows;
      // Memory takes as long as the product, or the wait for the others; through L2 there are
      // registers for it after that, while the parts are on their way.
      if constexpr (tier == Tier::kBlock) look_ahead();
      __syncthreads();

      // Part `rank * splits + split` of dh, to the owners of its units.
      for (int index = worker; index < products; index += per_split) {
        const int first = index % unit_tiles * kWeightRows;
        const int pass_first = index / unit_tiles * kRows;
        P product;
        product.run(weights + first * stride, vectors + pass_first * kSpread * stride, stride, k);
#pragma unroll
        for (int g = 0; g < kEights; ++g) {
          if (first + g * kUnits >= hidden) break;
          const int owner = tier == Tier::kBlock ? 0 : (first / kUnits + g) * per_owner >> 20;
          W* to = sums + split * count;
          const int part = parity * buffer + (group.rank * tiles.splits + split) * count;
          if constexpr (tier == Tier::kCluster) to = map_shared(sums, owner) + part;
          if constexpr (tier == Tier::kGrid) to = exchange + owner * 2 * buffer + part;
          to += first + g * kUnits - owner * units + P::weight_row(lane);
          if (lane_row < 0) continue;
#pragma unroll
          for (int n = 0; n < P::kTiles; ++n)
#pragma unroll
            for (int j = 0; j < P::kOfTile; ++j)
              to[(pass_first + lane_row + n * tile_rows(math) + j) * units] = product.sums[n][g][j];
        }
      }
      group.arrive();
#pragma unroll
      for (int n = 0; n < kItems; ++n) {
        if (!runs(n, done)) continue;
        const T* const from = own_vectors(n);
        const int64_t at = (done.first + batch_row[n]) * kGates * hidden + first_unit + unit[n];
        T* const dproducts = (Cell::kSplit ? args.dproducts : args.dinputs) + at;
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) {
          dproducts[gate * hidden] = from[gate * units];
          if constexpr (Cell::kSplit) args.dinputs[at + gate * hidden] = dinputs[n][gate];
        }
      }
      if constexpr (tier == Tier::kCluster) look_ahead();
      group.wait();
      if constexpr (tier == Tier::kGrid) look_ahead();

      const W* from = sums;
      int to_add = tier == Tier::kCluster ? parts : tiles.splits;
      if constexpr (tier == Tier::kCluster) from += parity * buffer;
      if constexpr (tier == Tier::kGrid) {
        to_add = slices_of(tiles, blockDim.x);
        const W* all = exchange + (group.rank * 2 + parity) * buffer;
        for (int i = threadIdx.x; i < to_add * count; i += blockDim.x) {
          const int item = i % count;
          if (first_unit + item % units >= hidden) continue;
          W sum = 0;
#pragma unroll 4
          for (int part = i / count; part < parts; part += to_add)
            sum += load_l2(all + part * count + item);
          sums[i] = sum;
        }
        __syncthreads();
      }
#pragma unroll
      for (int n = 0; n < kItems; ++n) {
        if (!runs(n, done)) continue;
        W sum = 0;
// As many loads together as registers allow.
#pragma unroll(tier == Tier::kCluster ? 4 : tier == Tier::kGrid ? 2 : 1)
        for (int part = 0; part < to_add; ++part)
          sum += from[part * count + threadIdx.x + n * blockDim.x];
        if constexpr (needs_h<Cell>) sum += carried[n];
        dh[n] = cuts(n, done) ? W(0) : sum;
      }
      parity ^= 1;
    }

#pragma unroll
    for (int n = 0; n < kItems; ++n) {
      if (batch_row[n] < 0) continue;
      const int64_t at = int64_t{batch_row[n]} * hidden + first_unit + unit[n];
      args.dh0[at] = narrow<T>(dh[n]);
      if constexpr (Cell::kHasC) args.dc0[at] = narrow<T>(carried[n]);
    }
  }
}

template <typename Cell, typename T>
SequenceKernel<ResidentBackwardArgs<T>> resident_backward_of(const LayerPlan& plan) {
  return with_kernel<T>(plan, [](auto v) {
    return SequenceKernel<ResidentBackwardArgs<T>>(
        resident_backward_kernel<Cell, v.math, v.tier, v.rows>);
  });
}

}  // namespace

template <CellKind cell, typename T>
int launch_resident_backward(const LayerPlan& plan, const ResidentBackwardArgs<T>& args,
                             CudaStream stream) {
  return launch_sequence(resident_backward_of<typename CellOf<cell>::type, T>(plan), plan, args,
                         stream);
}
template <CellKind cell, typename T>
bool can_launch_resident_backward(const LayerPlan& plan) {
  return fits_device(resident_backward_of<typename CellOf<cell>::type, T>(plan), plan);
}

}  // namespace iss
