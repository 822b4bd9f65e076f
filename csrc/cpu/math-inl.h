// SPDX-License-Identifier: Apache-2.0
// sigmoid and tanh over Vec<T>, from one reduction of exp, so that tanh keeps its relative accuracy
// at 0. Largest error against mpmath over all floats tried (python_tests/test_lstm_ops.py): see
// there.

template <typename T>
struct ExpConstants;

// kShift: adding 1.5 * 2^(mantissa bits) leaves round(x) in the low bits. kLn2Hi has few enough
// bits that n * kLn2Hi is exact; kLn2Lo is the rest of ln 2. kSeries: (exp(r) - 1 - r) / r^2,
// lowest power first.
template <>
struct ExpConstants<float> {
  static constexpr float kLimit = 87.0f, kShift = 0x1.8p23f;
  static constexpr float kLn2Hi = 0x1.63p-1f, kLn2Lo = -0x1.bd0106p-13f;
  // Minimax over |r| <= ln(2)/2: off by at most 1.7e-8 of exp(r) - 1, a quarter of an ulp.
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

// exp(x) = scale * (1 + fraction) for |x| <= kLimit; beyond, the value at the limit. NaN passes.
template <typename T>
struct Exp {
  Vec<T> scale, fraction;

  explicit Exp(Vec<T> x) {
    using C = ExpConstants<T>;
    constexpr int kTerms = sizeof(C::kSeries) / sizeof(T);
    x = max(Vec<T>::set(-C::kLimit), min(Vec<T>::set(C::kLimit), x));
    const Vec<T> shifted = fma(x, Vec<T>::set(T(1.4426950408889634)), Vec<T>::set(C::kShift));
    const Vec<T> n = shifted - Vec<T>::set(C::kShift);
    Vec<T> r = fma(n, Vec<T>::set(-C::kLn2Hi), x);
    r = fma(n, Vec<T>::set(-C::kLn2Lo), r);
    Vec<T> p = Vec<T>::set(C::kSeries[kTerms - 1]);
#pragma GCC unroll 16
    for (int k = kTerms - 2; k >= 0; --k) p = fma(p, r, Vec<T>::set(C::kSeries[k]));
    fraction = fma(p * r, r, r);
    scale = exp2_of(shifted);
  }
};

template <typename T>
inline Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> one = Vec<T>::set(1);
  const Exp<T> e(Vec<T>::set(0) - x);
  return one / fma(e.scale, e.fraction, e.scale + one);
}

template <typename T>
inline Vec<T> tanh(Vec<T> x) {
  const Exp<T> e(x + x);
  const Vec<T> expm1 = fma(e.scale, e.fraction, e.scale - Vec<T>::set(1));
  return expm1 / (expm1 + Vec<T>::set(2));
}
