// SPDX-License-Identifier: Apache-2.0
// How the products of a layer are cut into tiles, and what lies where in a block's shared memory:
// for the kernels, and for the planner, which must know the sizes beforehand.
//
// Matrices lie in shared memory row by row, K along a row, in chunks of 16 bytes. A row has a
// multiple of 4 chunks, which is what one round of a product takes, and one more that stays empty:
// the odd stride puts 8 rows at one chunk into 8 different groups of banks.
#pragma once

#include <cstdint>

#include "cuda/plan.h"

#ifdef __CUDACC__
#define ISS_HOST_DEVICE __host__ __device__
#else
#define ISS_HOST_DEVICE
#endif

namespace iss {

// A warp multiplies up to 32 rows of weights, eights of them, with a few rows of the batch.
// Backward these are the columns of 32 units. Forward an eight is one gate of 8 units, and a lane
// ends up with all gates of a unit, or of several: 4 x 8 rows of an LSTM are 8 units, 3 x 8 of a
// GRU too, 4 x 8 of an RNN are 32 units.
constexpr int kWeightRows = 32;
constexpr int kUnits = 8;
ISS_HOST_DEVICE constexpr int units_of_lane(int gates) { return gates >= 4 ? 1 : 4 / gates; }
ISS_HOST_DEVICE constexpr int units_of_tile(int gates) { return kUnits * units_of_lane(gates); }

// Of a block. Registers: 16 warps of 128 each fill a multiprocessor; sums of double need more.
ISS_HOST_DEVICE constexpr int max_threads(Math math) { return math == Math::kFloat64 ? 256 : 512; }

// Backward, elements (a row's unit) whose gradient one thread carries from step to step.
constexpr int kItems = 2;

// Of a plan, what a kernel is told.
struct LayerTiles {
  int units, blocks, rows, groups, splits;
};
inline LayerTiles tiles_of(const LayerPlan& plan) {
  return {plan.units, plan.blocks, plan.rows, plan.groups, plan.splits};
}

ISS_HOST_DEVICE constexpr bool uses_tensor_cores(Math math) {
  return math != Math::kFloat32 && math != Math::kFloat64;
}
ISS_HOST_DEVICE constexpr int element_bytes(Math math) {
  return math == Math::kFloat64 ? 8 : math == Math::kFloat32 || math == Math::kTf32 ? 4 : 2;
}
ISS_HOST_DEVICE constexpr int wide_bytes(Math math) { return math == Math::kFloat64 ? 8 : 4; }

// Rows of the batch in a warp's pass over its weights. Tensor cores: two tiles of 8, so that a
// fragment of weights is used twice. FMA: what 32 sums (float) or 16 (double) per lane allow.
ISS_HOST_DEVICE constexpr int pass_rows(Math math) {
  return uses_tensor_cores(math) ? 16 : math == Math::kFloat64 ? 4 : 8;
}
// Of them, those that share one set of 4 x 2 results per lane.
ISS_HOST_DEVICE constexpr int tile_rows(Math math) { return math == Math::kFloat64 ? 4 : 8; }
// Tensor cores multiply 8 columns of the batch, or more. 4 rows take every other column, which
// leaves one to each lane.
ISS_HOST_DEVICE constexpr int column_step(Math math, int rows) {
  return uses_tensor_cores(math) && rows == 4 ? 2 : 1;
}

ISS_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Chunks of K elements, and from one row to the next.
ISS_HOST_DEVICE constexpr int chunks_of(Math math, int64_t k) {
  return static_cast<int>(ceil_div(k * element_bytes(math), 64) * 4);
}
ISS_HOST_DEVICE constexpr int stride_of(Math math, int64_t k) { return chunks_of(math, k) + 1; }

// Tier::kGrid, forward: chunks of one row of h in global memory.
ISS_HOST_DEVICE constexpr int exchange_chunks(Math math, int64_t hidden) {
  return static_cast<int>(ceil_div(hidden, kUnits) * kUnits * element_bytes(math) / 16);
}

// Tier::kGrid, backward: sums over the blocks are taken in so many slices at once, by different
// threads, so that all loads of a step are under way together.
ISS_HOST_DEVICE constexpr int slices_of(const LayerTiles& tiles, int threads) {
  const int slices = threads / (tiles.rows * tiles.units);
  return slices < 1 ? 1 : slices < tiles.blocks ? slices : tiles.blocks;
}

// Forward, buffers for h: the one read and the one being written. Through L2, blocks write to
// global memory and load all of it when every warp is done with the step before.
ISS_HOST_DEVICE constexpr int vectors_of(Tier tier) { return tier == Tier::kGrid ? 1 : 2; }

// Offsets in chunks. weights: forward [units * gates][H], in eights of rows, all gates of 8 units
// before the next 8; backward [H, to a multiple of 32][gates * units]. vectors: what they are
// multiplied with, forward h [buffers][rows][H]; backward the products' gradients
// [rows][gates * units]; 4 rows of tensor cores lie in 8. sums: forward of the splits after the
// first, as they lie in registers; backward [parts][rows][units] for each block and split, twice in
// a cluster, where others write while this block reads.
struct SharedLayout {
  int64_t weights, vectors, sums, end;
};
ISS_HOST_DEVICE constexpr SharedLayout shared_layout(Math math, Tier tier, bool backward, int gates,
                                                     int64_t hidden, const LayerTiles& tiles,
                                                     int threads) {
  const int64_t stride = stride_of(math, backward ? gates * tiles.units : hidden);
  const int64_t weight_rows =
      backward ? ceil_div(hidden, kWeightRows) * kWeightRows : gates * tiles.units;
  SharedLayout layout = {};
  layout.vectors = weight_rows * stride;
  const int columns = tiles.rows * column_step(math, tiles.rows);
  layout.sums = layout.vectors + (backward ? 1 : vectors_of(tier)) * columns * stride;
  int64_t sums = 0;  // in elements
  if (!backward) {
    sums = static_cast<int64_t>(tiles.splits - 1) * (tiles.units / kUnits) *
           ceil_div(tiles.rows, tile_rows(math)) * 32 * 2 * gates;
  } else {
    const int parts = tier == Tier::kBlock     ? tiles.splits
                      : tier == Tier::kCluster ? 2 * tiles.blocks * tiles.splits
                                               : slices_of(tiles, threads);
    sums = static_cast<int64_t>(parts) * tiles.rows * tiles.units;
  }
  layout.end = layout.sums + ceil_div(sums * wide_bytes(math), 16);
  return layout;
}

// Tier::kGrid: chunks of global memory that one group exchanges through, twice what a step takes.
ISS_HOST_DEVICE constexpr int64_t exchange_of(Math math, bool backward, int64_t hidden,
                                              const LayerTiles& tiles) {
  if (!backward) return 2 * tiles.rows * static_cast<int64_t>(exchange_chunks(math, hidden));
  return 2 * ceil_div(static_cast<int64_t>(tiles.blocks) * tiles.blocks * tiles.splits *
                          tiles.rows * tiles.units * wide_bytes(math),
                      16);
}

}  // namespace iss
