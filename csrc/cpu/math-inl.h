// SPDX-License-Identifier: Apache-2.0
// sigmoid and tanh over Vec<T>, both from one expm1, so that tanh keeps its relative accuracy at 0.
// Largest error against mpmath over all floats tried (python_tests/test_lstm_ops.py): see there.

template <typename T>
struct ExpConstants;

// kShift: adding 1.5 * 2^(mantissa bits) leaves round(x) in the low bits. ln 2 = kLn2Hi + kLn2Lo
// with few enough bits in kLn2Hi that n * kLn2Hi is exact. kTerms: r^2/2! ... r^kTerms/kTerms! of
// the exponential series; with |r| <= ln(2)/2 the first term left out is below half an ulp of r.
template <>
struct ExpConstants<float> {
  static constexpr float kLimit = 87.0f, kShift = 0x1.8p23f;
  static constexpr float kLn2Hi = 0x1.63p-1f, kLn2Lo = -0x1.bd0106p-13f;
  static constexpr int kTerms = 8;
};
template <>
struct ExpConstants<double> {
  static constexpr double kLimit = 708.0, kShift = 0x1.8p52;
  static constexpr double kLn2Hi = 0x1.62e42feep-1, kLn2Lo = 0x1.a39ef35793c76p-33;
  static constexpr int kTerms = 14;
};

template <typename T>
struct InverseFactorials {
  T values[16];
  constexpr InverseFactorials() : values{} {
    double factorial = 1;
    for (int k = 0; k < 16; ++k) {
      if (k > 0) factorial *= k;
      values[k] = static_cast<T>(1 / factorial);
    }
  }
};

// exp(x) - 1 for |x| <= kLimit; beyond, the value at the limit. NaN passes.
template <typename T>
inline Vec<T> expm1(Vec<T> x) {
  using C = ExpConstants<T>;
  static constexpr InverseFactorials<T> kInverse;
  x = max(Vec<T>::set(-C::kLimit), min(Vec<T>::set(C::kLimit), x));
  const Vec<T> shifted = fma(x, Vec<T>::set(T(1.4426950408889634)), Vec<T>::set(C::kShift));
  const Vec<T> n = shifted - Vec<T>::set(C::kShift);
  Vec<T> r = fma(n, Vec<T>::set(-C::kLn2Hi), x);
  r = fma(n, Vec<T>::set(-C::kLn2Lo), r);
  Vec<T> p = Vec<T>::set(kInverse.values[C::kTerms]);
#pragma GCC unroll 16
  for (int k = C::kTerms - 1; k >= 2; --k) p = fma(p, r, Vec<T>::set(kInverse.values[k]));
  p = fma(p * r, r, r);  // exp(r) - 1
  const Vec<T> scale = exp2_of(shifted);
  return fma(scale, p, scale - Vec<T>::set(1));  // 2^n exp(r) - 1
}

template <typename T>
inline Vec<T> sigmoid(Vec<T> x) {
  return Vec<T>::set(1) / (Vec<T>::set(2) + expm1(Vec<T>::set(0) - x));
}

template <typename T>
inline Vec<T> tanh(Vec<T> x) {
  const Vec<T> e = expm1(x + x);
  return e / (e + Vec<T>::set(2));
}
