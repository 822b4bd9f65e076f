// SPDX-License-Identifier: Apache-2.0
// All time steps of an LSTM layer in one launch. A group of blocks owns `rows` rows of the batch;
// each block owns `units` units and keeps their recurrent weights in shared memory. A warp owns 8
// units and a pass of rows: its product leaves all four gates of a unit in one lane, which
// finishes the cell in registers. Then h goes to the other blocks of the group, into the buffer
// that the step after reads: one exchange, and one barrier of the group, per step.
//
// What a step costs a block: 4 units * H * size / 128 clocks to read the weights once per pass of
// rows (shared memory gives 128 bytes a clock); for FMA at least 4 units * H * rows / 128 clocks of
// arithmetic; then the cells and the exchange. In a small layer all of these are short and what
// counts is the chain of instructions from one h to the next: what need not be in it, addresses,
// the results for memory, the loads for the next step, stands between arrive() and wait().
#include "cuda/resident.h"

namespace iss {
namespace {

// What one lane has of something: a unit's, of kOfTile rows in each tile of its warp's pass.
template <typename P, typename V>
using OfLane = V[P::kTiles][P::kOfTile];

// f(n, j) for each of them.
template <typename P, typename F>
__device__ __forceinline__ void each_of_lane(F f) {
#pragma unroll
  for (int n = 0; n < P::kTiles; ++n)
#pragma unroll
    for (int j = 0; j < P::kOfTile; ++j) f(n, j);
}

// Adds what the other splits of K have made of the same tiles to what split 0 has, in order.
template <typename P, typename W>
__device__ __forceinline__ void add_splits(P& product, W* partial, int split, int splits,
                                           int per_split) {
  const int lane = threadIdx.x % 32, worker = threadIdx.x / 32 % per_split;
  const auto slot = [&](int from, int n, int g, int j) -> W& {
    const int tile = ((from - 1) * per_split + worker) * P::kTiles + n;
    return partial[((tile * 4 + g) * P::kOfTile + j) * 32 + lane];
  };
  if (split > 0)
    each_of_lane<P>([&](int n, int j) {
#pragma unroll
      for (int g = 0; g < 4; ++g) slot(split, n, g, j) = product.sums[n][g][j];
    });
  __syncthreads();
  if (split > 0) return;
#pragma unroll 1
  for (int from = 1; from < splits; ++from)
    each_of_lane<P>([&](int n, int j) {
#pragma unroll
      for (int g = 0; g < 4; ++g) product.sums[n][g][j] += slot(from, n, g, j);
    });
}

template <Math math, Tier tier, int kRows>
__global__ void __launch_bounds__(max_threads(math), 1)
    lstm_forward_kernel(LstmForwardArgs<Element<math>> args, LstmTiles tiles) {
  using T = Element<math>;
  using W = Wide<T>;
  using P = Product<math, kRows,
                    uses_tensor_cores(math) ? (kRows <= 8 ? 4 : 2)
                    : kRows <= 2            ? 2
                                            : 1>;
  constexpr int kUnitChunks = kUnits * sizeof(T) / 16;  // of 8 units of one row
  constexpr int kSpread = column_step(math, kRows);

  SIMT_DYN_SHARED(uint4, shared);
  const int hidden = static_cast<int>(args.hidden);
  const int batch = static_cast<int>(args.sequence.batch);
  const SharedLayout layout = shared_layout(math, tier, false, hidden, tiles, blockDim.x);
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
  const int unit_tiles = tiles.units / kUnits;
  const int per_split = blockDim.x / 32 / tiles.splits;
  const int split = warp / per_split, unit_tile = warp % per_split % unit_tiles;
  const int pass_first = warp % per_split / unit_tiles * kRows;  // in the group's rows
  const KRange k = k_range(chunks, split, tiles.splits);
  const int tile_first = first_unit + unit_tile * kUnits;
  const int unit = tile_first + P::weight_row(lane);
  const int lane_row = pass_first + P::batch_row(lane);
  const bool works = tile_first < hidden;     // the last block may have tiles to spare
  const bool finishes = works && split == 0;  // and holds the state
  const bool publishes = finishes && P::batch_row(lane) >= 0;
  const bool owns = publishes && unit < hidden;
  const uint4* const tile_weights = weights + unit_tile * kWeightRows * stride;
  const uint4* const pass_vectors = vectors + pass_first * kSpread * stride;
  T* const own_vectors = reinterpret_cast<T*>(vectors + lane_row * kSpread * stride) + unit;

  fill<math, false>(weights, 4 * tiles.units, chunks, stride, [&](int row, int column) {
    const int u = first_unit + row / kWeightRows * kUnits + row % kUnits;
    const int gate = row % kWeightRows / kUnits;
    const bool inside = u < hidden && column < hidden;
    return inside ? operand<math>(args.w_hh[(gate * args.hidden + u) * hidden + column]) : T{};
  });
  if (buffer > 0)
    fill<math, false>(vectors + buffer, columns, chunks, stride, [](int, int) { return T{}; });

  for (int batch_first = group.index * tiles.rows; batch_first < batch;
       batch_first += tiles.groups * tiles.rows) {
    const auto row_of = [&](int n, int j) {  // of the batch
      return batch_first + lane_row + n * tile_rows(math) + j;
    };
    struct Gates {
      T of[4];
    };
    OfLane<P, Gates> gates_x = {};
    const auto load_gates = [&](const StepRows& rows) {
      each_of_lane<P>([&](int n, int j) {
        const int b = row_of(n, j);
        if (!owns || b >= rows.n) return;
        const T* from = args.gates_x + (rows.first + b) * 4 * hidden + unit;
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) gates_x[n][j].of[gate] = from[gate * hidden];
      });
    };

    group.sync_shared();  // the tile before may still be in use
    fill<math, false>(vectors, columns, chunks, stride, [&](int row, int column) {
      const int b = batch_first + row / kSpread;
      const bool inside = row % kSpread == 0 && b < batch && column < hidden;
      return inside ? operand<math>(args.h0[int64_t{b} * hidden + column]) : T{};
    });
    OfLane<P, W> h = {}, c = {};
    each_of_lane<P>([&](int n, int j) {
      const int b = row_of(n, j);
      if (!owns || b >= batch) return;
      h[n][j] = widen(args.h0[int64_t{b} * hidden + unit]);
      c[n][j] = widen(args.c0[int64_t{b} * hidden + unit]);
    });
    Walk<false> walk(args.sequence);
    load_gates(walk.rows);
    group.sync();

    int now = 0;  // the buffer that is read
    for (int64_t step = 0;;) {
      P product = {};
      if (works) {
        if constexpr (uses_tensor_cores(math)) __syncwarp();  // lanes came by different ways
        product.run(tile_weights, pass_vectors + now, stride, k);
      }
      if (tiles.splits > 1) add_splits(product, partial_sums, split, tiles.splits, per_split);

      const int next = buffer - now;
      uint4* const published =
          tier == Tier::kGrid ? exchange + step % 2 * tiles.rows * row_chunks : nullptr;
      if (publishes)
        each_of_lane<P>([&](int n, int j) {
          if (owns && row_of(n, j) < walk.rows.n) {
            W a[4];
#pragma unroll
            for (int gate = 0; gate < 4; ++gate)
              a[gate] = product.sums[n][gate][j] + widen(gates_x[n][j].of[gate]);
            const W i = sigmoid(a[0]), f = sigmoid(a[1]), g = tanh(a[2]), o = sigmoid(a[3]);
            c[n][j] = fused(f, c[n][j], i * g);
            h[n][j] = widen(narrow<T>(o * tanh(c[n][j])));
            product.sums[n][0][j] = i;
            product.sums[n][1][j] = f;
            product.sums[n][2][j] = g;
            product.sums[n][3][j] = o;
          }
          // A row that does not run has the same h, for when it will.
          const int below = n * tile_rows(math) + j;  // rows
          T* const to =
              tier == Tier::kGrid
                  ? reinterpret_cast<T*>(published + (lane_row + below) * row_chunks) + unit
                  : own_vectors + (next + below * kSpread * stride) * (16 / sizeof(T));
          *to = operand<math>(narrow<T>(h[n][j]));
        });
      const StepRows done = walk.rows;
      const bool last = ++step == args.sequence.steps;
      if (!last) {
        // The warp's tile of h to the others, 16 bytes at a time.
        if constexpr (tier == Tier::kCluster) {
          if (finishes) {
            __syncwarp();
            constexpr int kCount = kRows * kUnitChunks;
            for (int i = lane; i < kCount * (group.blocks - 1); i += 32) {
              const int row = pass_first + i % kCount / kUnitChunks;
              const int chunk = tile_first * static_cast<int>(sizeof(T)) / 16 + i % kUnitChunks;
              const int to = group.rank + 1 + i / kCount;
              uint4* const from = vectors + next + row * kSpread * stride + chunk;
              *map_shared(from, to < group.blocks ? to : to - group.blocks) = *from;
            }
          }
        }
        group.arrive();
        walk.go_on();
        load_gates(walk.rows);
      }

      if (owns)
        each_of_lane<P>([&](int n, int j) {
          const int b = row_of(n, j);
          if (b >= done.n) return;
          const int64_t at = done.first + b;
          args.y[at * hidden + unit] = narrow<T>(h[n][j]);
          if (args.gates) {
            W* saved = args.gates + at * 4 * hidden + unit;
#pragma unroll
            for (int gate = 0; gate < 4; ++gate) saved[gate * hidden] = product.sums[n][gate][j];
            args.cells[at * hidden + unit] = c[n][j];
          }
        });
      if (last) break;

      group.wait();
      now = next;
      if constexpr (tier == Tier::kGrid) {
#pragma unroll 4
        for (int i = threadIdx.x; i < tiles.rows * row_chunks; i += blockDim.x)
          vectors[i / row_chunks * kSpread * stride + i % row_chunks] = load_l2(published + i);
        __syncthreads();
      }
    }

    if (owns)
      each_of_lane<P>([&](int n, int j) {
        const int b = row_of(n, j);
        if (b >= batch) return;
        args.h_n[int64_t{b} * hidden + unit] = narrow<T>(h[n][j]);
        args.c_n[int64_t{b} * hidden + unit] = narrow<T>(c[n][j]);
      });
  }
}

template <typename T>
SequenceKernel<LstmForwardArgs<T>> kernel_of(const LstmPlan& plan) {
  return with_kernel<T>(plan, [](auto v) {
    return SequenceKernel<LstmForwardArgs<T>>(lstm_forward_kernel<v.math, v.tier, v.rows>);
  });
}

}  // namespace

template <typename T>
int launch_lstm_forward(const LstmPlan& plan, const LstmForwardArgs<T>& args, CudaStream stream) {
  return launch_sequence(kernel_of<T>(plan), plan, args, stream);
}
template <typename T>
bool can_launch_lstm_forward(const LstmPlan& plan) {
  return fits_device(kernel_of<T>(plan), plan);
}

#define ISS_INSTANCE(T)                                                                     \
  template int launch_lstm_forward(const LstmPlan&, const LstmForwardArgs<T>&, CudaStream); \
  template bool can_launch_lstm_forward<T>(const LstmPlan&);
ISS_LSTM_INSTANCES(ISS_INSTANCE)

}  // namespace iss
