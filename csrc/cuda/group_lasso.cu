// SPDX-License-Identifier: Apache-2.0
// The group lasso on the GPU: each op is one launch that walks over all matrices of a model and
// reads each weight once, at the speed of memory.

#include "cuda/group_lasso_kernels.h"

#include "cuda/math.h"

namespace iss {
namespace {

constexpr int kThreads = 32 * LassoTile::kWarps;
constexpr int kWarpRows = LassoTile::kWarpRows;
// Rows of a warp whose loads are under way together: 16 of 16 bytes for each lane, 64 KB for a
// multiprocessor. Adding up their squares over a warp takes 9 shuffles.
constexpr int kTogether = 8;
// Blocks of a multiprocessor: one computes while the other waits for memory, with 128 registers
// each for loads under way.
constexpr int kBlocks = 2;

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }

// What a lane has of each row of a tile: kChunks times 16 bytes, 32 of these apart; or, where rows
// do not begin at multiples of 16 bytes, single elements, 32 apart.
template <typename W, bool kWhole>
struct Columns {
  static constexpr int kCount = LassoTile::kLaneColumns<W>;
  static constexpr int kSize = kWhole ? Chunk<W>::kSize : 1;
  int64_t first;
  bool inside[kCount / kSize];  // of each chunk: a matrix whose rows are whole ends with a chunk

  __device__ __forceinline__ Columns(int64_t tile_begin, int64_t columns, int of_lane)
      : first(tile_begin + of_lane * kSize) {
#pragma unroll
    for (int k = 0; k < kCount / kSize; ++k) inside[k] = first + 32 * k * kSize < columns;
  }
  __device__ __forceinline__ bool has(int i) const { return inside[i / kSize]; }
  __device__ __forceinline__ int64_t operator[](int i) const {
    return first + 32 * (i / kSize) * kSize + i % kSize;
  }

  // 0 where there is nothing; row: whether there is one at `from`.
  __device__ __forceinline__ void load(const W* from, bool row, Wide<W> (&w)[kCount]) const {
#pragma unroll
    for (int k = 0; k < kCount / kSize; ++k) {
      const W* const at = from + first + 32 * k * kSize;
      if constexpr (kWhole) {
        Chunk<W> chunk = {};
        if (row && inside[k]) chunk = Chunk<W>::load(at);
#pragma unroll
        for (int i = 0; i < kSize; ++i) w[k * kSize + i] = widen(chunk.values[i]);
      } else {
        w[k] = row && inside[k] ? widen(*at) : Wide<W>(0);
      }
    }
  }
  __device__ __forceinline__ void store(const Wide<W> (&w)[kCount], bool row, W* to) const {
#pragma unroll
    for (int k = 0; k < kCount / kSize; ++k) {
      W* const at = to + first + 32 * k * kSize;
      if (!row || !inside[k]) continue;
      if constexpr (kWhole) {
        Chunk<W> chunk;
#pragma unroll
        for (int i = 0; i < kSize; ++i) chunk.values[i] = narrow<W>(w[k * kSize + i]);
        chunk.store(at);
      } else {
        *at = narrow<W>(w[k]);
      }
    }
  }
};

// One tile of a model, by its number.
template <typename W>
struct Tile {
  const LabelledMatrix<W>* matrix;
  int down, across;
  bool whole;  // every row begins at a multiple of 16 bytes

  __device__ __forceinline__ Tile(const LabelledModel<W>& model, int64_t number) {
    matrix = model.matrices;
    unsigned left = static_cast<unsigned>(number), columns;
    for (;; ++matrix) {
      columns = static_cast<unsigned>(matrix->across());
      const unsigned tiles = static_cast<unsigned>(matrix->down()) * columns;
      if (left < tiles) break;
      left -= tiles;
    }
    down = left / columns;
    across = left % columns;
    whole = matrix->columns % Chunk<W>::kSize == 0 && is_aligned(matrix->weight) &&
            is_aligned(matrix->output);
  }
  __device__ __forceinline__ int64_t first_row() const {  // of this warp
    return int64_t{down} * LassoTile::kRows + warp() * kWarpRows;
  }
  __device__ __forceinline__ int64_t first_column() const {
    return int64_t{across} * LassoTile::kColumns<W>;
  }
};

// Sums of squares over one tile: over its columns for each row, over its rows for each column,
// those without what the row of the same unit has counted. `shared`: [warps][lane columns][lanes].
template <typename W, bool kWhole>
__device__ __forceinline__ void add_squares(const Tile<W>& tile, bool paper_overlap,
                                            Wide<W> (*shared)[LassoTile::kColumns<W>]) {
  using T = Wide<W>;
  constexpr int kCount = LassoTile::kLaneColumns<W>;
  const LabelledMatrix<W>& m = *tile.matrix;
  const Columns<W, kWhole> columns(tile.first_column(), m.columns, lane());
  const int64_t first_row = tile.first_row();
  int32_t units[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) units[i] = columns.has(i) ? m.column_units[columns[i]] : -1;
  T column_sums[kCount] = {};
#pragma unroll 1
  for (int64_t first = first_row; first < first_row + kWarpRows; first += kTogether) {
    T row_sums[kTogether] = {};
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      const bool row = first + r < m.rows;
      const int32_t own = row && !paper_overlap ? m.row_units[first + r] : -1;
      T w[kCount];
      columns.load(m.weight + (first + r) * m.columns, row, w);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        row_sums[r] = fused(w[i], w[i], row_sums[r]);
        // Columns of no unit may be left out too: nobody asks for their sums.
        if (units[i] != own) column_sums[i] = fused(w[i], w[i], column_sums[i]);
      }
    }
    const T row_sum = sum_lanes(row_sums);
    const int64_t row = first + lane() * kTogether / 32;
    if (lane() % (32 / kTogether) == 0 && row < m.rows)
      m.row_sums[tile.across * m.rows + row] = row_sum;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) shared[warp()][32 * i + lane()] = column_sums[i];
  __syncthreads();
  if (warp() < kCount) {  // warp i adds up column i of every lane
    double sum = 0;
#pragma unroll
    for (int from = 0; from < LassoTile::kWarps; ++from) sum += shared[from][threadIdx.x];
    const int64_t column = columns[warp()];
    if (column < m.columns) m.column_sums[tile.down * m.columns + column] = static_cast<T>(sum);
  }
}

// Adds to `sum` of lane l what the rows (or columns) of unit first + l have in `sums`
// [parts, count]; this warp's share of them, in order.
template <typename T>
__device__ __forceinline__ void collect(const int32_t* labels, int64_t count, const T* sums,
                                        int64_t parts, int32_t first, double& sum) {
  constexpr int kAhead = 8;  // labels of a lane under way at a time
  for (int64_t begin = 32 * warp(); begin < count; begin += kAhead * kThreads) {
    int32_t unit[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t at = begin + k * kThreads + lane();
      unit[k] = at < count ? labels[at] : -1;
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int own = unit[k] - first;  // the lane that adds it up
      const bool hit = unit[k] >= first && own < 32;
      const unsigned hits = __ballot_sync(~0u, hit);
      if (hits == 0) continue;
      double value = 0;
      const T* from = sums + begin + k * kThreads + lane();
#pragma unroll 4
      for (int64_t part = 0; hit && part < parts; ++part) value += load_l2(from + part * count);
#pragma unroll 1
      for (int source = 0; source < 32; ++source) {
        if ((hits >> source & 1) == 0) continue;
        const double given = __shfl_sync(~0u, value, source);
        if (__shfl_sync(~0u, own, source) == lane()) sum += given;
      }
    }
  }
}

// First all tiles, each block every gridDim-th; then, once all blocks have come so far, the sums of
// 32 units a block, one a lane: its warps divide the labels of the whole model among them, and add
// up those they find in order. So no block needs a list of a unit's rows and columns, nothing is
// added atomically, and the labels, some 1/1000 of the weights, are read from L2 once per block.
template <typename W>
__global__ void __launch_bounds__(kThreads, kBlocks)
    group_norms(const __grid_constant__ GroupNormsArgs<W> args, int64_t tiles) {
  using T = Wide<W>;
  SIMT_SHARED(T, columns, [2][LassoTile::kWarps][LassoTile::kColumns<W>]);
  SIMT_SHARED(double, parts, [LassoTile::kWarps][32]);
  int turn = 0;  // the next tile's column sums go where the last but one's were: one barrier a tile
  for (int64_t number = blockIdx.x; number < tiles; number += gridDim.x, turn ^= 1) {
    const Tile<W> tile(args.model, number);
    if (tile.whole)
      add_squares<W, true>(tile, args.paper_overlap, columns[turn]);
    else
      add_squares<W, false>(tile, args.paper_overlap, columns[turn]);
  }
  grid_sync();
  const int64_t units = args.model.units;
  for (int64_t first = 32 * int64_t{blockIdx.x}; first < units; first += 32 * int64_t{gridDim.x}) {
    double sum = 0;
    for (int i = 0; i < args.model.count; ++i) {
      const LabelledMatrix<W>& m = args.model.matrices[i];
      collect(m.row_units, m.rows, m.row_sums, m.across(), static_cast<int32_t>(first), sum);
      collect(m.column_units, m.columns, m.column_sums, m.down(), static_cast<int32_t>(first), sum);
    }
    parts[warp()][lane()] = sum;
    __syncthreads();
    const int64_t unit = first + lane();
    if (warp() == 0 && unit < units) {
      sum = args.more_before ? args.squares[unit] : args.eps;
#pragma unroll
      for (int from = 0; from < LassoTile::kWarps; ++from) sum += parts[from][lane()];
      if (args.more_after)
        args.squares[unit] = sum;
      else
        args.norms[unit] = static_cast<T>(sqrt(sum));
    }
    __syncthreads();
  }
}

// What a row or column of `unit` contributes.
template <typename W, ByUnits kWhat>
__device__ __forceinline__ Wide<W> of_unit(const ModelByUnitsArgs<W>& args, int32_t unit) {
  if (unit < 0 || unit >= args.model.units) return kWhat == ByUnits::kScale ? 1 : 0;
  if constexpr (kWhat == ByUnits::kThreshold)
    return args.threshold;
  else
    return args.factors[unit];
}

template <typename W, ByUnits kWhat, bool kWhole>
__device__ __forceinline__ void walk(const ModelByUnitsArgs<W>& args, const Tile<W>& tile) {
  using T = Wide<W>;
  constexpr int kCount = LassoTile::kLaneColumns<W>;
  const LabelledMatrix<W>& m = *tile.matrix;
  const Columns<W, kWhole> columns(tile.first_column(), m.columns, lane());
  const int64_t first_row = tile.first_row();
  int32_t units[kCount];
  T of_column[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    units[i] = columns.has(i) ? m.column_units[columns[i]] : -1;
    of_column[i] = of_unit<W, kWhat>(args, units[i]);
  }
#pragma unroll 4  // rows whose loads are under way together
  for (int r = 0; r < kWarpRows; ++r) {
    const bool row = first_row + r < m.rows;
    const int64_t at = (first_row + r) * m.columns;
    const int32_t unit = row ? m.row_units[first_row + r] : -1;
    const T of_row = of_unit<W, kWhat>(args, unit);
    T w[kCount], result[kCount] = {};
    columns.load(m.weight + at, row, w);
    if (kWhat == ByUnits::kAddScaled && !args.overwrite) columns.load(m.output + at, row, result);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool once = unit >= 0 && unit == units[i];
      if constexpr (kWhat == ByUnits::kAddScaled)
        result[i] =
            fused(w[i], of_row + (once && !args.paper_overlap ? T(0) : of_column[i]), result[i]);
      else if constexpr (kWhat == ByUnits::kScale)
        result[i] = w[i] * (of_row * (once ? T(1) : of_column[i]));
      else
        result[i] = (w[i] < 0 ? -w[i] : w[i]) < max(of_row, of_column[i]) ? T(0) : w[i];
    }
    columns.store(result, row, m.output + at);
  }
}

template <typename W, ByUnits kWhat>
__global__ void __launch_bounds__(kThreads, kBlocks)
    by_units(const __grid_constant__ ModelByUnitsArgs<W> args) {
  const Tile<W> tile(args.model, blockIdx.x);
  if (tile.whole)
    walk<W, kWhat, true>(args, tile);
  else
    walk<W, kWhat, false>(args, tile);
}

template <typename W>
int64_t tiles_of(const LabelledModel<W>& model) {
  int64_t tiles = 0;
  for (int i = 0; i < model.count; ++i)
    tiles += model.matrices[i].down() * model.matrices[i].across();
  return tiles;
}

}  // namespace

template <typename W>
int launch_group_norms(const GroupNormsArgs<W>& args, int multiprocessors, CudaStream stream) {
  const int64_t tiles = tiles_of(args.model);
  if (args.model.units == 0) return 0;
  const int64_t wanted = max(tiles, (args.model.units + 31) / 32);
  const dim3 grid(static_cast<unsigned>(min(wanted, int64_t{kBlocks} * multiprocessors)));
  return simt::launch(&group_norms<W>, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream),
                      true, 1, args, tiles);
}

template <typename W>
int launch_by_units(ByUnits what, const ModelByUnitsArgs<W>& args, CudaStream stream) {
  const dim3 grid(static_cast<unsigned>(tiles_of(args.model)));
  if (grid.x == 0) return 0;
  const auto kernel = what == ByUnits::kAddScaled ? &by_units<W, ByUnits::kAddScaled>
                      : what == ByUnits::kScale   ? &by_units<W, ByUnits::kScale>
                                                  : &by_units<W, ByUnits::kThreshold>;
  return simt::launch(kernel, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), false, 1,
                      args);
}

#define ISS_INSTANCE(W)                                                       \
  template int launch_group_norms(const GroupNormsArgs<W>&, int, CudaStream); \
  template int launch_by_units(ByUnits, const ModelByUnitsArgs<W>&, CudaStream);
ISS_EACH_DTYPE(ISS_INSTANCE)
#undef ISS_INSTANCE

}  // namespace iss
