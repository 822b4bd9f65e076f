// SPDX-License-Identifier: Apache-2.0
// sigmoid and tanh over Vec<T>. Both come from exp(x) - 1 and exp(x) + 1 of one range reduction, so
// tanh keeps its relative accuracy near 0.

template <typename T>
struct ExpConstants;

// kLimit: larger arguments are clamped. kShift: x + 1.5 * 2^(mantissa bits) has round(x) in its low
// bits. kLn2Hi has so few bits that n * kLn2Hi is exact; kLn2Lo is the rest of ln 2. kSeries: the
// coefficients of (exp(r) - 1 - r) / r^2, lowest power first.
template <>
struct ExpConstants<float> {
  static constexpr float kLimit = 87.0f, kShift = 0x1.8p23f;
  static constexpr float kLn2Hi = 0x1.63p-1f, kLn2Lo = -0x1.bd0106p-13f;
  // Minimax over |r| <= ln(2) / 2: the error of exp(r) - 1 is at most 1.7e-8, a quarter of an ulp.
  static constexpr float kSeries[] = {0x1.fffffep-2f, 0x1.5554b0p-3f, 0x1.555674p-5f,
                                      0x1.122776p-7f, 0x1.6bec06p-10f};
};
template <>
struct ExpConstants<double> {
  static constexpr double kLimit = 708.0, kShift = 0x1.8p52;
  static constexpr double kLn2Hi = 0x1.62e42feep-1, kLn2Lo = 0x1.a39ef35793c76p-33;
  // Taylor: 1/2! ... 1/14!
  static constexpr double kSeries[] = {
      1. / 2,         1. / 6,          1. / 24,         1. / 120,     1. / 720,
      1. / 5040,      1. / 40320,      1. / 362880,     1. / 3628800, 1. / 39916800,
      1. / 479001600, 1. / 6227020800, 1. / 87178291200};
};

// a / b for b from 1 to 2^126. An ISA may have a faster one (vec_avx512-inl.h).
template <typename T>
inline Vec<T> quotient(Vec<T> a, Vec<T> b) {
  return a / b;
}

// exp(x) = scale * (1 + fraction) for |x| <= kLimit; a larger x gives the value at the limit, and
// NaN passes. N vectors are computed side by side, so that the CPU finds independent instructions.
template <typename T, int N>
struct Exp {
  Vec<T> scale[N], fraction[N];

  __attribute__((always_inline)) explicit Exp(const Vec<T>* of) {
    using C = ExpConstants<T>;
    constexpr int kTerms = sizeof(C::kSeries) / sizeof(T);
    Vec<T> x[N], shifted[N], n[N], r[N], p[N];
    const auto each = [](const auto& one) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) one(i);
    };
    each([&](int i) { x[i] = max(Vec<T>::set(-C::kLimit), min(Vec<T>::set(C::kLimit), of[i])); });
    each([&](int i) {
      shifted[i] = fma(x[i], Vec<T>::set(T(1.4426950408889634)), Vec<T>::set(C::kShift));
    });
    each([&](int i) { n[i] = shifted[i] - Vec<T>::set(C::kShift); });
    each([&](int i) { r[i] = fma(n[i], Vec<T>::set(-C::kLn2Hi), x[i]); });
    each([&](int i) { r[i] = fma(n[i], Vec<T>::set(-C::kLn2Lo), r[i]); });
    each([&](int i) { p[i] = Vec<T>::set(C::kSeries[kTerms - 1]); });
#pragma GCC unroll 16
    for (int k = kTerms - 2; k >= 0; --k)
      each([&](int i) { p[i] = fma(p[i], r[i], Vec<T>::set(C::kSeries[k])); });
    each([&](int i) { fraction[i] = fma(p[i] * r[i], r[i], r[i]); });
    each([&](int i) { scale[i] = exp2_of(shifted[i]); });
  }

  // exp(x) - 1 and exp(x) + 1 of vector i.
  Vec<T> minus_one(int i) const { return fma(scale[i], fraction[i], scale[i] - Vec<T>::set(1)); }
  Vec<T> plus_one(int i) const { return fma(scale[i], fraction[i], scale[i] + Vec<T>::set(1)); }
};

template <typename T>
__attribute__((always_inline)) inline Vec<T> tanh(Vec<T> x) {
  const Vec<T> twice = x + x;
  const Vec<T> expm1 = Exp<T, 1>(&twice).minus_one(0);
  return quotient(expm1, expm1 + Vec<T>::set(2));
}

template <typename T>
inline Vec<T> relu(Vec<T> x) {
  return max(Vec<T>::set(0), x);  // NaN passes
}

// The functions that a cell (cells/*-inl.h) needs beside arithmetic.
#define ISS_CELL __attribute__((always_inline)) inline

template <typename V>
ISS_CELL V constant(float value) {
  return V::set(value);
}

// Applies sigmoid, or tanh where kTanh is true, to each vector; all are computed side by side.
template <bool... kTanh, typename T>
ISS_CELL void activate(Vec<T>* gates) {
  constexpr int kGates = sizeof...(kTanh);
  constexpr bool is_tanh[] = {kTanh...};
  const Vec<T> zero = Vec<T>::set(0), one = Vec<T>::set(1);
  Vec<T> x[kGates];
#pragma GCC unroll 4
  for (int k = 0; k < kGates; ++k) x[k] = is_tanh[k] ? gates[k] + gates[k] : zero - gates[k];
  const Exp<T, kGates> e(x);
#pragma GCC unroll 4
  for (int k = 0; k < kGates; ++k) {
    if (is_tanh[k]) {
      const Vec<T> expm1 = e.minus_one(k);
      gates[k] = quotient(expm1, expm1 + Vec<T>::set(2));
    } else {
      gates[k] = quotient(one, e.plus_one(k));
    }
  }
}
