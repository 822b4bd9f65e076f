// SPDX-License-Identifier: Apache-2.0
// What the group-lasso kernels are told, and the functions that launch them. A weight is a matrix
// whose rows and columns each carry the id of the unit they belong to, or -1; all matrices of a
// model go into one launch, cut into tiles. Letters: R rows, C columns.
#pragma once

#include <cstdint>

#include "cuda/launches.h"
#include "cuda/tile.h"
#include "group_lasso.h"
#include "types.h"

namespace iss {

// A block has one tile at a time, each of its warps some rows of it. A lane has the same columns in
// every row, 32 bytes of floats: their labels, factors and sums stay in its registers.
struct LassoTile {
  static constexpr int kWarps = 8;
  // A column's sum in W's own precision adds up no more than 16 squares.
  static constexpr int kWarpRows = 16;
  static constexpr int kRows = kWarps * kWarpRows;
  template <typename W>
  static constexpr int kLaneColumns = sizeof(W) == 8 ? 4 : 8;
  template <typename W>
  static constexpr int kColumns = 32 * kLaneColumns<W>;
};

// 32 rows, or columns, of a matrix: their units or -1, and sums of squares, of no unit 0.
struct alignas(16) LabelStrip {
  static constexpr int kLabels = 32, kRanges = 2;
  int32_t units[kLabels];
  double sums[kLabels];
};
// Least and most of the units, but -1, of half a strip; least > most where it has none.
struct UnitRange {
  static constexpr int kLabels = LabelStrip::kLabels / LabelStrip::kRanges;
  int32_t least, most;
};

template <typename W>
struct LabelledMatrix {
  int64_t rows, columns;
  // Tiles of a column and of a row of them.
  ISS_HOST_DEVICE int64_t down() const { return ceil_div(rows, LassoTile::kRows); }
  ISS_HOST_DEVICE int64_t across() const { return ceil_div(columns, LassoTile::kColumns<W>); }
  ISS_HOST_DEVICE int64_t row_strips() const { return ceil_div(rows, LabelStrip::kLabels); }
  ISS_HOST_DEVICE int64_t column_strips() const { return ceil_div(columns, LabelStrip::kLabels); }
  const W* weight;              // [R, C]
  W* output;                    // [R, C]; may be weight
  const int32_t* row_units;     // [R]
  const int32_t* column_units;  // [C]
  Wide<W>* row_sums;            // [tiles across, R]; norms alone
  Wide<W>* column_sums;         // [tiles down, C]; norms alone
};

// By value, as an argument of the kernel: no copy to the device before each launch, nothing that
// must outlive it, and a captured graph has its own. 2 KB of the 4 that arguments may take.
template <typename W>
struct LabelledModel {
  static constexpr int kMatrices = 32;  // of one launch; a larger model takes several
  int count;
  int64_t units;  // ids from there on, as ids below 0, are no unit's
  LabelledMatrix<W> matrices[kMatrices];

  // Of its matrices in turn, first of all rows, then of all columns.
  int64_t strips() const {
    int64_t sum = 0;
    for (int i = 0; i < count; ++i) sum += matrices[i].row_strips() + matrices[i].column_strips();
    return sum;
  }
};

// norms[u] = sqrt(eps + the squares of all elements in rows or columns of unit u).
template <typename W>
struct GroupNormsArgs {
  LabelledModel<W> model;
  double eps;
  bool paper_overlap;            // count an element whose row and column share a unit twice
  bool more_before, more_after;  // launches for further matrices
  LabelStrip* strips;            // [strips of the model]; workspace
  UnitRange* ranges;             // [strips of the model][kRanges]; workspace
  double* squares;  // [units] of the launches before, then of this one too; else nullptr
  Wide<W>* norms;   // [units]
};

// ByUnits (group_lasso.h) for all elements of a model.
template <typename W>
struct ModelByUnitsArgs {
  LabelledModel<W> model;
  const Wide<W>* factors;  // [units]
  bool paper_overlap;      // kAddScaled alone
  bool overwrite;          // kAddScaled alone: output counts as 0
  Wide<W> threshold;       // kThreshold alone
};

// Each returns 0 or a cudaError_t; instances for float, double, Bfloat16 and Float16. Results do
// not depend on the number of multiprocessors.
template <typename W>
int launch_group_norms(const GroupNormsArgs<W>& args, int multiprocessors, CudaStream stream);
template <typename W>
int launch_by_units(ByUnits what, const ModelByUnitsArgs<W>& args, CudaStream stream);

}  // namespace iss
