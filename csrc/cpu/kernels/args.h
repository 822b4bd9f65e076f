// SPDX-License-Identifier: Apache-2.0
// The arguments of the kernels: plain structs of raw pointers, no torch. Letters: types.h.
#pragma once

#include <cstdint>

#include "types.h"

namespace iss {

// Panels [begin, end) of a packed matrix: a thread's share of the columns or units. With
// `backwards` a kernel takes them from the last to the first.
struct PanelRange {
  int64_t begin, end;
  bool backwards = false;
};

// Rows of a product that are worked on together: few enough to stay in the cache while a kernel
// goes over the panels, and a multiple of the height of every tile.
constexpr int64_t kBlockRows = 66;

// Rows of a tile, and the groups of neighbours along K that it has.
constexpr int64_t kTileSize = 16;
constexpr int64_t whole_tiles(int64_t count) {
  return (count + kTileSize - 1) / kTileSize * kTileSize;
}

// A row is cut into lines of `line` elements: where its first one begins, and how far the next one
// is. A row's lines are side by side, or, in tiles, one tile apart: a tile has one of each of its
// kTileSize rows.
struct Lines {
  int64_t first, apart;
};
constexpr Lines lines_of(bool tiles, int64_t row, int64_t row_elements, int64_t line) {
  const int64_t in_tile = tiles ? row % kTileSize : 0;
  return {(row - in_tile) * row_elements + in_tile * line, tiles ? kTileSize * line : line};
}

// Groups of neighbours along K in a matrix packed as int8 or pairs. depth: neighbours of int8.
constexpr int64_t groups_of(Format format, int64_t k, int64_t depth) {
  const int64_t each = is_int8(format) ? depth : 2, groups = (k + each - 1) / each;
  return in_tiles(format) ? whole_tiles(groups) : groups;
}

// The largest element of a row that is quantised to int8 as it is. (128 / its scale is a float.)
constexpr float kInt8Largest = 0x1p127f;

// Vectors of a panel: as many as the gates of a unit, or a multiple of them.
constexpr int panel_vectors(int gates) { return gates == 3 ? 3 : 4; }

// A matrix B [K, columns] to be multiplied from the right, cut into panels of V = panel_vectors
// vectors of columns: packed [panel][K][V][lanes], zero where a panel reaches past the last column.
//
// With G > 1 gates the columns are G H gate rows, one gate after the other. A panel holds all gates
// of the same units, so one tile of sums is all that those units need: V / G blocks of `lanes`
// units, each with G vectors. If fewer units are left for the last block, its gates stand that many
// columns apart instead of `lanes`. The end of the panel is then empty, and no kernel reads it.
//
// kBfloat16: two vectors of a panel are interleaved; a third one stands alone. kPairs: as a matrix
// of Pairs with K / 2 rows; an odd K is filled up with zeros. kInt8: [panel][K / depth][V][lanes]
// [depth], then the scales of the panel, float [V][lanes], and the initial values of its sums,
// int32 [V][lanes]. kTiles and kInt8Tiles: the same vector by vector, [panel][V][K][lanes], with K
// filled up with zeros to a whole tile.
struct PackArgs {
  int64_t k, columns;
  int gates = 1;
  Format format = Format::kSame;
  bool rounds = false;     // kPairs, kTiles: b has floats, not Bfloat16
  PanelRange panels = {};  // those to write
  const void* b;           // element (k, column) at b[k * stride_k + column * stride_column]
  int64_t stride_k, stride_column;
  const float* scales = nullptr;  // [columns]; int8 alone
  void* packed = nullptr;         // [Kernels::packed_bytes(...)]
};

// How a matrix B [K, columns] lies in memory: cut into panels; or, in floats or Bfloat16, as torch
// stores it, B or B.T row after row.
enum class Order { kPanels, kStored, kTransposed };

struct Packed {
  Format format;
  const void* panels;  // PackArgs::packed, or the first element of what is stored
  Order order = Order::kPanels;
};

// What rows hold that are multiplied by pairs: floats, Bfloat16 as torch stores it, or pairs as
// round_rows leaves them, or TransposeArgs. Strides count these.
enum class Elements { kFloats, kBfloat16, kPairs };

// out = or += a @ B + bias, with B packed for one gate. The columns of `panels` are written.
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
  void* scratch;  // [Kernels::scratch_bytes(b.format, rows, K)], the calling thread's own
  // Where b is transposed, a_more @ B_more [k_more, columns] may be added to each product: one sum
  // over both is cheaper than two. B_more has the order and format of b.
  const T* a_more = nullptr;
  int64_t a_more_stride = 0, k_more = 0;
  Packed b_more = {};
  Elements elements = Elements::kFloats;  // of a
  bool bfloat16_out = false;  // out is of Bfloat16, and so is out_stride; not with `accumulate`
  // kTiles, without a bias: where > 0, out is [panel][panel_rows][columns of a panel], which
  // StepArgs::initial reads; out_stride is not used.
  int64_t panel_rows = 0;
};

// to = from.T; sums += the sum of each column of `from`. With a format of pairs, `to` holds the
// rows as round_rows leaves them: to_stride counts Pairs, and each row is filled up to whole tiles.
template <typename T>
struct TransposeArgs {
  int64_t rows, columns;
  const T* from;  // [rows, columns], from_stride elements from row to row
  int64_t from_stride;
  T* to;  // [columns, rows], to_stride elements from row to row
  int64_t to_stride;
  T* sums;  // [columns]
  Format format = Format::kSame;
};

// One time step of a cell (cells/*-inl.h), or a micro-step of one that is deep, for the units of
// `panels`: the product h_prev @ w_hh.T, and the cell as its finish. `gates` may be `inputs`, and
// `c` may be `before`.
template <typename T>
struct StepArgs {
  int64_t rows, hidden, k;  // n, H, P
  PanelRange panels;
  const T* h_prev;  // [n, P], h_prev_stride elements from row to row
  int64_t h_prev_stride;
  const T* before;  // [n, H], before_stride: of the step before, c of an LSTM, h of other cells
  int64_t before_stride;
  const bool* resets;  // [n] whether the state is zero before this step; nullptr: no resets
  Packed w_hh;         // w_hh.T [P, G H], packed with G gates
  const T* inputs;     // [n, G H] x_t @ w_ih.T and the biases
  int64_t inputs_stride;
  const T* product_bias;  // [H] kProductBias: the bias of the last product; nullptr: zero
  T* c;                   // [n, H] kHasC
  T* h;                   // [n, H] the output, or what w_hr projects
  int64_t h_stride;
  // kMasked, all [n, H]: the masks of the candidates and of the states before products, and h times
  // the latter. nullptr: none.
  const T *mask = nullptr, *state_mask = nullptr;
  T* masked = nullptr;
  T* gates;  // [n, kSavedGates * H], gates_stride; nullptr when not training
  int64_t gates_stride;
  T* saved;                         // [n, H] kSavedState; nullptr when not training
  void* scratch;                    // as in MatmulArgs, of w_hh
  int64_t product_bias_stride = 0;  // from row to row; 0: the same for all
  bool rough = false;  // sigmoid and tanh may err by 2^-13, where an ISA is faster then
  // kTiles: what the sums of the product begin with, in the form of MatmulArgs::panel_rows; then
  // `inputs` has the biases alone. Up to 15 rows after the last one are read. nullptr: zeros.
  const T* initial = nullptr;
  int64_t initial_rows = 0;
};

// The gradient of a time step for the units of `panels`: dh = a @ B + dy + dh_n, and the gradients
// of the cell as its finish. `carried` is read and written.
template <typename T>
struct StepBackwardArgs {
  int64_t rows, hidden, k;  // n, H, K
  PanelRange panels;
  // [n, K], a_stride elements from row to row: the gradient of the next step's products, K = G H;
  // with a projection the gradient of this step's output, K = P. K = 0 where no step follows.
  const T* a;
  int64_t a_stride;
  Packed b;                  // [K, H], packed for one gate: w_hh, or w_hr
  const bool* resets;        // [n] whether the state was zero before this step; nullptr: no resets
  const bool* resets_after;  // [n] the same for the step that follows: a @ B counts as zero there
  const T *dy, *dh_n;        // [n, H], or nullptr
  // kMasked, [n, H]: as in StepArgs; state_mask multiplies a @ B.
  const T *mask = nullptr, *state_mask = nullptr;
  const T* gates;        // [n, kSavedGates * H] as saved by the forward step, gates_stride
  int64_t gates_stride;  // also of dinputs and dproducts
  const T* saved;        // [n, H]
  const T* before;       // [n, H], before_stride
  int64_t before_stride;
  const T* y;  // [n, H], y_stride: the output of this step
  int64_t y_stride;
  T* carried;     // [n, H] kCarries; in: the gradient of c_t (kHasC), or a summand of dh; out: the
                  // same for the step before
  T* dinputs;     // [n, G H] gradient of the inputs
  T* dproducts;   // [n, G H] gradient of the products; dinputs itself but for kSplit
  void* scratch;  // as in MatmulArgs
};

}  // namespace iss
