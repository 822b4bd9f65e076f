// SPDX-License-Identifier: Apache-2.0
// Numbers in kernels: widening, narrowing, 16 bytes at a time, and the functions that the equations
// of cells (cells/*-inl.h) are written in. What nvcc has an instruction for uses it; the rest is
// the same text on the device and in the emulator.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/launches.h"
#include "types.h"
#include "simt/simt.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace iss {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(Bfloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float widen(Float16 x) {
#ifdef __CUDACC__
  return __half2float(__builtin_bit_cast(__half, x.bits));
#else
  return static_cast<float>(__builtin_bit_cast(_Float16, x.bits));
#endif
}

// To the nearest, ties to even; NaN stays NaN.
template <typename T>
__device__ __forceinline__ T narrow(Wide<T> x) {
  if constexpr (std::is_same_v<T, Wide<T>>) {
    return x;
  } else {
#ifdef __CUDACC__
    if constexpr (std::is_same_v<T, Bfloat16>)
      return {__builtin_bit_cast(uint16_t, __float2bfloat16_rn(x))};
    else
      return {__builtin_bit_cast(uint16_t, __float2half_rn(x))};
#else
    if constexpr (std::is_same_v<T, Bfloat16>) {
      const uint32_t bits = __builtin_bit_cast(uint32_t, x);
      if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
      return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
    } else {
      return {__builtin_bit_cast(uint16_t, static_cast<_Float16>(x))};
    }
#endif
  }
}

template <int kBytes>
using Word = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;

// 16 bytes of T, or fewer, which one instruction moves.
template <typename T, int kBytes = 16>
struct alignas(kBytes) Chunk {
  static constexpr int kSize = kBytes / sizeof(T);
  T values[kSize];

  // p: a multiple of kBytes.
  static __device__ __forceinline__ Chunk load(const T* p) {
    return __builtin_bit_cast(Chunk, *reinterpret_cast<const Word<kBytes>*>(p));
  }
  __device__ __forceinline__ void store(T* p) const {
    const auto word = __builtin_bit_cast(Word<kBytes>, *this);
#ifdef __CUDACC__
    __stwb(reinterpret_cast<Word<kBytes>*>(p), word);  // nvcc breaks a plain store of 16 into four
#else
    *reinterpret_cast<Word<kBytes>*>(p) = word;
#endif
  }
};

template <typename T>
__host__ __device__ __forceinline__ bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// The sum over a warp of values[lane * N / 32], in every lane: all N sums in N - 1 shuffles and
// some. Lanes are added in one order whatever N is.
template <int N, typename T>
__device__ __forceinline__ T sum_lanes(T (&values)[N]) {
  static_assert(N >= 1 && N <= 32 && (N & (N - 1)) == 0);
  int left = N;
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) {
    if (left == 1) {
      values[0] += __shfl_xor_sync(~0u, values[0], bit);
      continue;
    }
    left /= 2;
    const bool upper = threadIdx.x & bit;  // goes on with the upper half of the values
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
      if (i < left) {
        const T given = upper ? values[i] : values[i + left];
        const T kept = upper ? values[i + left] : values[i];
        values[i] = kept + __shfl_xor_sync(~0u, given, bit);
      }
  }
  return values[0];
}

__device__ __forceinline__ float fma(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fma(double a, double b, double c) { return ::fma(a, b, c); }

// Sigmoid and tanh. In float they are short chains of dependent instructions, which is what a step
// of a small layer waits for: the special function unit's 2^x and 1/x have 2 and 1 ulp, overflow to
// infinity and 0 as these two want it, and pass NaN.
__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal(1 + exp2_approx(x * -0x1.715476p0f));  // log2 e
}
__device__ __forceinline__ float tanh(float x) {
  const float large = fmaf(-2, reciprocal(1 + exp2_approx(x * 0x1.715476p1f)), 1);
  // x + x^3 p(x^2), Taylor: keeps its relative accuracy at 0, and has 9e-9 at 1/4.
  const float square = x * x;
  float p = fmaf(square, 62.f / 2835, -17.f / 315);
  p = fmaf(square, p, 2.f / 15);
  p = fmaf(square, p, -1.f / 3);
  const float small = fmaf(x * square, p, x);
  return fabsf(x) < 0.25f ? small : large;
}

// exp(x) = scale * (1 + fraction) for |x| <= 708; beyond, the value at the limit. NaN passes.
struct Exp {
  double scale, fraction;

  __device__ __forceinline__ explicit Exp(double x) {
    constexpr double kLimit = 708;
    x = x > kLimit ? kLimit : x < -kLimit ? -kLimit : x;  // fmin would drop NaN
    // Adding 1.5 * 2^52 leaves round(x / ln 2) in the low bits.
    const double shifted = fma(x, 1.4426950408889634, 0x1.8p52), n = shifted - 0x1.8p52;
    // ln 2 in two parts, the first with so few bits that its product with n is exact.
    const double r = fma(n, -0x1.a39ef35793c76p-33, fma(n, -0x1.62e42feep-1, x));
    double p = 1. / 87178291200;  // Taylor: (exp(r) - 1 - r) / r^2 = 1/2! + ... r^12/14!
    p = fma(p, r, 1. / 6227020800);
    p = fma(p, r, 1. / 479001600);
    p = fma(p, r, 1. / 39916800);
    p = fma(p, r, 1. / 3628800);
    p = fma(p, r, 1. / 362880);
    p = fma(p, r, 1. / 40320);
    p = fma(p, r, 1. / 5040);
    p = fma(p, r, 1. / 720);
    p = fma(p, r, 1. / 120);
    p = fma(p, r, 1. / 24);
    p = fma(p, r, 1. / 6);
    p = fma(p, r, 1. / 2);
    fraction = fma(p * r, r, r);
    scale = __builtin_bit_cast(double, (__builtin_bit_cast(uint64_t, shifted) << 52) +
                                           __builtin_bit_cast(uint64_t, 1.0));  // 2^n
  }
};

__device__ __forceinline__ double sigmoid(double x) {
  const Exp e(-x);
  return 1 / fma(e.scale, e.fraction, e.scale + 1);
}
// By expm1, so that it keeps its relative accuracy at 0.
__device__ __forceinline__ double tanh(double x) {
  const Exp e(x + x);
  const double expm1 = fma(e.scale, e.fraction, e.scale - 1);
  return expm1 / (expm1 + 2);
}

template <typename V>
__device__ __forceinline__ V constant(double value) {
  return static_cast<V>(value);
}
// NaN passes through both.
template <typename V>
__device__ __forceinline__ V relu(V x) {
  return x < 0 ? V(0) : x;
}
template <typename V>
__device__ __forceinline__ V if_positive(V y, V dh) {
  return y <= 0 ? V(0) : dh;
}
// Sigmoid of each gate, or tanh where kTanh says so.
template <bool... kTanh, typename V>
__device__ __forceinline__ void activate(V* gates) {
  int g = 0;
  ((gates[g] = kTanh ? tanh(gates[g]) : sigmoid(gates[g]), ++g), ...);
}

}  // namespace iss
