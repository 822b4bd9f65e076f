// SPDX-License-Identifier: Apache-2.0
// The table of CPU kernels: one per instruction set, each filled by one isa_*.cpp.
#pragma once

#include <algorithm>
#include <limits>
#include <bit>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "cells/spec.h"
#include "cpu/kernels/args.h"
#include "group_lasso.h"

namespace iss {

template <typename T>
struct Kernels {
  int64_t lanes;          // elements of a vector
  int64_t tile_rows;      // rows that one matmul tile holds in registers
  int64_t depth;          // neighbours along K that one kInt8 instruction adds up
  Format bfloat16, int8;  // what weights of these types are packed as
  void (*pack)(const PackArgs&);
  void (*matmul)(const MatmulArgs<T>&);
  void (*transpose)(const TransposeArgs<T>&);
  struct Cell {
    void (*step)(const StepArgs<T>&);
    void (*step_backward)(const StepBackwardArgs<T>&);
  } cells[kCellKinds];  // by CellKind

  const Cell& of(CellKind kind) const { return cells[static_cast<int>(kind)]; }

  // Units of a panel for so many gates; columns, for one.
  int64_t panel_units(int gates = 1) const { return panel_vectors(gates) / gates * lanes; }
  int64_t panel_columns(int gates = 1) const { return panel_vectors(gates) * lanes; }
  int64_t panels(int64_t units, int gates = 1) const {
    return (units + panel_units(gates) - 1) / panel_units(gates);
  }
  // Bytes of PackArgs::packed for `columns` columns, those of all gates.
  int64_t packed_bytes(int64_t k, int64_t columns, int gates, Format format) const {
    const int64_t width = panel_columns(gates), groups = groups_of(format, k, depth);
    const int64_t panel = is_int8(format)           ? width * (groups * depth + 8)
                          : is_pairs(format)        ? width * groups * int64_t{sizeof(Pair)}
                          : format == Format::kSame ? width * k * int64_t{sizeof(T)}
                                                    : width * k * 2;
    return panels(columns / gates, gates) * panel;
  }
  // Rows of a product that are worked on together: each time the kernel reads all of the matrix.
  static constexpr int64_t block_rows(Format format) { return in_tiles(format) ? 256 : kBlockRows; }
  // Rows of a product that are one share of the work: whole tiles.
  static constexpr int64_t share_rows(Format format) {
    return in_tiles(format) ? kBlockRows / kTileSize * kTileSize : kBlockRows;
  }
  // Bytes that a kernel needs to quantise `rows` rows of k elements, in one term or two, or to
  // round them: whole cache lines.
  int64_t scratch_bytes(Format format, int64_t rows, int64_t k) const {
    const int64_t groups = groups_of(format, k, depth);
    const int64_t all = in_tiles(format) ? whole_tiles(rows) : rows;
    const int64_t bytes = is_int8(format)    ? 2 * all * (4 + 2 * groups * depth)
                          : is_pairs(format) ? all * groups * int64_t{sizeof(Pair)} + 32
                                             : 0;  // 32: a kernel may write half a vector too much
    return (bytes + 63) / 64 * 64;
  }
};

// For weights stored as W.
template <typename W>
struct GroupLassoKernels {
  void (*squares)(const SquaresArgs<W>&);
  void (*add_scaled)(const ByUnitsArgs<W>&);
  void (*scale)(const ByUnitsArgs<W>&);
  void (*threshold)(const ByUnitsArgs<W>&);

  auto by_units(ByUnits what) const {
    return what == ByUnits::kAddScaled ? add_scaled : what == ByUnits::kScale ? scale : threshold;
  }
};

struct CpuKernels {
  const char* isa;
  bool (*supported)();
  Kernels<float> f32;
  Kernels<double> f64;
  GroupLassoKernels<float> lasso_f32;
  GroupLassoKernels<double> lasso_f64;
  GroupLassoKernels<Bfloat16> lasso_bf16;

  template <typename T>
  const Kernels<T>& of() const {
    if constexpr (sizeof(T) == 4)
      return f32;
    else
      return f64;
  }

  template <typename W>
  const GroupLassoKernels<W>& lasso() const {
    if constexpr (std::is_same_v<W, Bfloat16>)
      return lasso_bf16;
    else if constexpr (sizeof(W) == 4)
      return lasso_f32;
    else
      return lasso_f64;
  }
};

// The kernels that run now: the best that this CPU supports, or what ISS_KERNELS_ISA names.
const CpuKernels& cpu_kernels();
// Forces one ISA and returns the former; throws std::invalid_argument for a name it cannot run.
std::string set_isa(const std::string& name);
// Best first.
std::vector<std::string> built_isas();
std::vector<std::string> supported_isas();

}  // namespace iss
