// SPDX-License-Identifier: Apache-2.0
// What an LSTM kernel is told: plain structs of raw pointers, no torch.
//
// Letters: T steps, B batch, I input size, H hidden (cell) size, P output size (H, or proj_size), n
// rows of one call. Gates in torch's order i, f, g, o; weights as nn.LSTM stores them. Row-major.
#pragma once

#include <cstdint>

#include "types.h"

namespace iss {

// Panels [begin, end) of a packed matrix: a thread's share of the columns or units. A kernel may
// take them the other way round, `backwards`.
struct PanelRange {
  int64_t begin, end;
  bool backwards = false;
};

// A matrix B [K, columns] to be multiplied from the right, cut into panels of 4 vectors of columns:
// packed [panel][K][4][lanes], zero where a panel reaches past the last column. With `gates` the
// columns are 4H gate rows, and the 4 vectors of a panel are the i, f, g, o of the same units, so
// that one panel is all that those units need. Where units are left for a part of the last panel,
// its gates stand that many columns apart instead of `lanes`: what is empty is its end, which no
// kernel reads. kBfloat16: each two vectors are interleaved. kInt8:
// [panel][K / depth][4][lanes][depth], then the panel's scales, float [4][lanes], and what its sums
// start from, int32 [4][lanes].
struct PackArgs {
  int64_t k, columns;
  bool gates = false;
  Format format = Format::kSame;
  PanelRange panels = {};  // those to write
  const void* b;           // element (k, column) at b[k * stride_k + column * stride_column]
  int64_t stride_k, stride_column;
  const float* scales = nullptr;  // [columns]; kInt8 alone
  void* packed = nullptr;         // [Kernels::packed_bytes(...)]
};

struct Packed {
  Format format;
  const void* panels;  // PackArgs::packed
};

// out = a @ B + bias, or out += that, with B packed without `gates`; the columns of `panels` are
// written.
template <typename T>
struct MatmulArgs {
  int64_t rows, k, columns;
  PanelRange panels;
  const T* a;  // [rows, K], a_stride elements from row to row
  int64_t a_stride;
  Packed b;
  const T* bias;  // [columns], or nullptr
  bool accumulate;
  T* out;  // [rows, columns], out_stride elements from row to row
  int64_t out_stride;
  void* scratch;  // [Kernels::scratch_bytes(rows, K)], the calling thread's own; for int8
};

// to = from, transposed; sums += the sum of each column.
template <typename T>
struct TransposeArgs {
  int64_t rows, columns;
  const T* from;  // [rows, columns], from_stride elements from row to row
  int64_t from_stride;
  T* to;  // [columns, rows], to_stride elements from row to row
  int64_t to_stride;
  T* sums;  // [columns]
};

// One time step for the units of `panels`. gates may be gates_x itself, c may be c_prev.
template <typename T>
struct LstmStepArgs {
  int64_t rows, hidden, k;  // n, H, P
  PanelRange panels;
  const T* h_prev;  // [n, P], h_prev_stride elements from row to row
  int64_t h_prev_stride;
  const T* c_prev;   // [n, H]
  Packed w_hh;       // w_hh.T [P, 4H], packed with `gates`
  const T* gates_x;  // [n, 4H]  x_t @ w_ih.T + b_ih + b_hh
  T* c;              // [n, H]
  T* h;              // [n, H]   o * tanh(c): the output, or what w_hr projects
  int64_t h_stride;  // elements from row to row of h
  T* gates;          // [n, 4H]  i, f, g, o after activation; nullptr when not training
  T* cells;          // [n, H]   a copy of c; nullptr when not training
  void* scratch;     // as in MatmulArgs
};

// One time step's gradient for the units of `panels`: dh = a @ B + dy + dh_n, and what follows from
// it. dc may be dc_prev.
template <typename T>
struct LstmStepBackwardArgs {
  int64_t rows, hidden, k;  // n, H, K
  PanelRange panels;
  const T* a;  // [n, K], a_stride elements from row to row: the next step's dgates, K = 4H; with a
               // projection the gradient of this step's output, K = P; K = 0 where no step follows
  int64_t a_stride;
  Packed b;            // [K, H], packed without `gates`: w_hh, or w_hr
  const T *dy, *dh_n;  // [n, H], or nullptr
  const T* gates;      // [n, 4H] as saved by the forward step
  const T* cells;      // [n, H]
  const T* c_prev;     // [n, H]
  T* dc;               // [n, H]  in: gradient of c_t; out: gradient of c_{t-1}
  T* dgates;           // [n, 4H] gradient before the activations
};

}  // namespace iss
