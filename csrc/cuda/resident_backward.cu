// SPDX-License-Identifier: Apache-2.0
// The gradient of all time steps of an LSTM layer in one launch, but for the products that make the
// gradients of weights. Groups, blocks and units are those of forward (lstm_forward.cu).
//
// dh of a step is dgates @ w_hh of the step after it, a sum over all 4H gates. A block multiplies
// the gates of its own units, which it has just made, with its rows of w_hh: a part of dh for all
// units. Each part goes to the block that owns the unit, which adds up parts in the order of
// blocks: no atomics, the same bits every time. Sending parts of dh rather than dgates to everybody
// is a quarter of the exchange, and only a block's own dgates lie in shared memory.
//
// A step costs what a step forward does, and one more barrier within the block. The gates'
// gradients go to memory after arrive(), from shared memory, where they are operands: with TF32
// they keep 10 bits, as any product with them would.
#include "cuda/resident.h"

namespace iss {
namespace {

// What one element (a row's unit) needs at one step.
template <typename T>
struct ItemInputs {
  Wide<T> gates[4], cell, cell_before;
  T dy;
};

template <Math math, Tier tier, int kRows>
__global__ void __launch_bounds__(max_threads(math), 1)
    lstm_backward_kernel(LstmBackwardArgs<Element<math>> args, LstmTiles tiles) {
  using T = Element<math>;
  using W = Wide<T>;
  using P =
      Product<math, kRows, uses_tensor_cores(math) && math != Math::kTf32 && kRows <= 8 ? 4 : 1>;
  constexpr int kSpread = column_step(math, kRows);

  SIMT_DYN_SHARED(uint4, shared);
  const int hidden = static_cast<int>(args.hidden), units = tiles.units;
  const int batch = static_cast<int>(args.sequence.batch);
  const SharedLayout layout = shared_layout(math, tier, true, hidden, tiles, blockDim.x);
  const int chunks = chunks_of(math, 4 * units), stride = chunks + 1;
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
    const bool inside = row < hidden && u < hidden && gate < 4;
    return inside ? operand<math>(args.w_hh[(gate * args.hidden + u) * hidden + row]) : T{};
  });
  fill<math, false>(vectors, tiles.rows * kSpread, chunks, stride, [](int, int) { return T{}; });
  group.sync_shared();

  int parity = 0;  // of the products, over all tiles of rows
  for (int batch_first = group.index * tiles.rows; batch_first < batch;
       batch_first += tiles.groups * tiles.rows) {
    int batch_row[kItems];  // of this thread's elements, -1 where there is none
    int unit[kItems];       // within this block
    W dh[kItems] = {}, dc[kItems] = {};
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
      dc[n] = widen(args.dc_n[at]);
    }
    const auto own_vectors = [&](int n) {
      return reinterpret_cast<T*>(vectors + (batch_row[n] - batch_first) * kSpread * stride) +
             unit[n];
    };
    const auto runs = [&](int n, const StepRows& rows) {
      return batch_row[n] >= 0 && batch_row[n] < rows.n;
    };
    ItemInputs<T> inputs[kItems] = {};
    // before: the rows of the step before in the layer's order; none where there is no such step.
    const auto load = [&](const StepRows& rows, const StepRows& before) {
#pragma unroll
      for (int n = 0; n < kItems; ++n) {
        if (!runs(n, rows)) continue;
        const int64_t at = rows.first + batch_row[n];
        const W* gates = args.gates + at * 4 * hidden + first_unit + unit[n];
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) inputs[n].gates[gate] = gates[gate * hidden];
        inputs[n].cell = args.cells[at * hidden + first_unit + unit[n]];
        inputs[n].cell_before =
            batch_row[n] < before.n
                ? args.cells[(before.first + batch_row[n]) * hidden + first_unit + unit[n]]
                : widen(args.c0[int64_t{batch_row[n]} * hidden + first_unit + unit[n]]);
        inputs[n].dy = args.dy[at * hidden + first_unit + unit[n]];
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
#pragma unroll
      for (int n = 0; n < kItems; ++n) {
        if (batch_row[n] < 0) continue;
        T dgates[4] = {};
        if (runs(n, rows)) {
          const auto& in = inputs[n];
          const W i = in.gates[0], f = in.gates[1], g = in.gates[2], o = in.gates[3];
          const W dh_here = dh[n] + widen(in.dy), tanh_c = tanh(in.cell);
          const W dc_here = fused(dh_here * o, 1 - tanh_c * tanh_c, dc[n]);
          dgates[0] = narrow<T>(dc_here * g * i * (1 - i));
          dgates[1] = narrow<T>(dc_here * in.cell_before * f * (1 - f));
          dgates[2] = narrow<T>(dc_here * i * (1 - g * g));
          dgates[3] = narrow<T>(dh_here * tanh_c * o * (1 - o));
          dc[n] = dc_here * f;
        }
        T* to = own_vectors(n);
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) to[gate * units] = operand<math>(dgates[gate]);
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
        for (int g = 0; g < 4; ++g) {
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
        T* to = args.dgates + (done.first + batch_row[n]) * 4 * hidden + first_unit + unit[n];
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) to[gate * hidden] = from[gate * units];
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
#pragma unroll 4
        for (int part = 0; part < to_add; ++part)
          sum += from[part * count + threadIdx.x + n * blockDim.x];
        dh[n] = sum;
      }
      parity ^= 1;
    }

#pragma unroll
    for (int n = 0; n < kItems; ++n) {
      if (batch_row[n] < 0) continue;
      const int64_t at = int64_t{batch_row[n]} * hidden + first_unit + unit[n];
      args.dh0[at] = narrow<T>(dh[n]);
      args.dc0[at] = narrow<T>(dc[n]);
    }
  }
}

template <typename T>
SequenceKernel<LstmBackwardArgs<T>> kernel_of(const LstmPlan& plan) {
  return with_kernel<T>(plan, [](auto v) {
    return SequenceKernel<LstmBackwardArgs<T>>(lstm_backward_kernel<v.math, v.tier, v.rows>);
  });
}

}  // namespace

template <typename T>
int launch_lstm_backward(const LstmPlan& plan, const LstmBackwardArgs<T>& args, CudaStream stream) {
  return launch_sequence(kernel_of<T>(plan), plan, args, stream);
}
template <typename T>
bool can_launch_lstm_backward(const LstmPlan& plan) {
  return fits_device(kernel_of<T>(plan), plan);
}

#define ISS_INSTANCE(T)                                                                       \
  template int launch_lstm_backward(const LstmPlan&, const LstmBackwardArgs<T>&, CudaStream); \
  template bool can_launch_lstm_backward<T>(const LstmPlan&);
ISS_LSTM_INSTANCES(ISS_INSTANCE)

}  // namespace iss
