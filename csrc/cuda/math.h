// SPDX-License-Identifier: Apache-2.0
// Numbers in kernels: widening, narrowing, 16 bytes at a time, and the LSTM's two activations. What
// nvcc has an instruction for uses it; the rest is the same text on the device and in the emulator.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/kernels.h"
#include "lstm.h"
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

// Reciprocal by the special function unit, 2 ulp in all, for 2^-126 <= |b| <= 2^126.
__device__ __forceinline__ float quotient(float a, float b) {
#ifdef __CUDACC__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
__device__ __forceinline__ double quotient(double a, double b) { return a / b; }

__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }

template <typename T>
struct ExpConstants;

// kShift: adding 1.5 * 2^(mantissa bits) leaves round(x) in the low bits. kLn2Hi has few enough
// bits that n * kLn2Hi is exact; kLn2Lo is the rest of ln 2.
template <>
struct ExpConstants<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23;
  static constexpr float kLimit = 87.0f;  // exp(87) < 2^126, as `quotient` wants it
  static constexpr float kShift = 0x1.8p23f, kLog2e = 0x1.715476p0f;
  static constexpr float kLn2Hi = 0x1.63p-1f, kLn2Lo = -0x1.bd0106p-13f;
  // (exp(r) - 1 - r) / r^2, minimax over |r| <= ln(2)/2: a quarter of an ulp of exp(r) - 1.
  static __device__ __forceinline__ float series(float r) {
    float p = 0x1.6bec06p-10f;
    p = fmaf(p, r, 0x1.122776p-7f);
    p = fmaf(p, r, 0x1.555674p-5f);
    p = fmaf(p, r, 0x1.5554b0p-3f);
    return fmaf(p, r, 0x1.fffffep-2f);
  }
};
template <>
struct ExpConstants<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52;
  static constexpr double kLimit = 708.0, kShift = 0x1.8p52, kLog2e = 1.4426950408889634;
  static constexpr double kLn2Hi = 0x1.62e42feep-1, kLn2Lo = 0x1.a39ef35793c76p-33;
  static __device__ __forceinline__ double series(double r) {  // Taylor: 1/2! ... 1/14!
    double p = 1. / 87178291200;
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
    return fma(p, r, 1. / 2);
  }
};

// exp(x) = scale * (1 + fraction) for |x| <= kLimit; beyond, the value at the limit. NaN passes.
template <typename T>
struct Exp {
  T scale, fraction;

  __device__ __forceinline__ explicit Exp(T x) {
    using C = ExpConstants<T>;
    using Bits = typename C::Bits;
    x = x > C::kLimit ? C::kLimit : x < -C::kLimit ? -C::kLimit : x;  // fmin would drop NaN
    const T shifted = fused(x, C::kLog2e, C::kShift);
    const T n = shifted - C::kShift;
    const T r = fused(n, -C::kLn2Lo, fused(n, -C::kLn2Hi, x));
    fraction = fused(C::series(r) * r, r, r);
    scale = __builtin_bit_cast(T, (__builtin_bit_cast(Bits, shifted) << C::kMantissa) +
                                      __builtin_bit_cast(Bits, T(1)));  // 2^n
  }
};

template <typename T>
__device__ __forceinline__ T sigmoid(T x) {
  const Exp<T> e(-x);
  return quotient(T(1), fused(e.scale, e.fraction, e.scale + 1));
}

// By expm1, so that it keeps its relative accuracy at 0.
template <typename T>
__device__ __forceinline__ T tanh(T x) {
  const Exp<T> e(x + x);
  const T expm1 = fused(e.scale, e.fraction, e.scale - 1);
  return quotient(expm1, expm1 + 2);
}

}  // namespace iss
