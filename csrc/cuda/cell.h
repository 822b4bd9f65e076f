// SPDX-License-Identifier: Apache-2.0
// The cells as CUDA kernels see them: the equations of cells/*-inl.h for one unit, and which type
// has those of a kind.
#pragma once

#include "cells/spec.h"
#include "cuda/math.h"
#include "cuda/tile.h"

#define ISS_CELL __device__ __forceinline__

namespace iss {

// nvcc unrolls short loops without being told, and knows no pragma of GCC's.
#ifdef __CUDACC__
#pragma nv_diag_suppress unrecognized_gcc_pragma
#endif

#include "cells/gru-inl.h"
#include "cells/lstm-inl.h"
#include "cells/rhn-inl.h"
#include "cells/rnn-inl.h"

#ifdef __CUDACC__
#pragma nv_diag_default unrecognized_gcc_pragma
#endif

template <CellKind kind>
struct CellOf {
  using type = Lstm;
};
template <>
struct CellOf<CellKind::kGru> {
  using type = Gru;
};
template <>
struct CellOf<CellKind::kRnnTanh> {
  using type = RnnTanh;
};
template <>
struct CellOf<CellKind::kRnnRelu> {
  using type = RnnRelu;
};
template <>
struct CellOf<CellKind::kRhn> {
  using type = Rhn;
};
template <>
struct CellOf<CellKind::kRhnCarry> {
  using type = RhnCarry;
};

// Whether `before` of the equations is h (GRU), of which then a gradient goes back beside that of
// the products.
template <typename Cell>
constexpr bool needs_h = Cell::kCarries && !Cell::kHasC;
// Whether backward needs y.
template <typename Cell>
constexpr bool needs_y = Cell::kSavedGates == 0;

}  // namespace iss
