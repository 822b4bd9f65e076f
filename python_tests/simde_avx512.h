// SPDX-License-Identifier: Apache-2.0
// Included before csrc/cpu/kernels/isa_avx512.cpp (-include), so that its intrinsics are SIMDe's
// and run on a CPU with AVX2 alone.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cmath>

#undef __builtin_cpu_supports
#define __builtin_cpu_supports(isa) 1

// What SIMDe 0.7.4 (Debian 12) does not have.
namespace simde_missing {

template <typename Vector, typename Element>
Vector load(unsigned mask, const Element* from) {
  Element lanes[sizeof(Vector) / sizeof(Element)] = {};
  for (unsigned i = 0; mask >> i; ++i)
    if (mask >> i & 1) lanes[i] = from[i];
  Vector result;
  __builtin_memcpy(&result, lanes, sizeof(lanes));
  return result;
}

template <typename Vector, typename Element>
void store(Element* to, unsigned mask, Vector vector) {
  Element lanes[sizeof(Vector) / sizeof(Element)];
  __builtin_memcpy(lanes, &vector, sizeof(lanes));
  for (unsigned i = 0; mask >> i; ++i)
    if (mask >> i & 1) to[i] = lanes[i];
}

template <typename Element, typename Vector>
Element sum(Vector vector) {
  Element lanes[sizeof(Vector) / sizeof(Element)], total = 0;
  store(lanes, (1u << sizeof(Vector) / sizeof(Element)) - 1, vector);
  for (const Element lane : lanes) total += lane;
  return total;
}

template <typename Convert, typename Half>
__m512 both(Convert convert, Half low, Half high) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(convert(low)), convert(high), 1);
}

// Each lane as an integer of another width.
template <typename To, typename ToLane, typename FromLane, typename From>
To converted(From vector) {
  constexpr unsigned kLanes = sizeof(From) / sizeof(FromLane);
  FromLane from[kLanes];
  __builtin_memcpy(from, &vector, sizeof(from));
  ToLane to[kLanes];
  for (unsigned i = 0; i < kLanes; ++i) to[i] = static_cast<ToLane>(from[i]);
  To result;
  __builtin_memcpy(&result, to, sizeof(to));
  return result;
}

// Four quarters: two of a, then two of b, chosen by two bits of `which` each.
template <typename Vector>
Vector quarters(Vector a, Vector b, int which) {
  char from[2][64], to[64];
  __builtin_memcpy(from[0], &a, 64);
  __builtin_memcpy(from[1], &b, 64);
  for (int q = 0; q < 4; ++q)
    __builtin_memcpy(to + 16 * q, from[q / 2] + 16 * (which >> 2 * q & 3), 16);
  Vector result;
  __builtin_memcpy(&result, to, 64);
  return result;
}

// f of each lane of a, and of b.
template <typename Function>
__m512 each(Function f, __m512 a, __m512 b) {
  float from[2][16], to[16];
  __builtin_memcpy(from[0], &a, sizeof(a));
  __builtin_memcpy(from[1], &b, sizeof(b));
  for (int i = 0; i < 16; ++i) to[i] = f(from[0][i], from[1][i]);
  __m512 result;
  __builtin_memcpy(&result, to, sizeof(to));
  return result;
}

// With the error that the instruction may have: a mantissa of 14 bits.
inline float reciprocal(float x, float) {
  const float exact = 1 / x;
  uint32_t bits;
  __builtin_memcpy(&bits, &exact, sizeof(bits));
  if (std::isfinite(exact)) bits &= ~uint32_t{0x1ff};
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}
inline float beyond_nearest(float x, float) { return std::isinf(x) ? 0 : x - std::nearbyint(x); }
inline float scaled(float x, float power) { return x * std::exp2(double{std::floor(power)}); }

// To bfloat16; not of NaN.
inline __m256i rounded(__m512 vector) {
  uint32_t bits[16];
  uint16_t halves[16];
  __builtin_memcpy(bits, &vector, sizeof(bits));
  for (int i = 0; i < 16; ++i) halves[i] = (bits[i] + 0x7fff + (bits[i] >> 16 & 1)) >> 16;
  __m256i result;
  __builtin_memcpy(&result, halves, sizeof(halves));
  return result;
}

}  // namespace simde_missing

#define _mm512_maskz_loadu_ps simde_missing::load<__m512>
#define _mm512_maskz_loadu_pd simde_missing::load<__m512d>
#define _mm512_mask_storeu_ps simde_missing::store
#define _mm512_mask_storeu_pd simde_missing::store
#define _mm256_maskz_loadu_epi16 simde_missing::load<__m256i>
#define _mm256_mask_storeu_epi16 simde_missing::store
#define _mm512_cvtepu16_epi32 simde_missing::converted<__m512i, uint32_t, uint16_t>
#define _mm512_cvtepi32_epi16 simde_missing::converted<__m256i, uint16_t, uint32_t>
#define _mm512_cvtneps_pbh simde_missing::rounded
#define _mm512_reduce_add_ps simde_missing::sum<float>
#define _mm512_reduce_add_pd simde_missing::sum<double>
#define _mm512_rcp14_ps(a) simde_missing::each(simde_missing::reciprocal, a, a)
#define _mm512_reduce_ps(a, mode) simde_missing::each(simde_missing::beyond_nearest, a, a)
#define _mm512_scalef_ps(a, b) simde_missing::each(simde_missing::scaled, a, b)
#define _mm512_shuffle_f32x4 simde_missing::quarters
#define _mm512_shuffle_f64x2 simde_missing::quarters
#define _mm512_cvtph_ps(halves)                                           \
  simde_missing::both([](__m128i half) { return _mm256_cvtph_ps(half); }, \
                      _mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1))
#define _mm512_cvtepi32_ps(ints)                                             \
  simde_missing::both([](__m256i half) { return _mm256_cvtepi32_ps(half); }, \
                      _mm512_castsi512_si256(ints), _mm512_extracti64x4_epi64(ints, 1))

// No target region: the file is compiled for AVX2 as a whole.
#include "cpu/kernels/target.h"
#undef ISS_TARGET_BEGIN
#undef ISS_TARGET_END
#define ISS_TARGET_BEGIN(isa)
#define ISS_TARGET_END
