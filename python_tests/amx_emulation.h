// SPDX-License-Identifier: Apache-2.0
// Included before csrc/cpu/kernels/isa_avx512.cpp (-include): the instructions of AMX that it uses,
// by plain loops, so that its tiles run on a CPU without them.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_emulation {

// A tile as its rows of bytes.
struct Tile {
  uint8_t bytes[16][64];
};
inline thread_local Tile tiles[8];
inline thread_local bool configured = false;
inline thread_local uint8_t rows_of[8];

inline void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("AMX: %s\n", what);
  std::abort();
}

inline void configure(const void* shapes) {
  const auto* const bytes = static_cast<const uint8_t*>(shapes);
  expect(bytes[0] == 1 && bytes[1] == 0, "expected palette 1 and row 0");
  for (int i = 2; i < 16; ++i) expect(bytes[i] == 0, "expected reserved bytes of zero");
  for (int t = 0; t < 16; ++t) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * t, 2);
    const uint8_t rows = bytes[48 + t];
    expect(row_bytes == (t < 8 ? 64 : 0), "expected rows of 64 bytes");
    expect(t < 8 ? rows >= 1 && rows <= 16 : rows == 0, "expected 1 to 16 rows");
    if (t < 8) rows_of[t] = rows;
  }
  std::memset(tiles, 0, sizeof(tiles));
  configured = true;
}

inline void release() { configured = false; }

inline Tile& tile(int t) {
  expect(configured, "expected a configuration");
  return tiles[t];
}

// Rows that a tile does not have are zeros.
inline void load(int t, const void* base, int64_t stride) {
  std::memset(&tile(t), 0, sizeof(Tile));
  for (int r = 0; r < rows_of[t]; ++r)
    std::memcpy(tile(t).bytes[r], static_cast<const char*>(base) + r * stride, 64);
}

inline void store(int t, void* base, int64_t stride) {
  for (int r = 0; r < rows_of[t]; ++r)
    std::memcpy(static_cast<char*>(base) + r * stride, tile(t).bytes[r], 64);
}

inline void zero(int t) { std::memset(&tile(t), 0, sizeof(Tile)); }

template <typename T>
T element(const Tile& of, int row, int at) {
  T value;
  std::memcpy(&value, of.bytes[row] + at * sizeof(T), sizeof(T));
  return value;
}

// sum[m][n] += the sum over k and i < each of a[m][each k + i] * b[k][each n + i].
template <typename Sum, typename A, typename B, typename Value>
void dot(int sum, int a, int b, Value value) {
  constexpr int kEach = 4 / sizeof(A);
  expect(rows_of[sum] == rows_of[a] && rows_of[b] == 16, "expected tiles that fit each other");
  for (int m = 0; m < rows_of[sum]; ++m)
    for (int n = 0; n < 16; ++n) {
      Sum total = element<Sum>(tile(sum), m, n);
      for (int k = 0; k < 16; ++k)
        for (int i = 0; i < kEach; ++i)
          total += value(element<A>(tile(a), m, kEach * k + i)) *
                   value(element<B>(tile(b), k, kEach * n + i));
      std::memcpy(tile(sum).bytes[m] + n * sizeof(Sum), &total, sizeof(Sum));
    }
}

inline void dot_bfloat16(int sum, int a, int b) {
  dot<float, uint16_t, uint16_t>(sum, a, b, [](uint16_t half) {
    const uint32_t bits = uint32_t{half} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return std::fpclassify(value) == FP_SUBNORMAL ? 0.0f : value;
  });
}

inline void dot_unsigned_signed(int sum, int a, int b) {
  dot<int32_t, uint8_t, int8_t>(sum, a, b, [](auto byte) { return int32_t{byte}; });
}

}  // namespace amx_emulation

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define _tile_loadconfig amx_emulation::configure
#define _tile_release amx_emulation::release
#define _tile_loadd amx_emulation::load
#define _tile_stream_loadd amx_emulation::load
#define _tile_stored amx_emulation::store
#define _tile_zero amx_emulation::zero
#define _tile_dpbf16ps amx_emulation::dot_bfloat16
#define _tile_dpbusd amx_emulation::dot_unsigned_signed

#undef __builtin_cpu_supports
#define __builtin_cpu_supports(isa) 1
#define syscall(...) 0
