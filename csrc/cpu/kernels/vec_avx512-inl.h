// SPDX-License-Identifier: Apache-2.0
// Vec<float> of 16 lanes and Vec<double> of 8, for AVX-512 F, DQ and VNNI. The only AVX-512
// intrinsics.

// 16 floats in two registers of 256 bits. A Zen 4 widens float16 to this form faster, and a single
// row spends its time on widening.
struct Halves {
  __m256 low, high;

  static Halves set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Halves load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  void store(float* p) const {
    _mm256_storeu_ps(p, low);
    _mm256_storeu_ps(p + 8, high);
  }
};
inline Halves fma(Halves a, Halves b, Halves c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

template <typename T>
struct Vec;

template <>
struct Vec<float> {
  static constexpr int64_t kLanes = 16;
  static constexpr int kTileRows = 6;   // 6 rows x 4 accumulators + 6 broadcasts of 32 registers
  static constexpr int kTallRows = 10;  // 10 rows x 3 accumulators + a vector + a broadcast
  static constexpr bool kPairs = true;  // of a CPU with AVX512-BF16
  static constexpr int kRowPanels = 1;
  struct Rough;  // as StepArgs::rough
  __m512 v;

  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  // Family 19h is Zen 3 and Zen 4; only Zen 4 has AVX-512.
  static bool halves() { return __builtin_cpu_is("amdfam19h"); }
  template <bool kHalves>
  static auto load(const Float16* p) {
    const __m128i* const at = reinterpret_cast<const __m128i*>(p);
    if constexpr (kHalves)
      return Halves{_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
    else
      return Vec{_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static Vec load_even(const Bfloat16* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))};
  }
  template <int Rows>
  static Vec load_odd(const Bfloat16* p) {
    const __m512i bits = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(_mm512_and_epi32(bits, _mm512_set1_epi32(~0xffff)))};
  }
  static Vec load(const Pair* p) { return load(reinterpret_cast<const float*>(p)); }
  static Vec dot(Vec x, Vec w, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)(x.v), (__m512bh)(w.v))};
  }
  void round_to(void* p) const {
    _mm256_storeu_si256(static_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
  }
  static void store_pairs(Vec first, Vec second, Pair* to) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first.v));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second.v));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  static Vec widened(__m256i halves) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
  }
  static Vec load(const Bfloat16* p) {
    return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static Vec load(const Bfloat16* p, int64_t n) {
    return widened(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static void load_columns(const float* const* rows, int64_t at, Vec* to) {
    const auto fours = [&](int r) {  // of rows r, r + 4, r + 8 and r + 12
      const auto four = [&](int i) { return _mm_loadu_ps(rows[r + i] + at); };
      __m512 x = _mm512_castps128_ps512(four(0));
      x = _mm512_insertf32x4(x, four(4), 1);
      x = _mm512_insertf32x4(x, four(8), 2);
      return _mm512_insertf32x4(x, four(12), 3);
    };
    const __m512 a = fours(0), b = fours(1), c = fours(2), d = fours(3);
    const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));  // columns 0 and 1
    const __m512d cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
    const __m512d ab_next = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
    const __m512d cd_next = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
    to[0] = {_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd))};
    to[1] = {_mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd))};
    to[2] = {_mm512_castpd_ps(_mm512_unpacklo_pd(ab_next, cd_next))};
    to[3] = {_mm512_castpd_ps(_mm512_unpackhi_pd(ab_next, cd_next))};
  }
  __m256i rounded() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_mask_or_epi32(sum, is_nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16));
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  void store(Bfloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded()); }
  void store(Bfloat16* p, int64_t n) const { _mm256_mask_storeu_epi16(p, first(n), rounded()); }
  float sum() const { return _mm512_reduce_add_ps(v); }
  static Vec sums(const Vec* rows) {
    __m512 eights[8], fours[4];  // of rows i and i + 8; of rows i, i + 4, i + 8 and i + 12
    for (int i = 0; i < 8; ++i) {
      const __m512 a = rows[i].v, b = rows[i + 8].v;
      eights[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b),
                                _mm512_shuffle_f32x4(a, b, _MM_SHUFFLE(1, 0, 3, 2)));
    }
    for (int i = 0; i < 4; ++i) {
      const __m512 a = eights[i], b = eights[i + 4], swapped = _mm512_mask_blend_ps(0x0f0f, a, b);
      fours[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, a, b),
                               _mm512_shuffle_f32x4(swapped, swapped, _MM_SHUFFLE(2, 3, 0, 1)));
    }
    __m512 pairs[2];  // of fours 0 and 1; of 2 and 3
    for (int i = 0; i < 2; ++i) {
      const __m512 a = fours[2 * i], b = fours[2 * i + 1];
      pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    return {_mm512_add_ps(_mm512_shuffle_ps(pairs[0], pairs[1], _MM_SHUFFLE(1, 0, 1, 0)),
                          _mm512_shuffle_ps(pairs[0], pairs[1], _MM_SHUFFLE(3, 2, 3, 2)))};
  }
};

template <>
struct Vec<double> {
  static constexpr int64_t kLanes = 8;
  static constexpr bool kPairs = false;
  static constexpr int kTileRows = 6;
  static constexpr int kTallRows = 10;
  static constexpr int kRowPanels = 1;
  __m512d v;

  static __mmask8 first(int64_t n) { return static_cast<__mmask8>((1u << n) - 1); }
  static Vec set(double x) { return {_mm512_set1_pd(x)}; }
  static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static Vec load(const double* p, int64_t n) { return {_mm512_maskz_loadu_pd(first(n), p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void store(double* p, int64_t n) const { _mm512_mask_storeu_pd(p, first(n), v); }
  double sum() const { return _mm512_reduce_add_pd(v); }
  static Vec sums(const Vec* rows) {
    __m512d fours[4], twos[2];  // of rows i and i + 4; of rows i, i + 2, i + 4 and i + 6
    for (int i = 0; i < 4; ++i) {
      const __m512d a = rows[i].v, b = rows[i + 4].v;
      fours[i] = _mm512_add_pd(_mm512_mask_blend_pd(0xf0, a, b),
                               _mm512_shuffle_f64x2(a, b, _MM_SHUFFLE(1, 0, 3, 2)));
    }
    for (int i = 0; i < 2; ++i) {
      const __m512d a = fours[i], b = fours[i + 2], swapped = _mm512_mask_blend_pd(0x33, a, b);
      twos[i] = _mm512_add_pd(_mm512_mask_blend_pd(0xcc, a, b),
                              _mm512_shuffle_f64x2(swapped, swapped, _MM_SHUFFLE(2, 3, 0, 1)));
    }
    return {
        _mm512_add_pd(_mm512_unpacklo_pd(twos[0], twos[1]), _mm512_unpackhi_pd(twos[0], twos[1]))};
  }
};

inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec<float> operator-(Vec<float> a, Vec<float> b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
// Within 2 ulp of a / b. Intel's divider takes 16 cycles for 16 floats, this takes 4.
inline Vec<float> quotient(Vec<float> a, Vec<float> b) {
  const __m512 estimate = _mm512_rcp14_ps(b.v);
  const __m512 error = _mm512_fnmadd_ps(b.v, estimate, _mm512_set1_ps(1));
  return {_mm512_mul_ps(a.v, _mm512_fmadd_ps(estimate, error, estimate))};
}
inline Vec<float> min(Vec<float> a, Vec<float> b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec<float> zero_below(Vec<float> x, Vec<float> limit) {
  const __mmask16 keep = _mm512_cmp_ps_mask(_mm512_abs_ps(x.v), limit.v, _CMP_NLT_UQ);
  return {_mm512_maskz_mov_ps(keep, x.v)};
}
inline Vec<float> if_positive(Vec<float> x, Vec<float> value) {
  const __mmask16 keep = _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_NLE_UQ);
  return {_mm512_maskz_mov_ps(keep, value.v)};
}
inline Vec<float> exp2_of(Vec<float> shifted) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(127 << 23)))};
}

// Sigmoid and tanh with an error of up to 2^-13, relative for tanh near 0 too: half as many
// instructions as those of math-inl.h.
struct Vec<float>::Rough : Vec<float> {
  Rough() = default;
  Rough(Vec<float> x) : Vec<float>(x) {}

  // 2 to the power of this. Minimax on |f| <= 1/2, with an error of 3e-6.
  Vec<float> exp2() const {
    const Vec<float> f = {_mm512_reduce_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    Vec<float> p = fma(f, set(0x1.3a02cap-7f), set(0x1.c9fc46p-5f));
    p = fma(p, f, set(0x1.ec0378p-3f));
    p = fma(p, f, set(0x1.62e12cp-1f));
    p = fma(p, f, set(1));
    return {_mm512_scalef_ps(p.v, (*this - f).v)};
  }
  Rough sigmoid() const {
    const Vec<float> e = Rough(*this * set(-0x1.715476p0f)).exp2();
    return {{_mm512_rcp14_ps((set(1) + e).v)}};
  }
};
inline Vec<float>::Rough tanh(Vec<float>::Rough x) {
  using V = Vec<float>;
  // Larger ones would be inf / inf. NaN passes.
  const V::Rough e = V::Rough(min(V::set(126), x * V::set(0x1.715476p1f))).exp2();
  return (e - V::set(1)) * V{_mm512_rcp14_ps((e + V::set(1)).v)};
}
template <bool... kTanh>
__attribute__((always_inline)) inline void activate(Vec<float>::Rough* gates) {
  int k = 0;
  ((gates[k] = kTanh ? tanh(gates[k]) : gates[k].sigmoid(), ++k), ...);
}

inline Vec<double> operator+(Vec<double> a, Vec<double> b) { return {_mm512_add_pd(a.v, b.v)}; }
inline Vec<double> operator-(Vec<double> a, Vec<double> b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline Vec<double> operator*(Vec<double> a, Vec<double> b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline Vec<double> operator/(Vec<double> a, Vec<double> b) { return {_mm512_div_pd(a.v, b.v)}; }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm512_fmadd_pd(a.v, b.v, c.v)};
}
inline Vec<double> min(Vec<double> a, Vec<double> b) { return {_mm512_min_pd(a.v, b.v)}; }
inline Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm512_max_pd(a.v, b.v)}; }
inline Vec<double> zero_below(Vec<double> x, Vec<double> limit) {
  const __mmask8 keep = _mm512_cmp_pd_mask(_mm512_abs_pd(x.v), limit.v, _CMP_NLT_UQ);
  return {_mm512_maskz_mov_pd(keep, x.v)};
}
inline Vec<double> if_positive(Vec<double> x, Vec<double> value) {
  const __mmask8 keep = _mm512_cmp_pd_mask(x.v, _mm512_setzero_pd(), _CMP_NLE_UQ);
  return {_mm512_maskz_mov_pd(keep, value.v)};
}
inline Vec<double> exp2_of(Vec<double> shifted) {
  const __m512i n = _mm512_slli_epi64(_mm512_castpd_si512(shifted.v), 52);
  return {_mm512_castsi512_pd(_mm512_add_epi64(n, _mm512_set1_epi64(1023ll << 52)))};
}

// See vec_scalar-inl.h. VNNI multiplies unsigned by signed bytes, so kZero is 128.
struct Dot {
  static constexpr int kDepth = 4;
  static constexpr int32_t kZero = 128, kLevels = 127;
  using Activation = uint8_t;
  // Not __m512i, which may alias anything: GCC would then store an array of sums in every step.
  using Lanes = int32_t __attribute__((vector_size(64)));
  Lanes v;

  static Dot load(const int32_t* p) { return {reinterpret_cast<Lanes>(_mm512_loadu_si512(p))}; }
  Dot plus(const Activation* a, const int8_t* w) const {
    int32_t four;
    __builtin_memcpy(&four, a, sizeof(four));
    return {reinterpret_cast<Lanes>(_mm512_dpbusd_epi32(
        reinterpret_cast<__m512i>(v), _mm512_set1_epi32(four), _mm512_loadu_si512(w)))};
  }
  Dot operator+(Dot other) const { return {v + other.v}; }
  Vec<float> to_float() const { return {_mm512_cvtepi32_ps(reinterpret_cast<__m512i>(v))}; }
};
