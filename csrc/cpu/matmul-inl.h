// SPDX-License-Identifier: Apache-2.0
// The register tile under every matrix product here: Rows rows of `a` times Panels packed panels.
// Each sum runs over k in order with one accumulator, so a result depends neither on the other rows
// of the batch nor on how work is split: batch 1 and batch 64 give the same bits.

constexpr int kPanelVectors = 4;

template <typename T>
constexpr int64_t kPanelColumns = kPanelVectors * Vec<T>::kLanes;

template <typename T, int Rows, int Panels>
struct Tile {
  Vec<T> sum[Rows][Panels * kPanelVectors];

  // sum = a[0:Rows, 0:k] @ panels, with panels[p] at panels + p * k * kPanelColumns. Not inlined:
  // next to the code that finishes a tile, the compiler would keep that code's constants in
  // registers and the sums in memory.
  __attribute__((noinline)) void multiply(const T* a, int64_t k, const T* panels) {
    constexpr int kVectors = Panels * kPanelVectors;
    Vec<T> local[Rows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) local[r][j] = Vec<T>::set(0);
    for (int64_t i = 0; i < k; ++i) {
      Vec<T> x[Rows];
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) x[r] = Vec<T>::set(a[r * k + i]);
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) {
        const int64_t panel = j / kPanelVectors, vector = j % kPanelVectors;
        const T* at = panels + (panel * k + i) * kPanelColumns<T> + vector * Vec<T>::kLanes;
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) local[r][j] = fma(x[r], Vec<T>::load(at), local[r][j]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) sum[r][j] = local[r][j];
  }
};

// Calls finish(tile, first_row, first_panel) for tiles that cover all rows and panels: as tall as
// registers allow, and for a single row two panels wide, to keep enough sums in flight.
template <typename T, int Rows, int Panels, typename Finish>
inline void each_row_tile(const T* a, int64_t first, int64_t rows, int64_t k, const T* packed,
                          int64_t panel, const Finish& finish) {
  for (; first + Rows <= rows; first += Rows) {
    Tile<T, Rows, Panels> tile;
    tile.multiply(a + first * k, k, packed + panel * k * kPanelColumns<T>);
    finish(tile, first, panel);
  }
  if constexpr (Rows > 1)
    each_row_tile<T, Rows - 1, Panels>(a, first, rows, k, packed, panel, finish);
}

template <typename T, typename Finish>
inline void each_tile(const T* a, int64_t rows, int64_t k, const T* packed, PanelRange panels,
                      const Finish& finish) {
  int64_t panel = panels.begin;
  if (rows == 1)
    for (; panel + 2 <= panels.end; panel += 2)
      each_row_tile<T, 1, 2>(a, 0, rows, k, packed, panel, finish);
  for (; panel < panels.end; ++panel)
    each_row_tile<T, Vec<T>::kTileRows, 1>(a, 0, rows, k, packed, panel, finish);
}

template <typename T>
void pack(const PackArgs<T>& args) {
  constexpr int64_t kLanes = Vec<T>::kLanes;
  const int64_t units = args.gates ? args.columns / kPanelVectors : args.columns;
  const int64_t per_panel = args.gates ? kLanes : kPanelColumns<T>;
  for (int64_t first = 0; first < units; first += per_panel) {
    T* panel = args.packed + first / per_panel * args.k * kPanelColumns<T>;
    for (int64_t slot = 0; slot < kPanelColumns<T>; ++slot) {
      // Slot (vector j, lane l) holds gate j of unit first + l, or simply column first + slot.
      const int64_t unit = first + (args.gates ? slot % kLanes : slot);
      const int64_t column = args.gates ? slot / kLanes * units + unit : unit;
      for (int64_t i = 0; i < args.k; ++i)
        panel[i * kPanelColumns<T> + slot] =
            unit < units ? args.b[i * args.stride_k + column * args.stride_column] : T(0);
    }
  }
}

template <typename T>
void matmul(const MatmulArgs<T>& args) {
  constexpr int64_t kLanes = Vec<T>::kLanes;
  each_tile<T>(
      args.a, args.rows, args.k, args.packed, args.panels,
      [&]<int Rows, int Panels>(const Tile<T, Rows, Panels>& tile, int64_t row, int64_t panel) {
        for (int r = 0; r < Rows; ++r)
          for (int j = 0; j < Panels * kPanelVectors; ++j) {
            const int64_t column = panel * kPanelColumns<T> + j * kLanes;
            const int64_t left = args.columns - column;
            if (left <= 0) break;
            T* out = args.out + (row + r) * args.columns + column;
            Vec<T> value = tile.sum[r][j];
            if (args.bias != nullptr) {
              const T* bias = args.bias + column;
              value = value + (left >= kLanes ? Vec<T>::load(bias) : Vec<T>::load(bias, left));
            }
            left >= kLanes ? value.store(out) : value.store(out, left);
          }
      });
}
