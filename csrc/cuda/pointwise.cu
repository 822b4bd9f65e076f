// SPDX-License-Identifier: Apache-2.0
// The elementwise half of one LSTM step, forward and backward, for Tier::kSteps. Bound by memory:
// a thread has 16 bytes of T's units, or one unit where rows do not divide into 16 bytes.

#include "cuda/math.h"

namespace iss {
namespace {

constexpr int kThreads = 256;

// N elements from or to p: 16 bytes at a time where N > 1.
template <int N, typename T>
__device__ __forceinline__ void read(const T* p, Wide<T> (&values)[N]) {
  if constexpr (N == 1) {
    values[0] = widen(*p);
  } else {
#pragma unroll
    for (int first = 0; first < N; first += Chunk<T>::kSize) {
      const Chunk<T> chunk = Chunk<T>::load(p + first);
#pragma unroll
      for (int i = 0; i < Chunk<T>::kSize; ++i) values[first + i] = widen(chunk.values[i]);
    }
  }
}
template <int N, typename T>
__device__ __forceinline__ void write(const Wide<T> (&values)[N], T* p) {
  if constexpr (N == 1) {
    *p = narrow<T>(values[0]);
  } else {
#pragma unroll
    for (int first = 0; first < N; first += Chunk<T>::kSize) {
      Chunk<T> chunk;
#pragma unroll
      for (int i = 0; i < Chunk<T>::kSize; ++i) chunk.values[i] = narrow<T>(values[first + i]);
      chunk.store(p + first);
    }
  }
}

// Row and first unit of this thread, of `units` per thread; row < rows where it has any.
struct Place {
  int64_t row, unit;
  __device__ __forceinline__ Place(int64_t hidden, int units) {
    const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    const int64_t in_row = hidden / units;
    row = thread / in_row;
    unit = (thread - row * in_row) * units;
  }
};

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) lstm_cell(LstmCellArgs<T> args) {
  using V = Wide<T>;
  const int64_t hidden = args.hidden;
  const Place at(hidden, N);
  if (at.row >= args.rows) return;
  const int64_t at_unit = at.row * hidden + at.unit, at_gate = at.row * 4 * hidden + at.unit;
  V i[N], f[N], g[N], o[N], c[N], h[N];
  read(args.gates_in + at_gate, i);
  read(args.gates_in + at_gate + hidden, f);
  read(args.gates_in + at_gate + 2 * hidden, g);
  read(args.gates_in + at_gate + 3 * hidden, o);
  read(args.c_prev + at_unit, c);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    i[k] = sigmoid(i[k]);
    f[k] = sigmoid(f[k]);
    g[k] = tanh(g[k]);
    o[k] = sigmoid(o[k]);
    c[k] = fused(f[k], c[k], i[k] * g[k]);
    h[k] = o[k] * tanh(c[k]);
  }
  write(c, args.c + at_unit);
  write(h, args.h + at.row * args.h_stride + at.unit);
  if (args.gates != nullptr) {
    write(i, args.gates + at_gate);
    write(f, args.gates + at_gate + hidden);
    write(g, args.gates + at_gate + 2 * hidden);
    write(o, args.gates + at_gate + 3 * hidden);
    write(c, args.cells + at_unit);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) lstm_cell_backward(LstmCellBackwardArgs<T> args) {
  using V = Wide<T>;
  const int64_t hidden = args.hidden;
  const Place at(hidden, N);
  if (at.row >= args.rows) return;
  const int64_t at_unit = at.row * hidden + at.unit, at_gate = at.row * 4 * hidden + at.unit;
  V i[N], f[N], g[N], o[N], c[N], c_prev[N], dh[N], dc[N];
  read(args.gates + at_gate, i);
  read(args.gates + at_gate + hidden, f);
  read(args.gates + at_gate + 2 * hidden, g);
  read(args.gates + at_gate + 3 * hidden, o);
  read(args.cells + at_unit, c);
  read(args.c_prev + at_unit, c_prev);
  read(args.dh + at_unit, dh);
  read(args.dc + at_unit, dc);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const V tanh_c = tanh(c[k]);
    dc[k] = fused(dh[k] * o[k], 1 - tanh_c * tanh_c, dc[k]);
    o[k] = dh[k] * tanh_c * o[k] * (1 - o[k]);
    const V di = dc[k] * g[k] * i[k] * (1 - i[k]);
    g[k] = dc[k] * i[k] * (1 - g[k] * g[k]);
    i[k] = di;
    c[k] = dc[k] * f[k];
    f[k] = dc[k] * c_prev[k] * f[k] * (1 - f[k]);
  }
  write(i, args.dgates + at_gate);
  write(f, args.dgates + at_gate + hidden);
  write(g, args.dgates + at_gate + 2 * hidden);
  write(o, args.dgates + at_gate + 3 * hidden);
  write(c, args.dc + at_unit);
}

template <typename Args>
int launch(void (*kernel)(Args), const Args& args, int units, CudaStream stream) {
  const int64_t threads = args.rows * (args.hidden / units);
  if (threads == 0) return 0;
  const dim3 grid(static_cast<unsigned>((threads + kThreads - 1) / kThreads));
  return simt::launch(kernel, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), false, 1,
                      args);
}

template <typename... P>
bool all_aligned(const P*... pointers) {
  return (is_aligned(pointers) && ...);
}

}  // namespace

template <typename T>
int launch_lstm_cell(const LstmCellArgs<T>& args, CudaStream stream) {
  constexpr int kUnits = Chunk<T>::kSize;
  const bool whole =
      args.hidden % kUnits == 0 && args.h_stride % kUnits == 0 &&
      all_aligned(args.gates_in, args.c_prev, args.c, args.h, args.gates, args.cells);
  return whole ? launch(&lstm_cell<T, kUnits>, args, kUnits, stream)
               : launch(&lstm_cell<T, 1>, args, 1, stream);
}

template <typename T>
int launch_lstm_cell_backward(const LstmCellBackwardArgs<T>& args, CudaStream stream) {
  constexpr int kUnits = Chunk<T>::kSize;
  const bool whole = args.hidden % kUnits == 0 && all_aligned(args.dh, args.gates, args.cells,
                                                              args.c_prev, args.dc, args.dgates);
  return whole ? launch(&lstm_cell_backward<T, kUnits>, args, kUnits, stream)
               : launch(&lstm_cell_backward<T, 1>, args, 1, stream);
}

#define ISS_INSTANCE(T)                                              \
  template int launch_lstm_cell(const LstmCellArgs<T>&, CudaStream); \
  template int launch_lstm_cell_backward(const LstmCellBackwardArgs<T>&, CudaStream);
ISS_EACH_DTYPE(ISS_INSTANCE)
#undef ISS_INSTANCE

}  // namespace iss
