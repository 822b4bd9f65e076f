// SPDX-License-Identifier: Apache-2.0
// All time steps of a layer in one launch; this text is compiled once for each cell. A group of
// blocks owns `rows` rows of the batch; each block owns `units` units and keeps their recurrent
// weights in shared memory. A warp owns a tile of units (8, or 32 of an RNN) and a pass of rows:
// its product leaves all gates of a unit in one lane, which finishes the cell in registers. Then h
// goes to the other blocks of the group, into the buffer that the step after reads: one exchange,
// and one barrier of the group, per step.
//
// What a step costs a block: G units * H * size / 128 clocks to read the weights once per pass of
// rows (shared memory gives 128 bytes a clock); for FMA at least G units * H * rows / 128 clocks of
// arithmetic; then the cells and the exchange. In a small layer all of these are short and what
// counts is the chain of instructions from one h to the next: what need not be in it, addresses,
// the results for memory, the loads for the next step, stands between arrive() and wait().
#pragma once

#include "cuda/resident.h"

namespace iss {
namespace {

// What one lane has of something: of kOfTile rows in each tile of its warp's pass.
template <typename P, typename V>
using OfLane = V[P::kTiles][P::kOfTile];

// f(n, j) for each of them.
template <typename P, typename F>
__device__ __forceinline__ void each_row_of_lane(F f) {
#pragma unroll
  for (int n = 0; n < P::kTiles; ++n)
#pragma unroll
    for (int j = 0; j < P::kOfTile; ++j) f(n, j);
}
// f(n, j, q) for each of the kUnitsOfLane units of each of them.
template <typename P, int kUnitsOfLane, typename F>
__device__ __forceinline__ void each_of_lane(F f) {
  each_row_of_lane<P>([&](int n, int j) {
#pragma unroll
    for (int q = 0; q < kUnitsOfLane; ++q) f(n, j, q);
  });
}

// Adds what the other splits of K have made of the same tiles to what split 0 has, in order.
template <typename P, typename W>
__device__ __forceinline__ void add_splits(P& product, W* partial, int split, int splits,
                                           int per_split) {
  const int lane = threadIdx.x % 32, worker = threadIdx.x / 32 % per_split;
  const auto slot = [&](int from, int n, int g, int j) -> W& {
    const int tile = ((from - 1) * per_split + worker) * P::kTiles + n;
    return partial[((tile * P::kEights + g) * P::kOfTile + j) * 32 + lane];
  };
  if (split > 0)
    each_row_of_lane<P>([&](int n, int j) {
#pragma unroll
      for (int g = 0; g < P::kEights; ++g) slot(split, n, g, j) = product.sums[n][g][j];
    });
  __syncthreads();
  if (split > 0) return;
#pragma unroll 1
  for (int from = 1; from < splits; ++from)
    each_row_of_lane<P>([&](int n, int j) {
#pragma unroll
      for (int g = 0; g < P::kEights; ++g) product.sums[n][g][j] += slot(from, n, g, j);
    });
}

template <typename Cell, Math math, Tier tier, int kRows>
__global__ void __launch_bounds__(max_threads(math), 1)
    resident_forward_kernel(ResidentForwardArgs<Element<math>> args, LayerTiles tiles) {
  using T = Element<math>;
  using W = Wide<T>;
  constexpr int kGates = Cell::kGates, kUnitsOfLane = units_of_lane(kGates);
  // As many loads together as the registers of every cell allow.
  constexpr int kTogether = !uses_tensor_cores(math) ? (kRows <= 2 ? 2 : 1)
                            : kRows <= 8             ? 4
                                                     : (kGates == 4 ? 2 : 1);
  using P = WarpProduct<math, kRows, kGates * kUnitsOfLane, kTogether>;
  constexpr int kUnitsOfTile = units_of_tile(kGates);
  constexpr int kTileRows = kGates * kUnitsOfTile;            // of weights
  constexpr int kTileChunks = kUnitsOfTile * sizeof(T) / 16;  // of h, of one row
  constexpr int kSpread = column_step(math, kRows);

  SIMT_DYN_SHARED(uint4, shared);
  const int hidden = static_cast<int>(args.hidden);
  const int batch = static_cast<int>(args.sequence.batch);
  const SharedLayout layout = shared_layout(math, tier, false, kGates, hidden, tiles, blockDim.x);
  const int chunks = chunks_of(math, hidden), stride = chunks + 1;
  uint4* const weights = shared + layout.weights;
  uint4* const vectors = shared + layout.vectors;
  const int columns = tiles.rows * kSpread;
  const int buffer = (vectors_of(tier) - 1) * columns * stride;  // to the other of two vectors
  W* const partial_sums = reinterpret_cast<W*>(shared + layout.sums);

  Group<tier> group(tiles, args.arrivals);
  const int first_unit = group.rank * tiles.units;
  const int row_chunks = exchange_chunks(math, hidden);
  uint4* const exchange =
      static_cast<uint4*>(args.exchange) + group.index * exchange_of(math, false, hidden, tiles);

  // Warps: the units' tiles of one pass, then the other passes, then all of that per split.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int unit_tiles = tiles.units / kUnitsOfTile;
  const int per_split = blockDim.x / 32 / tiles.splits;
  const int split = warp / per_split, unit_tile = warp % per_split % unit_tiles;
  const int pass_first = warp % per_split / unit_tiles * kRows;  // in the group's rows
  const KRange k = k_range(chunks, split, tiles.splits);
  const int tile_first = first_unit + unit_tile * kUnitsOfTile;
  const int unit = tile_first + P::weight_row(lane);  // the first of this lane's, 8 apart
  const int lane_row = pass_first + P::batch_row(lane);
  const bool works = tile_first < hidden;     // the last block may have tiles to spare
  const bool finishes = works && split == 0;  // and holds the state
  const bool publishes = finishes && P::batch_row(lane) >= 0;
  bool owns[kUnitsOfLane];
#pragma unroll
  for (int q = 0; q < kUnitsOfLane; ++q) owns[q] = publishes && unit + q * kUnits < hidden;
  const uint4* const tile_weights = weights + unit_tile * kTileRows * stride;
  const uint4* const pass_vectors = vectors + pass_first * kSpread * stride;
  T* const own_vectors = reinterpret_cast<T*>(vectors + lane_row * kSpread * stride) + unit;

  fill<math, false>(weights, kGates * tiles.units, chunks, stride, [&](int row, int column) {
    const int u = first_unit + row / (kGates * kUnits) * kUnits + row % kUnits;
    const int gate = row / kUnits % kGates;
    const bool inside = u < hidden && column < hidden;
    return inside ? operand<math>(args.w_hh[(gate * args.hidden + u) * hidden + column]) : T{};
  });
  if (buffer > 0)
    fill<math, false>(vectors + buffer, columns, chunks, stride, [](int, int) { return T{}; });
  W bias[kUnitsOfLane] = {};
  if constexpr (Cell::kProductBias) {
#pragma unroll
    for (int q = 0; q < kUnitsOfLane; ++q)
      if (owns[q] && args.product_bias) bias[q] = widen(args.product_bias[unit + q * kUnits]);
  }

  for (int batch_first = group.index * tiles.rows; batch_first < batch;
       batch_first += tiles.groups * tiles.rows) {
    const auto row_of = [&](int n, int j) {  // of the batch
      return batch_first + lane_row + n * tile_rows(math) + j;
    };
    struct Inputs {
      T of[kUnitsOfLane][kGates];
    };
    OfLane<P, Inputs> inputs = {};
    const auto load_inputs = [&](const StepRows& rows) {
      each_of_lane<P, kUnitsOfLane>([&](int n, int j, int q) {
        const int b = row_of(n, j);
        if (!owns[q] || b >= rows.n) return;
        const T* from = args.inputs + (rows.first + b) * kGates * hidden + unit + q * kUnits;
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) inputs[n][j].of[q][gate] = from[gate * hidden];
      });
    };

    group.sync_shared();  // the tile before may still be in use
    fill<math, false>(vectors, columns, chunks, stride, [&](int row, int column) {
      const int b = batch_first + row / kSpread;
      const bool inside = row % kSpread == 0 && b < batch && column < hidden;
      return inside ? operand<math>(args.h0[int64_t{b} * hidden + column]) : T{};
    });
    OfLane<P, W[kUnitsOfLane]> h = {}, saved = {};  // saved: c of an LSTM
    each_of_lane<P, kUnitsOfLane>([&](int n, int j, int q) {
      const int b = row_of(n, j);
      if (!owns[q] || b >= batch) return;
      const int64_t at = int64_t{b} * hidden + unit + q * kUnits;
      h[n][j][q] = widen(args.h0[at]);
      if constexpr (Cell::kHasC) saved[n][j][q] = widen(args.c0[at]);
    });
    Walk<false> walk(args.sequence);
    load_inputs(walk.rows);
    group.sync();

    int now = 0;     // the buffer that is read
    int parity = 0;  // of the step
    for (;;) {
      P product = {};
      if (works) {
        if constexpr (uses_tensor_cores(math)) __syncwarp();  // lanes came by different ways
        product.run(tile_weights, pass_vectors + now, stride, k);
      }
      if (tiles.splits > 1) add_splits(product, partial_sums, split, tiles.splits, per_split);

      const int next = buffer - now;
      uint4* const published =
          tier == Tier::kGrid ? exchange + parity * tiles.rows * row_chunks : nullptr;
      if (publishes)
        each_of_lane<P, kUnitsOfLane>([&](int n, int j, int q) {
          if (owns[q] && row_of(n, j) < walk.rows.n) {
            // Not loaded ahead, for want of registers: other rows and steps share its cache line.
            const bool cut = walk.cuts(row_of(n, j));
            W gates[kGates], input[kGates];
#pragma unroll
            for (int gate = 0; gate < kGates; ++gate) {
              gates[gate] = cut ? W(0) : product.sums[n][q * kGates + gate][j];
              input[gate] = widen(inputs[n][j].of[q][gate]);
            }
            const W before = cut ? W(0) : Cell::kHasC ? saved[n][j][q] : h[n][j][q];
            W out;
            Cell::forward(gates, input, before, bias[q], saved[n][j][q], out);
            h[n][j][q] = widen(narrow<T>(out));
#pragma unroll
            for (int gate = 0; gate < kGates; ++gate)
              product.sums[n][q * kGates + gate][j] = gates[gate];
          }
          if (kUnitsOfLane > 1 && tile_first + q * kUnits >= hidden) return;
          // A row that does not run has the same h, for when it will.
          const int below = n * tile_rows(math) + j;  // rows
          T* const to =
              tier == Tier::kGrid
                  ? reinterpret_cast<T*>(published + (lane_row + below) * row_chunks) + unit
                  : own_vectors + (next + below * kSpread * stride) * (16 / sizeof(T));
          to[q * kUnits] = operand<math>(narrow<T>(h[n][j][q]));
        });
      const StepRows done = walk.rows;
      const bool last = walk.is_last();
      if (!last) {
        // The warp's tile of h to the others, 16 bytes at a time.
        if constexpr (tier == Tier::kCluster) {
          if (finishes) {
            __syncwarp();
            constexpr int kCount = kRows * kTileChunks;
// 16 rows leave no registers for more at a time.
#pragma unroll(kRows > 8 ? 1 : 4)
            for (int i = lane; i < kCount * (group.blocks - 1); i += 32) {
              const int row = pass_first + i % kCount / kTileChunks;
              const int chunk = tile_first * static_cast<int>(sizeof(T)) / 16 + i % kTileChunks;
              if (kUnitsOfLane > 1 && chunk >= row_chunks) continue;
              const int to = group.rank + 1 + i / kCount;
              uint4* const from = vectors + next + row * kSpread * stride + chunk;
              *map_shared(from, to < group.blocks ? to : to - group.blocks) = *from;
            }
          }
        }
        group.arrive();
        walk.go_on();
        load_inputs(walk.rows);
      }

      each_of_lane<P, kUnitsOfLane>([&](int n, int j, int q) {
        const int b = row_of(n, j), own = unit + q * kUnits;
        if (!owns[q] || b >= done.n) return;
        const int64_t at = done.first + b;
        args.y[at * hidden + own] = narrow<T>(h[n][j][q]);
        if (Cell::kSavedGates > 0 && args.gates) {
          W* to = args.gates + at * kGates * hidden + own;
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate)
            to[gate * hidden] = product.sums[n][q * kGates + gate][j];
          if constexpr (Cell::kSavedState) args.saved[at * hidden + own] = saved[n][j][q];
        }
      });
      if (last) break;

      group.wait();
      now = next;
      parity ^= 1;
      if constexpr (tier == Tier::kGrid) {
#pragma unroll(kRows > 8 ? 2 : 4)
        for (int i = threadIdx.x; i < tiles.rows * row_chunks; i += blockDim.x)
          vectors[i / row_chunks * kSpread * stride + i % row_chunks] = load_l2(published + i);
        __syncthreads();
      }
    }

    each_of_lane<P, kUnitsOfLane>([&](int n, int j, int q) {
      const int b = row_of(n, j);
      if (!owns[q] || b >= batch) return;
      const int64_t at = int64_t{b} * hidden + unit + q * kUnits;
      args.h_n[at] = narrow<T>(h[n][j][q]);
      if constexpr (Cell::kHasC) args.c_n[at] = narrow<T>(saved[n][j][q]);
    });
  }
}

template <typename Cell, typename T>
SequenceKernel<ResidentForwardArgs<T>> resident_forward_of(const LayerPlan& plan) {
  return with_kernel<T>(plan, [](auto v) {
    return SequenceKernel<ResidentForwardArgs<T>>(
        resident_forward_kernel<Cell, v.math, v.tier, v.rows>);
  });
}

}  // namespace

template <CellKind cell, typename T>
int launch_resident_forward(const LayerPlan& plan, const ResidentForwardArgs<T>& args,
                            CudaStream stream) {
  return launch_sequence(resident_forward_of<typename CellOf<cell>::type, T>(plan), plan, args,
                         stream);
}
template <CellKind cell, typename T>
bool can_launch_resident_forward(const LayerPlan& plan) {
  return fits_device(resident_forward_of<typename CellOf<cell>::type, T>(plan), plan);
}

}  // namespace iss
