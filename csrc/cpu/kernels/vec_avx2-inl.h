// SPDX-License-Identifier: Apache-2.0
// Vec<float> of 8 lanes and Vec<double> of 4, for AVX2 with FMA and F16C. The only AVX2 intrinsics.

template <typename T>
struct Vec;

// A mask of the first n lanes: a window that slides over ones followed by zeros.
alignas(64) constexpr int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
inline __m256i first_lanes(int64_t bytes4) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask + 8 - bytes4));
}

template <>
struct Vec<float> {
  static constexpr int64_t kLanes = 8;
  static constexpr bool kPairs = false;
  static constexpr int kTileRows = 3;  // 3 rows x 4 accumulators + 3 broadcasts of 16 registers
  static constexpr int kTallRows = 4;  // 4 rows x 3 accumulators + 3 vectors + a broadcast
  static constexpr int kRowPanels = 2;
  __m256 v;

  static Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static constexpr bool halves() { return false; }
  template <bool kHalves>
  static Vec load(const Float16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static Vec load_even(const Bfloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
  }
  template <int Rows>
  static Vec load_odd(const Bfloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (Rows == 1)
      return {_mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(~0xffff)))};
    else  // a tile of several rows leaves no register for the mask
      return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_srli_epi32(bits, 16), 16))};
  }
  static Vec load(const Bfloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  static Vec load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }
  static Vec load(const Bfloat16* p, int64_t n) {
    Bfloat16 lanes[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  static void load_columns(const float* const* rows, int64_t at, Vec* to) {
    const auto fours = [&](int r) {  // of rows r and r + 4
      return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[r] + at)),
                                  _mm_loadu_ps(rows[r + 4] + at), 1);
    };
    const __m256 a = fours(0), b = fours(1), c = fours(2), d = fours(3);
    const __m256d ab = _mm256_castps_pd(_mm256_unpacklo_ps(a, b));  // columns 0 and 1
    const __m256d cd = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
    const __m256d ab_next = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
    const __m256d cd_next = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
    to[0] = {_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd))};
    to[1] = {_mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd))};
    to[2] = {_mm256_castpd_ps(_mm256_unpacklo_pd(ab_next, cd_next))};
    to[3] = {_mm256_castpd_ps(_mm256_unpackhi_pd(ab_next, cd_next))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(float* p, int64_t n) const { _mm256_maskstore_ps(p, first_lanes(n), v); }
  void store(Bfloat16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i halves = _mm256_srli_epi32(_mm256_blendv_epi8(sum, quiet, is_nan), 16);
    const __m256i pairs = _mm256_packus_epi32(halves, halves);  // of 4: 0, 0, 1, 1
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0b1000)));
  }
  void store(Bfloat16* p, int64_t n) const {
    Bfloat16 lanes[kLanes];
    store(lanes);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
  }
  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static Vec sums(const Vec* rows) {
    __m256 fours[2];  // of four rows, in both halves
    for (int i = 0; i < 2; ++i) {
      const Vec* const r = rows + 4 * i;
      fours[i] = _mm256_hadd_ps(_mm256_hadd_ps(r[0].v, r[1].v), _mm256_hadd_ps(r[2].v, r[3].v));
    }
    return {_mm256_add_ps(_mm256_permute2f128_ps(fours[0], fours[1], 0x20),
                          _mm256_permute2f128_ps(fours[0], fours[1], 0x31))};
  }
};

template <>
struct Vec<double> {
  static constexpr int64_t kLanes = 4;
  static constexpr bool kPairs = false;
  static constexpr int kTileRows = 3;
  static constexpr int kTallRows = 4;
  static constexpr int kRowPanels = 2;
  __m256d v;

  static Vec set(double x) { return {_mm256_set1_pd(x)}; }
  static Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static Vec load(const double* p, int64_t n) {
    return {_mm256_maskload_pd(p, first_lanes(2 * n))};
  }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void store(double* p, int64_t n) const { _mm256_maskstore_pd(p, first_lanes(2 * n), v); }
  double sum() const {
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
  }
  static Vec sums(const Vec* rows) {
    const __m256d low = _mm256_hadd_pd(rows[0].v, rows[1].v);
    const __m256d high = _mm256_hadd_pd(rows[2].v, rows[3].v);
    return {_mm256_add_pd(_mm256_permute2f128_pd(low, high, 0x20),
                          _mm256_permute2f128_pd(low, high, 0x31))};
  }
};

inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec<float> operator-(Vec<float> a, Vec<float> b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
inline Vec<float> min(Vec<float> a, Vec<float> b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec<float> zero_below(Vec<float> x, Vec<float> limit) {
  const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v);
  return {_mm256_andnot_ps(_mm256_cmp_ps(size, limit.v, _CMP_LT_OQ), x.v)};
}
inline Vec<float> if_positive(Vec<float> x, Vec<float> value) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_NLE_UQ), value.v)};
}
inline Vec<float> exp2_of(Vec<float> shifted) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(n, _mm256_set1_epi32(127 << 23)))};
}

inline Vec<double> operator+(Vec<double> a, Vec<double> b) { return {_mm256_add_pd(a.v, b.v)}; }
inline Vec<double> operator-(Vec<double> a, Vec<double> b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline Vec<double> operator*(Vec<double> a, Vec<double> b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline Vec<double> operator/(Vec<double> a, Vec<double> b) { return {_mm256_div_pd(a.v, b.v)}; }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm256_fmadd_pd(a.v, b.v, c.v)};
}
inline Vec<double> min(Vec<double> a, Vec<double> b) { return {_mm256_min_pd(a.v, b.v)}; }
inline Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm256_max_pd(a.v, b.v)}; }
inline Vec<double> zero_below(Vec<double> x, Vec<double> limit) {
  const __m256d size = _mm256_andnot_pd(_mm256_set1_pd(-0.0), x.v);
  return {_mm256_andnot_pd(_mm256_cmp_pd(size, limit.v, _CMP_LT_OQ), x.v)};
}
inline Vec<double> if_positive(Vec<double> x, Vec<double> value) {
  return {_mm256_and_pd(_mm256_cmp_pd(x.v, _mm256_setzero_pd(), _CMP_NLE_UQ), value.v)};
}
inline Vec<double> exp2_of(Vec<double> shifted) {
  const __m256i n = _mm256_slli_epi64(_mm256_castpd_si256(shifted.v), 52);
  return {_mm256_castsi256_pd(_mm256_add_epi64(n, _mm256_set1_epi64x(1023ll << 52)))};
}

// See vec_scalar-inl.h. Without VNNI, maddubs adds two neighbouring products in 16 bits:
// activations of 7 bits (1 to 127 with kZero added) times weights of 8 bits do not overflow, 2 *
// 127 * 127 < 2^15.
struct Dot {
#ifdef ISS_AVX_VNNI
  static constexpr int32_t kZero = 128, kLevels = 127;
#else
  static constexpr int32_t kZero = 64, kLevels = 63;
#endif
  static constexpr int kDepth = 4;
  using Activation = uint8_t;
  __m256i v;

  static Dot load(const int32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  Dot plus(const Activation* a, const int8_t* w) const {
    int32_t four;
    __builtin_memcpy(&four, a, sizeof(four));
    const __m256i activations = _mm256_set1_epi32(four);
    const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
#ifdef ISS_AVX_VNNI
    return {_mm256_dpbusd_avx_epi32(v, activations, weights)};
#else
    const __m256i pairs = _mm256_maddubs_epi16(activations, weights);
    return {_mm256_add_epi32(v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
#endif
  }
  Vec<float> to_float() const { return {_mm256_cvtepi32_ps(v)}; }
};
