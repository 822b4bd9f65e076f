// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels are told, and the functions that launch them: plain structs of raw pointers
// to device memory, no torch and no CUDA headers, so that host files compile without nvcc.
//
// Letters: types.h; n rows that run at one step. Gates in torch's order, weights as torch stores
// them. What a cell has no use for (cells/*-inl.h) is nullptr.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cells/spec.h"
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
  const bool* cuts;        // [N] where the state before the row's step is zero; may be nullptr
};

// All time steps of one layer in one direction, but for the products with w_ih.
template <typename T>
struct ResidentForwardArgs {
  Steps sequence;
  int64_t hidden;
  const T* inputs;        // [N, G H] x @ w_ih.T and the biases
  const T* product_bias;  // [H] of the last gate's product (GRU); nullptr: zero
  const T* w_hh;          // [G H, H]
  const T* h0;            // [B, H]
  const T* c0;            // [B, H]
  T* y;                   // [N, H]
  T* h_n;                 // [B, H]
  T* c_n;                 // [B, H]
  Wide<T>* gates;         // [N, saved_gates * H]; nullptr when not training
  Wide<T>* saved;         // [N, H] c of an LSTM; nullptr when not training
  uint32_t* arrivals;     // [plan.groups] zero; Tier::kGrid alone
  void* exchange;         // [plan.exchange_bytes], a multiple of 16 bytes; Tier::kGrid alone
};

// From the gradients of y, h_n and c_n to those of the inputs and products of every gate, and of h0
// and c0.
template <typename T>
struct ResidentBackwardArgs {
  Steps sequence;  // as in forward: the kernel walks it the other way round
  int64_t hidden;
  const T* w_hh;         // [G H, H]
  const Wide<T>* gates;  // [N, saved_gates * H] as saved by forward
  const Wide<T>* saved;  // [N, H]
  const T* y;            // [N, H]
  const T* h0;           // [B, H]
  const T* c0;           // [B, H]
  const T* dy;           // [N, H]
  const T* dh_n;         // [B, H]
  const T* dc_n;         // [B, H]
  T* dinputs;            // [N, G H]
  T* dproducts;          // [N, G H]; nullptr where they are dinputs
  T* dh0;                // [B, H]
  T* dc0;                // [B, H]
  uint32_t* arrivals;    // [plan.groups] zero; Tier::kGrid alone
  void* exchange;        // [plan.exchange_bytes], a multiple of 16 bytes; Tier::kGrid alone
};

// The pointwise half of one step, for Tier::kSteps: n rows whose products a GEMM has made.
template <typename T>
struct PointwiseForwardArgs {
  int64_t rows, hidden;
  const T* products;  // [n, G H] h @ w_hh.T
  const T* inputs;    // [n, G H], inputs_stride elements from row to row
  int64_t inputs_stride;
  const T* product_bias;  // [H] or nullptr
  const bool* cuts;       // [n] or nullptr
  const T* h_before;      // [n, H]
  Wide<T>* c;             // [n, H] moves on in place
  T* h;                   // [n, H]
  Wide<T>* gates;         // [n, saved_gates * H], gates_stride; nullptr when not training
  int64_t gates_stride;
  Wide<T>* saved;  // [n, H]; nullptr when not training
  // kMasked, [n, H], each nullptr where it has no use: the masks of candidates and of the states
  // before products; h times the latter; h once more, states_stride elements from row to row.
  const T *mask = nullptr, *state_mask = nullptr;
  T* masked = nullptr;
  Wide<T>* states = nullptr;
  int64_t states_stride = 0;
};

template <typename T>
struct PointwiseBackwardArgs {
  int64_t rows, hidden;
  const T* dh;              // [n, H] whole gradient of h_t, but for `carried` of a GRU
  const Wide<T>* gates;     // [n, saved_gates * H], gates_stride
  int64_t gates_stride;     // also of dinputs and dproducts
  const Wide<T>* saved;     // [n, H]
  const Wide<T>* c_before;  // [n, H]
  const T* h_before;        // [n, H]
  const T* y;               // [n, H]
  const bool* cuts;         // [n] or nullptr
  Wide<T>* carried;  // [n, H] of an LSTM the gradient of c, of a GRU of h but for the products:
                     // comes as that of step t and goes as that of step t - 1
  T* dinputs;        // [n, G H]
  T* dproducts;      // [n, G H]; nullptr where they are dinputs
  // kMasked, [n, H], each nullptr where there is none: as in forward, where `states` are of the
  // micro-step before, in the place of h_before; what the products that follow add to dh, which may
  // be nullptr, once it is times state_mask.
  const T *mask = nullptr, *state_mask = nullptr, *through = nullptr;
  const Wide<T>* states = nullptr;
  int64_t states_stride = 0;
};

// A whole step in one launch, of a stream or of a sequence that has no other: w_ih takes x and w_hh
// takes h_before. h is what leaves the cell: with a projection the host multiplies it by w_hr.
// W: how weights are stored. Rows of weights are read 16 bytes at a time where each begins at a
// multiple of 16 bytes, as do those of x or h_before: whoever can choose the strides pads them. A
// stream keeps c in Wide<T>, in place; a sequence comes with c0 and goes with c_n in T.
template <typename T, typename W = T>
struct SingleStepArgs {
  int64_t rows, input, hidden, output;  // B, I, H, P
  const T* x;                           // [B, I], x_stride elements from row to row
  int64_t x_stride;
  const T* h_before;  // [B, P], h_before_stride elements from row to row
  int64_t h_before_stride;
  const W* w_ih;  // [G H, I], w_ih_stride elements from row to row
  int64_t w_ih_stride;
  const W* w_hh;  // [G H, P], w_hh_stride elements from row to row
  int64_t w_hh_stride;
  T* h;  // [B, H], h_stride elements from row to row; not h_before: other blocks read that
  int64_t h_stride;
  const Wide<T>* c_before = nullptr;  // [B, H], or else c0
  const T* c0 = nullptr;              // [B, H]
  const T* b_ih = nullptr;            // [G H]
  const T* b_hh = nullptr;            // [G H]
  Wide<T>* saved = nullptr;           // [B, H]; of an LSTM c, which may be c_before
  T* c_n = nullptr;                   // [B, H] c again
  T* h_n = nullptr;                   // [B, H] h again
  Wide<T>* gates = nullptr;           // [B, saved_gates * H]
};

// Each returns 0 or a cudaError_t; instances for every cell (lstm.cu, gru.cu, ...; of deep ones the
// pointwise kernels alone) and float, double, Bfloat16 and Float16, the single step also for T =
// float with W = Float16 or Bfloat16.
template <CellKind cell, typename T>
int launch_resident_forward(const LayerPlan& plan, const ResidentForwardArgs<T>& args,
                            CudaStream stream);
template <CellKind cell, typename T>
int launch_resident_backward(const LayerPlan& plan, const ResidentBackwardArgs<T>& args,
                             CudaStream stream);
template <CellKind cell, typename T>
int launch_pointwise_forward(const PointwiseForwardArgs<T>& args, CudaStream stream);
template <CellKind cell, typename T>
int launch_pointwise_backward(const PointwiseBackwardArgs<T>& args, CudaStream stream);
template <CellKind cell, typename T, typename W>
int launch_single_step(const SingleStepArgs<T, W>& args, CudaStream stream);

// Whether the device can hold what `plan` wants resident at once (asks the CUDA runtime).
template <CellKind cell, typename T>
bool can_launch_resident_forward(const LayerPlan& plan);
template <CellKind cell, typename T>
bool can_launch_resident_backward(const LayerPlan& plan);

// f(the cell's kind as a type that has it for a value): with_cell(kind, [&](auto cell) { return
// launch_pointwise_forward<cell()>(args, stream); }). Not for deep cells, which have no resident
// kernels and no single step.
template <typename F>
auto with_cell(CellKind kind, F f) {
  switch (kind) {
    case CellKind::kGru:
      return f(std::integral_constant<CellKind, CellKind::kGru>{});
    case CellKind::kRnnTanh:
      return f(std::integral_constant<CellKind, CellKind::kRnnTanh>{});
    case CellKind::kRnnRelu:
      return f(std::integral_constant<CellKind, CellKind::kRnnRelu>{});
    default:
      return f(std::integral_constant<CellKind, CellKind::kLstm>{});
  }
}
// The same, of all cells.
template <typename F>
auto with_any_cell(CellKind kind, F f) {
  switch (kind) {
    case CellKind::kRhn:
      return f(std::integral_constant<CellKind, CellKind::kRhn>{});
    case CellKind::kRhnCarry:
      return f(std::integral_constant<CellKind, CellKind::kRhnCarry>{});
    default:
      return with_cell(kind, f);
  }
}

// Clusters of so many blocks that the current device holds at once, where each block takes
// `shared_bytes` of shared memory.
int resident_clusters(int blocks, int64_t shared_bytes);

}  // namespace iss
