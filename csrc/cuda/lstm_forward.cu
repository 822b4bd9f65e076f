// SPDX-License-Identifier: Apache-2.0
// All time steps of an LSTM layer in one launch. A group of blocks owns `rows` rows of the batch;
// each block owns `units` units and keeps their recurrent weights in shared memory. A warp owns 8
// units and a pass of rows: its product leaves all four gates of a unit in one lane, which
// finishes the cell in registers. Then h goes to the other blocks of the group, into the buffer
// that the step after reads: one exchange, and one barrier of the group, per step.
//
// What a step costs a block: 4 units * H * size / 128 clocks to read the weights once per pass of
// rows (shared memory gives 128 bytes a clock); for FMA at least 4 units * H * rows / 128 clocks of
// arithmetic; 70 (tensor cores) or 170 instructions per cell of a lane; then the exchange, some 40
// clocks within a block, 400 to 700 within a cluster, 2000 and more through L2. plan.cpp adds it
// up.
#include "cuda/sequence.h"

namespace iss {
namespace {

// What one lane owns: a unit, and two rows in each tile of its warp's pass.
template <Math math>
struct LaneState {
  static constexpr int kTiles = Product<math>::kTiles;
  Wide<Element<math>> h[kTiles][2], c[kTiles][2];
};

// What it needs of gates_x at one step.
template <Math math>
struct LaneGates {
  Element<math> values[Product<math>::kTiles][2][4];
};

// Adds what the other splits of K have made of the same tiles to what split 0 has, in order.
template <Math math>
__device__ __forceinline__ void add_splits(Product<math>& product, Wide<Element<math>>* partial,
                                           int split, int splits, int per_split, int rows) {
  constexpr int kTiles = Product<math>::kTiles, kLaneSums = 8;
  const int lane = threadIdx.x % 32, worker = threadIdx.x / 32 % per_split;
  const int used = rows > tile_rows(math) ? kTiles : 1;
  const auto slot = [&](int from, int n, int g, int j) -> Wide<Element<math>>& {
    const int tile = ((from - 1) * per_split + worker) * used + n;
    return partial[(tile * kLaneSums + g * 2 + j) * 32 + lane];
  };
  if (split > 0) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int g = 0; g < 4; ++g)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          if (n < used) slot(split, n, g, j) = product.sums[n][g][j];
  }
  __syncthreads();
  if (split > 0) return;
#pragma unroll 1
  for (int from = 1; from < splits; ++from)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int g = 0; g < 4; ++g)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          if (n < used) product.sums[n][g][j] += slot(from, n, g, j);
}

template <Math math, Tier tier>
__global__ void __launch_bounds__(max_threads(math), 1)
    lstm_forward_kernel(LstmForwardArgs<Element<math>> args, LstmTiles tiles) {
  using T = Element<math>;
  constexpr int kTiles = Product<math>::kTiles;
  constexpr int kTileRows = tile_rows(math), kPassRows = pass_rows(math);
  constexpr int kUnitChunks = kUnits * sizeof(T) / 16;  // of 8 units of one row

  SIMT_DYN_SHARED(uint4, shared);
  const int hidden = static_cast<int>(args.hidden);
  const int batch = static_cast<int>(args.sequence.batch);
  const SharedLayout layout = shared_layout(math, tier, false, hidden, tiles, blockDim.x);
  const int chunks = chunks_of(math, hidden), stride = chunks + 1;
  uint4* const weights = shared + layout.weights;
  uint4* const vectors = shared + layout.vectors;
  const int spread = column_step(math, tiles.rows), columns = tiles.rows * spread;
  const int buffer = (vectors_of(tier) - 1) * columns * stride;  // to the other of two vectors
  Wide<T>* const partial_sums = reinterpret_cast<Wide<T>*>(shared + layout.sums);

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
  const int pass_first = warp % per_split / unit_tiles * kPassRows;  // in the group's rows
  const int rows_of_pass = min(kPassRows, tiles.rows);               // which divides tiles.rows
  const KRange k = k_range(chunks, split, tiles.splits);
  const int tile_first = first_unit + unit_tile * kUnits;
  const int unit = tile_first + Product<math>::weight_row(lane);
  const LaneRows lane_rows = Product<math>::lane_rows(lane, rows_of_pass);
  const int lane_row = pass_first + lane_rows.first;
  const bool works = tile_first < hidden;     // the last block may have tiles to spare
  const bool finishes = works && split == 0;  // and holds the state
  const uint4* const tile_weights = weights + unit_tile * kWeightRows * stride;

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
    const auto owned = [&](int n, int j) {  // whether such a row exists
      const int row = lane_row + n * kTileRows + j;
      return finishes && unit < hidden && j < lane_rows.count && row < tiles.rows &&
             batch_first + row < batch;
    };
    const auto load_gates = [&](int64_t step) {
      LaneGates<math> gates = {};
      if (step < args.sequence.steps) {
        const StepRows rows = rows_at(args.sequence, step);
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int b = batch_first + lane_row + n * kTileRows + j;
            if (!owned(n, j) || b >= rows.n) continue;
            const T* from = args.gates_x + (rows.first + b) * 4 * hidden + unit;
#pragma unroll
            for (int gate = 0; gate < 4; ++gate) gates.values[n][j][gate] = from[gate * hidden];
          }
      }
      return gates;
    };

    group.sync_shared();  // the tile before may still be in use
    fill<math, false>(vectors, columns, chunks, stride, [&](int row, int column) {
      const int b = batch_first + row / spread;
      const bool inside = row % spread == 0 && b < batch && column < hidden;
      return inside ? operand<math>(args.h0[int64_t{b} * hidden + column]) : T{};
    });
    LaneState<math> state = {};
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (!owned(n, j)) continue;
        const int b = batch_first + lane_row + n * kTileRows + j;
        const int64_t at = int64_t{b} * hidden + unit;
        state.h[n][j] = widen(args.h0[at]);
        state.c[n][j] = widen(args.c0[at]);
      }
    LaneGates<math> gates = load_gates(0);
    group.sync();

    for (int64_t step = 0; step < args.sequence.steps; ++step) {
      const StepRows rows = rows_at(args.sequence, step);
      const int now = static_cast<int>(step % 2) * buffer, next = buffer - now;
      uint4* const published = exchange + step % 2 * tiles.rows * row_chunks;  // Tier::kGrid alone

      Product<math> product = {};
      if (works)
        product.run(tile_weights, vectors + now + pass_first * spread * stride, stride, k,
                    rows_of_pass);
      if (tiles.splits > 1)
        add_splits(product, partial_sums, split, tiles.splits, per_split, rows_of_pass);

      if (finishes) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int row = lane_row + n * kTileRows + j;
            const int b = batch_first + row;
            if (owned(n, j) && b < rows.n) {
              Wide<T> a[4];
#pragma unroll
              for (int gate = 0; gate < 4; ++gate)
                a[gate] = product.sums[n][gate][j] + widen(gates.values[n][j][gate]);
              const Wide<T> i = sigmoid_for<math>(a[0]), f = sigmoid_for<math>(a[1]);
              const Wide<T> g = tanh_for<math>(a[2]), o = sigmoid_for<math>(a[3]);
              const Wide<T> c = fused(f, state.c[n][j], i * g);
              const T h = narrow<T>(o * tanh_for<math>(c));
              state.c[n][j] = c;
              state.h[n][j] = widen(h);
              const int64_t at = rows.first + b;
              args.y[at * hidden + unit] = h;
              if (args.gates) {
                Wide<T>* saved = args.gates + at * 4 * hidden + unit;
                saved[0] = i;
                saved[hidden] = f;
                saved[2 * hidden] = g;
                saved[3 * hidden] = o;
                args.cells[at * hidden + unit] = c;
              }
            }
            // A row that does not run has the same h, for when it will.
            if (j < lane_rows.count && row < tiles.rows) {
              uint4* const to = tier == Tier::kGrid ? published + row * row_chunks
                                                    : vectors + next + row * spread * stride;
              reinterpret_cast<T*>(to)[unit] = operand<math>(narrow<T>(state.h[n][j]));
            }
          }
      }
      if (step + 1 == args.sequence.steps) break;

      // The warp's tile of h to the others, 16 bytes at a time.
      if constexpr (tier == Tier::kCluster) {
        if (finishes) {
          __syncwarp();
          const int count = rows_of_pass * kUnitChunks;
          for (int i = lane; i < count * (group.blocks - 1); i += 32) {
            const int row = pass_first + i % count / kUnitChunks;
            const int chunk = tile_first * static_cast<int>(sizeof(T)) / 16 + i % kUnitChunks;
            uint4* const from = vectors + next + row * spread * stride + chunk;
            *map_shared(from, (group.rank + 1 + i / count) % group.blocks) = *from;
          }
        }
      }
      // On their way while this block waits for the others, and for the next product.
      gates = load_gates(step + 1);
      group.sync();
      if constexpr (tier == Tier::kGrid) {
#pragma unroll 4
        for (int i = threadIdx.x; i < tiles.rows * row_chunks; i += blockDim.x)
          vectors[i / row_chunks * spread * stride + i % row_chunks] = load_l2(published + i);
        __syncthreads();
      }
    }

#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (!owned(n, j)) continue;
        const int b = batch_first + lane_row + n * kTileRows + j;
        const int64_t at = int64_t{b} * hidden + unit;
        args.h_n[at] = narrow<T>(state.h[n][j]);
        args.c_n[at] = narrow<T>(state.c[n][j]);
      }
  }
}

template <Math math>
SequenceKernel<LstmForwardArgs<Element<math>>> kernel_of(Tier tier) {
  switch (tier) {
    case Tier::kBlock:
      return lstm_forward_kernel<math, Tier::kBlock>;
    case Tier::kCluster:
      return lstm_forward_kernel<math, Tier::kCluster>;
    default:
      return lstm_forward_kernel<math, Tier::kGrid>;
  }
}
template <typename T>
SequenceKernel<LstmForwardArgs<T>> kernel_of(const LstmPlan& plan) {
  if constexpr (std::is_same_v<T, float>)
    if (plan.math == Math::kTf32) return kernel_of<Math::kTf32>(plan.tier);
  return kernel_of<MathOf<T>::value>(plan.tier);
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
