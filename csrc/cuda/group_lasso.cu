// SPDX-License-Identifier: Apache-2.0
// The group lasso on the GPU: each op is one launch that walks over all matrices of a model and
// reads each weight once, at the speed of memory.

#include "cuda/group_lasso_kernels.h"

#include <cstdint>
#include <type_traits>

#include "cuda/math.h"

namespace iss {
namespace {

constexpr int kThreads = 32 * LassoTile::kWarps;
constexpr int kWarpRows = LassoTile::kWarpRows;
// Rows of a warp whose loads are under way together: of floats 8 KB for each warp, 128 KB for a
// multiprocessor, of which 27 KB (3 TB/s for 1.2 us over 132 of these) must be at all times. Adding
// up the squares of 8 rows over a warp takes 9 shuffles.
constexpr int kTogether = 8;
// Blocks of a multiprocessor: one computes while the other waits for memory, with 128 registers
// each for loads under way.
constexpr int kBlocks = 2;
// Units that a block adds up at a time: 2 x 132 blocks have room for 4224.
constexpr int kBlockUnits = 16;

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }

// What a lane has of each row of a tile: chunks of kBytes, 32 of these apart.
template <typename W, int kBytes>
struct Columns {
  using C = Chunk<W, kBytes>;
  static constexpr int kCount = LassoTile::kLaneColumns<W>;
  static constexpr int kSize = C::kSize;
  static constexpr int kChunks = kCount / kSize;
  int64_t first;
  int left;  // from there on; a row ends with a chunk

  struct Row {
    C chunks[kChunks];
    __device__ __forceinline__ Wide<W> operator[](int i) const {
      return widen(chunks[i / kSize].values[i % kSize]);
    }
    __device__ __forceinline__ void set(int i, Wide<W> value) {
      chunks[i / kSize].values[i % kSize] = narrow<W>(value);
    }
  };

  __device__ __forceinline__ Columns(int64_t tile_begin, int64_t columns, int of_lane)
      : first(tile_begin + of_lane * kSize),
        left(static_cast<int>(min(columns - first, int64_t{LassoTile::kColumns<W>}))) {}
  static __device__ __forceinline__ constexpr int offset(int i) {  // of column i from `first`
    return 32 * (i / kSize) * kSize + i % kSize;
  }
  __device__ __forceinline__ bool has(int i) const { return offset(i) < left; }

  // 0 where there is nothing; row: whether there is one at `from`.
  __device__ __forceinline__ Row load(const W* from, bool row) const {
    Row result = {};
    const int count = row ? left : 0;
#pragma unroll
    for (int k = 0; k < kChunks; ++k)
      if (offset(k * kSize) < count) result.chunks[k] = C::load(from + first + offset(k * kSize));
    return result;
  }
  __device__ __forceinline__ void store(const Row& values, bool row, W* to) const {
    const int count = row ? left : 0;
#pragma unroll
    for (int k = 0; k < kChunks; ++k)
      if (offset(k * kSize) < count) values.chunks[k].store(to + first + offset(k * kSize));
  }
};

// One tile of a model, by its number.
template <typename W>
struct Tile {
  const LabelledMatrix<W>* matrix;
  int down, across;
  unsigned alignment;  // every row begins at a multiple of 2^k bytes if this is one

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
    alignment = static_cast<unsigned>(matrix->columns * sizeof(W) |
                                      reinterpret_cast<uintptr_t>(matrix->weight) |
                                      reinterpret_cast<uintptr_t>(matrix->output));
  }
  __device__ __forceinline__ int64_t first_row() const {  // of this warp
    return int64_t{down} * LassoTile::kRows + warp() * kWarpRows;
  }
  __device__ __forceinline__ int rows() const {  // of this warp, < 1 if none
    return static_cast<int>(min(matrix->rows - first_row(), int64_t{kWarpRows}));
  }
  // Of row lane() of this warp: a shuffle then costs less than a load that waits for a load.
  __device__ __forceinline__ int32_t row_unit() const {
    static_assert(kWarpRows <= 32);
    return lane() < rows() ? matrix->row_units[first_row() + lane()] : -1;
  }
  __device__ __forceinline__ int64_t first_column() const {
    return int64_t{across} * LassoTile::kColumns<W>;
  }
};

// f(bytes) with the largest chunk that the rows of a tile allow, as a constant.
template <typename W, int kBytes = 16, typename F>
__device__ __forceinline__ void with_chunks(const Tile<W>& tile, F f) {
  if (kBytes == sizeof(W) || tile.alignment % kBytes == 0)
    f(std::integral_constant<int, kBytes>());
  else if constexpr (kBytes > sizeof(W))
    with_chunks<W, kBytes / 2>(tile, f);
}

// Sums of squares over one tile: over its columns for each row, over its rows for each column,
// those without what the row of the same unit has counted. `shared`: [warps][lane columns][lanes].
template <typename W, int kBytes>
__device__ __forceinline__ void add_squares(const Tile<W>& tile, bool paper_overlap,
                                            Wide<W> (*shared)[LassoTile::kColumns<W>]) {
  using T = Wide<W>;
  using Lane = Columns<W, kBytes>;
  constexpr int kCount = Lane::kCount;
  const LabelledMatrix<W>& m = *tile.matrix;
  const Lane columns(tile.first_column(), m.columns, lane());
  int32_t units[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    units[i] = columns.has(i) ? m.column_units[columns.first + Lane::offset(i)] : -1;
  T column_sums[kCount] = {};
  const int64_t first_row = tile.first_row();
  const int rows = tile.rows();
  const int32_t row_unit = paper_overlap ? -1 : tile.row_unit();
  const W* from = m.weight + first_row * m.columns;
#pragma unroll 1
  for (int first = 0; first < rows; first += kTogether) {
    typename Lane::Row w[kTogether];
#pragma unroll
    for (int r = 0; r < kTogether; ++r, from += m.columns)
      w[r] = columns.load(from, first + r < rows);
    T row_sums[kTogether] = {};
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      const int32_t own = __shfl_sync(~0u, row_unit, first + r);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const T value = w[r][i];
        row_sums[r] = fma(value, value, row_sums[r]);
        // Columns of no unit may be left out too: nobody asks for their sums.
        if (units[i] != own) column_sums[i] = fma(value, value, column_sums[i]);
      }
    }
    const T row_sum = sum_lanes(row_sums);
    const int row = first + lane() * kTogether / 32;
    if (lane() % (32 / kTogether) == 0 && row < rows)
      m.row_sums[tile.across * m.rows + first_row + row] = row_sum;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) shared[warp()][32 * i + lane()] = column_sums[i];
  __syncthreads();
  if (warp() < kCount) {  // warp i adds up column i of every lane
    double sum = 0;
#pragma unroll
    for (int from = 0; from < LassoTile::kWarps; ++from) sum += shared[from][threadIdx.x];
    if (columns.has(warp())) {
      const int64_t column = columns.first + Lane::offset(warp());
      m.column_sums[tile.down * m.columns + column] = static_cast<T>(sum);
    }
  }
}

// A warp adds up what the tiles have left of 32 rows or columns, a lane for each.
template <typename W>
__device__ __forceinline__ void gather(const GroupNormsArgs<W>& args, int64_t number) {
  constexpr int kAhead = 16;  // loads under way
  const LabelledMatrix<W>* m = args.model.matrices;
  int64_t strip = number;
  for (; strip >= m->row_strips() + m->column_strips(); ++m)
    strip -= m->row_strips() + m->column_strips();
  const bool is_row = strip < m->row_strips();
  const int64_t count = is_row ? m->rows : m->columns;
  const int64_t parts = is_row ? m->across() : m->down();
  const int64_t at = 32 * (is_row ? strip : strip - m->row_strips()) + lane();
  const int32_t unit = at < count ? max((is_row ? m->row_units : m->column_units)[at], -1) : -1;
  const Wide<W>* const sums = (is_row ? m->row_sums : m->column_sums) + at;
  double sum = 0;
  for (int64_t part = 0; unit >= 0 && part < parts; part += kAhead) {
    Wide<W> values[kAhead] = {};
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (part + k < parts) values[k] = load_l2(sums + (part + k) * count);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) sum += values[k];
  }
  UnitRange range = {unit < 0 ? INT32_MAX : unit, unit};
#pragma unroll
  for (int bit = UnitRange::kLabels / 2; bit > 0; bit /= 2) {
    range.least = min(range.least, __shfl_xor_sync(~0u, range.least, bit));
    range.most = max(range.most, __shfl_xor_sync(~0u, range.most, bit));
  }
  const int64_t label = number * LabelStrip::kLabels + lane();
  args.strips[number].units[lane()] = unit;
  args.strips[number].sums[lane()] = sum;
  if (lane() % UnitRange::kLabels == 0) args.ranges[label / UnitRange::kLabels] = range;
}

// Adds what the labels of one range have of units [first, ...) to this thread's sums of these.
__device__ __forceinline__ void add_labels(const int32_t* units, const double* of_labels,
                                           int32_t first, double (*sums)[kThreads]) {
  constexpr int kCount = UnitRange::kLabels;
  using Ids = Chunk<int32_t>;
  using Values = Chunk<double>;
  Ids ids[kCount / Ids::kSize];
  Values values[kCount / Values::kSize];
#pragma unroll
  for (int k = 0; k < kCount / Ids::kSize; ++k)
    ids[k] = load_l2(reinterpret_cast<const Ids*>(units) + k);
#pragma unroll
  for (int k = 0; k < kCount / Values::kSize; ++k)
    values[k] = load_l2(reinterpret_cast<const Values*>(of_labels) + k);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const int own = ids[k / Ids::kSize].values[k % Ids::kSize] - first;
    if (own >= 0 && own < kBlockUnits)
      sums[own][threadIdx.x] += values[k / Values::kSize].values[k % Values::kSize];
  }
}

// The same for this thread's share of the ranges, every kThreads-th.
template <typename W>
__device__ __forceinline__ void add_ranges(const GroupNormsArgs<W>& args, int64_t ranges,
                                           int32_t first, double (*sums)[kThreads]) {
  constexpr int kAhead = 8;  // ranges under way
  for (int64_t begin = threadIdx.x; begin < ranges; begin += kAhead * kThreads) {
    UnitRange found[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t at = begin + k * kThreads;
      found[k] = at < ranges ? load_l2(args.ranges + at) : UnitRange{INT32_MAX, -1};
    }
    unsigned hits = 0;
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (found[k].least - first < kBlockUnits && found[k].most >= first) hits |= 1u << k;
#pragma unroll 1
    for (int64_t at = begin; hits != 0; hits >>= 1, at += kThreads) {
      if ((hits & 1) == 0) continue;
      const LabelStrip& strip = args.strips[at / LabelStrip::kRanges];
      const int offset = at % LabelStrip::kRanges * UnitRange::kLabels;
      add_labels(strip.units + offset, strip.sums + offset, first, sums);
    }
  }
}

// First all tiles, each block every gridDim-th. Once all blocks have come so far, a warp adds up
// what they have left of 32 rows or columns, and says between which units the labels of these are.
// Once that is done, a block takes 16 units: its threads divide the ranges of the model among them
// and look into those which may have one of the 16, mostly one or two a matrix. So no block needs a
// list of a unit's rows and columns, nothing is added atomically, and every sum has one order.
template <typename W>
__global__ void __launch_bounds__(kThreads, kBlocks)
    group_norms(const __grid_constant__ GroupNormsArgs<W> args, int64_t tiles, int64_t strips) {
  using T = Wide<W>;
  SIMT_SHARED(double, sums, [kBlockUnits][kThreads]);
  using TileColumns = T[LassoTile::kWarps][LassoTile::kColumns<W>];
  static_assert(2 * sizeof(TileColumns) <= sizeof(sums));
  auto* const columns = reinterpret_cast<TileColumns*>(sums);  // two, before there are sums
  int turn = 0;  // the next tile's column sums go where the last but one's were: one barrier a tile
  for (int64_t number = blockIdx.x; number < tiles; number += gridDim.x, turn ^= 1) {
    const Tile<W> tile(args.model, number);
    with_chunks(tile, [&](auto bytes) {
      add_squares<W, bytes.value>(tile, args.paper_overlap, columns[turn]);
    });
  }
  grid_sync();
  for (int64_t number = int64_t{blockIdx.x} * LassoTile::kWarps + warp(); number < strips;
       number += int64_t{gridDim.x} * LassoTile::kWarps)
    gather(args, number);
  grid_sync();
  const int64_t units = args.model.units, ranges = LabelStrip::kRanges * strips;
  const int64_t step = int64_t{gridDim.x} * kBlockUnits;
  for (int64_t first = int64_t{blockIdx.x} * kBlockUnits; first < units; first += step) {
#pragma unroll
    for (int u = 0; u < kBlockUnits; ++u) sums[u][threadIdx.x] = 0;
    add_ranges(args, ranges, static_cast<int32_t>(first), sums);
    __syncthreads();
    for (int u = warp(); u < kBlockUnits && first + u < units; u += LassoTile::kWarps) {
      double of_lane[1] = {};
#pragma unroll
      for (int from = 0; from < kThreads; from += 32) of_lane[0] += sums[u][from + lane()];
      double sum = sum_lanes(of_lane);
      if (lane() != 0) continue;
      const int64_t unit = first + u;
      sum += args.more_before ? args.squares[unit] : args.eps;
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

template <typename W, ByUnits kWhat, int kBytes>
__device__ __forceinline__ void walk(const ModelByUnitsArgs<W>& args, const Tile<W>& tile) {
  using T = Wide<W>;
  using Lane = Columns<W, kBytes>;
  constexpr bool kAdds = kWhat == ByUnits::kAddScaled;
  constexpr int kCount = Lane::kCount;
  constexpr int kRows = kTogether / 2;  // and as many of the output
  const LabelledMatrix<W>& m = *tile.matrix;
  const Lane columns(tile.first_column(), m.columns, lane());
  int32_t units[kCount];
  T of_column[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    units[i] = columns.has(i) ? m.column_units[columns.first + Lane::offset(i)] : -1;
#pragma unroll
  for (int i = 0; i < kCount; ++i) of_column[i] = of_unit<W, kWhat>(args, units[i]);
  const int64_t first_row = tile.first_row();
  const int rows = tile.rows();
  const int32_t row_unit = tile.row_unit();
  const T of_row_unit = of_unit<W, kWhat>(args, row_unit);
  // All loads of kRows rows come before the first store: output may be weight.
#pragma unroll 1
  for (int first = 0; first < rows; first += kRows) {
    const int64_t at = (first_row + first) * m.columns;
    typename Lane::Row weights[kRows], results[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool row = first + r < rows;
      weights[r] = columns.load(m.weight + at + r * m.columns, row);
      if (kAdds && !args.overwrite) results[r] = columns.load(m.output + at + r * m.columns, row);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int32_t unit = __shfl_sync(~0u, row_unit, first + r);
      const T of_row = __shfl_sync(~0u, of_row_unit, first + r);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const T w = weights[r][i];
        const bool once = unit >= 0 && unit == units[i];
        if constexpr (kAdds)
          results[r].set(i, fma(w, of_row + (once && !args.paper_overlap ? T(0) : of_column[i]),
                                results[r][i]));
        else if constexpr (kWhat == ByUnits::kScale)
          results[r].set(i, w * (of_row * (once ? T(1) : of_column[i])));
        else
          results[r].set(i, (w < 0 ? -w : w) < max(of_row, of_column[i]) ? T(0) : w);
      }
      columns.store(results[r], first + r < rows, m.output + at + r * m.columns);
    }
  }
}

template <typename W, ByUnits kWhat>
__global__ void __launch_bounds__(kThreads, kBlocks)
    by_units(const __grid_constant__ ModelByUnitsArgs<W> args) {
  const Tile<W> tile(args.model, blockIdx.x);
  with_chunks(tile, [&](auto bytes) { walk<W, kWhat, bytes.value>(args, tile); });
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
  const int64_t tiles = tiles_of(args.model), strips = args.model.strips();
  if (args.model.units == 0) return 0;
  const int64_t wanted =
      max(tiles, max(ceil_div(strips, LassoTile::kWarps), ceil_div(args.model.units, kBlockUnits)));
  // Blocks wait for each other. Where none fits, the launch says so.
  const int64_t resident = max(simt::resident_blocks(&group_norms<W>, kThreads, 0, 1), 1);
  const int64_t most = min(int64_t{kBlocks} * multiprocessors, resident);
  const dim3 grid(static_cast<unsigned>(min(wanted, most)));
  return simt::launch(&group_norms<W>, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream),
                      true, 1, args, tiles, strips);
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
