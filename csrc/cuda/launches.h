// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels are told, and the functions that launch them: plain structs of raw pointers
// to device memory, no torch and no CUDA headers, so that host files compile without nvcc.
//
// Letters: T steps, B batch, I input size, H hidden (cell) size, P output size (H, or proj_size), N
// rows of a packed sequence (T * B for a padded one), n rows that run at one step. Gates in torch's
// order i, f, g, o; weights as nn.LSTM stores them. Row-major.
#pragma once

#include <cstdint>

#include "cuda/plan.h"

// INSTANCE(T) for every dtype; -DISS_ONLY_DTYPE=float while working on a kernel: for that alone.
#ifdef ISS_ONLY_DTYPE
#define ISS_EACH_DTYPE(INSTANCE) INSTANCE(ISS_ONLY_DTYPE)
#else
#define ISS_EACH_DTYPE(INSTANCE) \
  INSTANCE(float) INSTANCE(double) INSTANCE(Bfloat16) INSTANCE(Float16)
#endif

namespace iss {

using CudaStream = void*;  // a cudaStream_t

// What a kernel computes in: float for the 16-bit types.
template <typename T>
struct WideType {
  using type = float;
};
template <>
struct WideType<double> {
  using type = double;
};
template <typename T>
using Wide = typename WideType<T>::type;

// Which rows of N run at step t: [offsets[t], offsets[t + 1]), those of the longest sequences; row
// b of the batch runs while b < n. offsets is nullptr for a padded batch, whose steps all have B
// rows.
struct Steps {
  int64_t steps, batch;
  const int64_t* offsets;  // [T + 1], device memory
  bool reverse;            // walk from the last step to the first
};

// All time steps of one layer in one direction, but for the products with w_ih.
template <typename T>
struct LstmForwardArgs {
  Steps sequence;
  int64_t hidden;
  const T* gates_x;    // [N, 4H] x @ w_ih.T + b_ih + b_hh
  const T* w_hh;       // [4H, H]
  const T* h0;         // [B, H]
  const T* c0;         // [B, H]
  T* y;                // [N, H]
  T* h_n;              // [B, H]
  T* c_n;              // [B, H]
  Wide<T>* gates;      // [N, 4H] i, f, g, o after activation; nullptr when not training
  Wide<T>* cells;      // [N, H]; nullptr when not training
  uint32_t* arrivals;  // [plan.groups] zero; Tier::kGrid alone
  void* exchange;      // [plan.exchange_bytes], a multiple of 16 bytes; Tier::kGrid alone
};

// From the gradients of y, h_n and c_n to those of the gates before activation, h0 and c0.
template <typename T>
struct LstmBackwardArgs {
  Steps sequence;  // as in forward: the kernel walks it the other way round
  int64_t hidden;
  const T* w_hh;         // [4H, H]
  const Wide<T>* gates;  // [N, 4H] as saved by forward
  const Wide<T>* cells;  // [N, H]
  const T* c0;           // [B, H]
  const T* dy;           // [N, H]
  const T* dh_n;         // [B, H]
  const T* dc_n;         // [B, H]
  T* dgates;             // [N, 4H]
  T* dh0;                // [B, H]
  T* dc0;                // [B, H]
  uint32_t* arrivals;    // [plan.groups] zero; Tier::kGrid alone
  void* exchange;        // [plan.exchange_bytes], a multiple of 16 bytes; Tier::kGrid alone
};

// The elementwise half of one step, for Tier::kSteps: n rows whose gates a GEMM has made.
template <typename T>
struct LstmCellArgs {
  int64_t rows, hidden;
  const T* gates_in;      // [n, 4H] before activation
  const Wide<T>* c_prev;  // [n, H]
  Wide<T>* c;             // [n, H]; may be c_prev
  T* h;                   // [n, H] o * tanh(c), h_stride elements from row to row
  int64_t h_stride;
  Wide<T>* gates;  // [n, 4H] after activation; nullptr when not training
  Wide<T>* cells;  // [n, H]; nullptr when not training
};

template <typename T>
struct LstmCellBackwardArgs {
  int64_t rows, hidden;
  const T* dh;            // [n, H] whole gradient of h_t
  const Wide<T>* gates;   // [n, 4H]
  const Wide<T>* cells;   // [n, H]
  const Wide<T>* c_prev;  // [n, H]
  Wide<T>* dc;            // [n, H] in: gradient of c_t; out: of c_{t-1}
  T* dgates;              // [n, 4H]
};

// One step, of a stream or of a sequence that has no other, from x to h and c, in one launch that
// reads each weight once for up to 8 rows. With a projection (P != H) h goes out unprojected: the
// host multiplies it by w_hr. W: how weights are stored. Rows of weights are read 16 bytes at a
// time where each begins at a multiple of 16 bytes, as do those of x or h_prev: whoever can choose
// the strides pads them. What may be nullptr is by default: a stream keeps c in Wide<T>, in place;
// a sequence comes with c0 and goes with c_n in T.
template <typename T, typename W = T>
struct LstmStreamStepArgs {
  int64_t rows, input, hidden, output;  // B, I, H, P
  const T* x;                           // [B, I], x_stride elements from row to row
  int64_t x_stride;
  const T* h_prev;  // [B, P], h_prev_stride elements from row to row
  int64_t h_prev_stride;
  const W* w_ih;  // [4H, I], w_ih_stride elements from row to row
  int64_t w_ih_stride;
  const W* w_hh;  // [4H, P], w_hh_stride elements from row to row
  int64_t w_hh_stride;
  T* h;  // [B, H], h_stride elements from row to row; not h_prev: other blocks read that
  int64_t h_stride;
  const Wide<T>* c_prev = nullptr;  // [B, H], or else c0
  const T* c0 = nullptr;            // [B, H]
  const T* b_ih = nullptr;          // [4H]
  const T* b_hh = nullptr;          // [4H]
  Wide<T>* c = nullptr;             // [B, H]; may be c_prev
  T* c_n = nullptr;                 // [B, H] c again
  T* h_n = nullptr;                 // [B, H] h again
  Wide<T>* gates = nullptr;         // [B, 4H] i, f, g, o after activation
};

// Each returns 0 or a cudaError_t; instances for float, double, Bfloat16 and Float16 (lstm.h), the
// step also for T = float with W = Float16 or Bfloat16.
template <typename T>
int launch_lstm_forward(const LstmPlan& plan, const LstmForwardArgs<T>& args, CudaStream stream);
template <typename T>
int launch_lstm_backward(const LstmPlan& plan, const LstmBackwardArgs<T>& args, CudaStream stream);
template <typename T>
int launch_lstm_cell(const LstmCellArgs<T>& args, CudaStream stream);
template <typename T>
int launch_lstm_cell_backward(const LstmCellBackwardArgs<T>& args, CudaStream stream);
template <typename T, typename W>
int launch_lstm_step(const LstmStreamStepArgs<T, W>& args, CudaStream stream);

// Whether the device can hold what `plan` wants resident at once (asks the CUDA runtime).
template <typename T>
bool can_launch_lstm_forward(const LstmPlan& plan);
template <typename T>
bool can_launch_lstm_backward(const LstmPlan& plan);
template <typename T>
bool can_launch(const LstmPlan& plan) {
  return plan.backward ? can_launch_lstm_backward<T>(plan) : can_launch_lstm_forward<T>(plan);
}

// Clusters of so many blocks that the current device holds at once, where each block takes
// `shared_bytes` of shared memory.
int resident_clusters(int blocks, int64_t shared_bytes);

}  // namespace iss
