// SPDX-License-Identifier: Apache-2.0
// Vec<float> of 4 lanes and Vec<double> of 2, for NEON on aarch64. The only NEON intrinsics.
// ISS_NEON_BF16: with the instructions for dot products and for matrices of bfloat16 and int8.

template <typename T>
struct Vec;

#ifdef ISS_NEON_BF16
inline float32x4_t multiply_add(float32x4_t sums, uint64x2_t rows, uint32x4_t columns) {
  return vbfmmlaq_f32(sums, vreinterpretq_bf16_u64(rows), vreinterpretq_bf16_u32(columns));
}
inline int32x4_t multiply_add(int32x4_t sums, uint64x2_t rows, uint32x4_t columns) {
  return vmmlaq_s32(sums, vreinterpretq_s8_u64(rows), vreinterpretq_s8_u32(columns));
}

// The sums of two rows and a vector of columns in 2 x 2 blocks, as BFMMLA and SMMLA take them: each
// adds the products of 8 bytes of K, in the order of two dot products, so with the same bits.
template <typename V>
struct MatrixSums {
  V left, right;  // of columns 0, 1 and 2, 3: first two sums of the first row

  static MatrixSums of(V first, V second) {
    const auto a = std::bit_cast<uint64x2_t>(first), b = std::bit_cast<uint64x2_t>(second);
    return {std::bit_cast<V>(vzip1q_u64(a, b)), std::bit_cast<V>(vzip2q_u64(a, b))};
  }
  // The inverse of `of`.
  MatrixSums rows() const { return of(left, right); }
  // 8 bytes of each row.
  static uint64x2_t load(const void* first, const void* second) {
    uint64_t bytes[2];
    __builtin_memcpy(&bytes[0], first, 8);
    __builtin_memcpy(&bytes[1], second, 8);
    return vcombine_u64(vcreate_u64(bytes[0]), vcreate_u64(bytes[1]));
  }
  // columns, next: 4 bytes of each column, and those after.
  MatrixSums plus(uint64x2_t x, const void* columns, const void* next) const {
    const uint32x4_t a = vld1q_u32(static_cast<const uint32_t*>(columns));
    const uint32x4_t b = vld1q_u32(static_cast<const uint32_t*>(next));
    return {multiply_add(left, x, vzip1q_u32(a, b)), multiply_add(right, x, vzip2q_u32(a, b))};
  }
};
#endif

template <>
struct Vec<float> {
  static constexpr int64_t kLanes = 4;
  static constexpr int kTileRows = 6;  // 6 rows x 4 accumulators + 6 broadcasts of 32 registers
  static constexpr int kTallRows = 6;
  static constexpr int kRowPanels = 2;
  float32x4_t v;

  static Vec set(float x) { return {vdupq_n_f32(x)}; }
  static Vec load(const float* p) { return {vld1q_f32(p)}; }
  static constexpr bool halves() { return false; }
  template <bool kHalves>
  static Vec load(const Float16* p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)))};
  }
  static Vec load_even(const Bfloat16* p) {
    return {vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u16(vld1q_u16(&p->bits)), 16))};
  }
  template <int Rows>
  static Vec load_odd(const Bfloat16* p) {
    const uint32x4_t bits = vreinterpretq_u32_u16(vld1q_u16(&p->bits));
    return {vreinterpretq_f32_u32(vandq_u32(bits, vdupq_n_u32(~0xffffu)))};
  }
  static Vec load(const Bfloat16* p) {
    return {vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(&p->bits)), 16))};
  }
  template <typename W>
  static Vec load(const W* p, int64_t n) {
    W lanes[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  static void load_columns(const float* const* rows, int64_t at, Vec* to) {
    const float32x4x2_t ab = vtrnq_f32(vld1q_f32(rows[0] + at), vld1q_f32(rows[1] + at));
    const float32x4x2_t cd = vtrnq_f32(vld1q_f32(rows[2] + at), vld1q_f32(rows[3] + at));
    to[0] = {vcombine_f32(vget_low_f32(ab.val[0]), vget_low_f32(cd.val[0]))};
    to[1] = {vcombine_f32(vget_low_f32(ab.val[1]), vget_low_f32(cd.val[1]))};
    to[2] = {vcombine_f32(vget_high_f32(ab.val[0]), vget_high_f32(cd.val[0]))};
    to[3] = {vcombine_f32(vget_high_f32(ab.val[1]), vget_high_f32(cd.val[1]))};
  }
#ifdef ISS_NEON_BF16
  static constexpr bool kPairs = true;
  using TwoRows = MatrixSums<float32x4_t>;
  static Vec load(const Pair* p) { return load(reinterpret_cast<const float*>(p)); }
  static Vec dot(Vec x, Vec w, Vec sum) {
    return {vbfdotq_f32(sum.v, vreinterpretq_bf16_f32(x.v), vreinterpretq_bf16_f32(w.v))};
  }
  uint16x4_t rounded() const { return vreinterpret_u16_bf16(vcvt_bf16_f32(v)); }
  void round_to(void* p) const {
    const uint16x4_t halves = rounded();
    __builtin_memcpy(p, &halves, sizeof(halves));
  }
  static void store_pairs(Vec first, Vec second, Pair* to) {
    const uint16x4x2_t pairs = vzip_u16(first.rounded(), second.rounded());
    __builtin_memcpy(to, &pairs, sizeof(pairs));
  }
#else
  static constexpr bool kPairs = false;
#endif
  void store(float* p) const { vst1q_f32(p, v); }
  void store(Bfloat16* p) const {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t sum = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    vst1_u16(&p->bits, vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), sum, quiet), 16));
  }
  template <typename W>
  void store(W* p, int64_t n) const {
    W lanes[kLanes];
    store(lanes);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
  }
  float sum() const { return vaddvq_f32(v); }
  static Vec sums(const Vec* rows) {
    return {vpaddq_f32(vpaddq_f32(rows[0].v, rows[1].v), vpaddq_f32(rows[2].v, rows[3].v))};
  }
};

template <>
struct Vec<double> {
  static constexpr int64_t kLanes = 2;
  static constexpr bool kPairs = false;
  static constexpr int kTileRows = 6;
  static constexpr int kTallRows = 6;
  static constexpr int kRowPanels = 2;
  float64x2_t v;

  static Vec set(double x) { return {vdupq_n_f64(x)}; }
  static Vec load(const double* p) { return {vld1q_f64(p)}; }
  static Vec load(const double* p, int64_t n) {
    double lanes[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  void store(double* p) const { vst1q_f64(p, v); }
  void store(double* p, int64_t n) const {
    double lanes[kLanes];
    store(lanes);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
  }
  double sum() const { return vaddvq_f64(v); }
  static Vec sums(const Vec* rows) { return {vpaddq_f64(rows[0].v, rows[1].v)}; }
};

inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec<float> operator-(Vec<float> a, Vec<float> b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {vfmaq_f32(c.v, a.v, b.v)};
}
// vminq and vmaxq return NaN where either is NaN; the interface wants b there.
inline Vec<float> min(Vec<float> a, Vec<float> b) {
  return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)};
}
inline Vec<float> max(Vec<float> a, Vec<float> b) {
  return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)};
}
inline Vec<float> zero_below(Vec<float> x, Vec<float> limit) {
  const uint32x4_t below = vcltq_f32(vabsq_f32(x.v), limit.v);
  return {vbslq_f32(below, vdupq_n_f32(0), x.v)};
}
inline Vec<float> if_positive(Vec<float> x, Vec<float> value) {
  const uint32x4_t bits = vreinterpretq_u32_f32(value.v);
  return {vreinterpretq_f32_u32(vbicq_u32(bits, vcleq_f32(x.v, vdupq_n_f32(0))))};
}
inline Vec<float> exp2_of(Vec<float> shifted) {
  const int32x4_t n = vshlq_n_s32(vreinterpretq_s32_f32(shifted.v), 23);
  return {vreinterpretq_f32_s32(vaddq_s32(n, vdupq_n_s32(127 << 23)))};
}

inline Vec<double> operator+(Vec<double> a, Vec<double> b) { return {vaddq_f64(a.v, b.v)}; }
inline Vec<double> operator-(Vec<double> a, Vec<double> b) { return {vsubq_f64(a.v, b.v)}; }
inline Vec<double> operator*(Vec<double> a, Vec<double> b) { return {vmulq_f64(a.v, b.v)}; }
inline Vec<double> operator/(Vec<double> a, Vec<double> b) { return {vdivq_f64(a.v, b.v)}; }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {vfmaq_f64(c.v, a.v, b.v)};
}
inline Vec<double> min(Vec<double> a, Vec<double> b) {
  return {vbslq_f64(vcltq_f64(a.v, b.v), a.v, b.v)};
}
inline Vec<double> max(Vec<double> a, Vec<double> b) {
  return {vbslq_f64(vcgtq_f64(a.v, b.v), a.v, b.v)};
}
inline Vec<double> zero_below(Vec<double> x, Vec<double> limit) {
  const uint64x2_t below = vcltq_f64(vabsq_f64(x.v), limit.v);
  return {vbslq_f64(below, vdupq_n_f64(0), x.v)};
}
inline Vec<double> if_positive(Vec<double> x, Vec<double> value) {
  const uint64x2_t bits = vreinterpretq_u64_f64(value.v);
  return {vreinterpretq_f64_u64(vbicq_u64(bits, vcleq_f64(x.v, vdupq_n_f64(0))))};
}
inline Vec<double> exp2_of(Vec<double> shifted) {
  const int64x2_t n = vshlq_n_s64(vreinterpretq_s64_f64(shifted.v), 52);
  return {vreinterpretq_f64_s64(vaddq_s64(n, vdupq_n_s64(1023ll << 52)))};
}

// See vec_scalar-inl.h.
#ifdef ISS_NEON_BF16
struct Dot {
  static constexpr int kDepth = 4;
  static constexpr int32_t kZero = 0, kLevels = 127;
  using Activation = int8_t;
  using TwoRows = MatrixSums<int32x4_t>;
  int32x4_t v;

  static Dot load(const int32_t* p) { return {vld1q_s32(p)}; }
  Dot plus(const Activation* a, const int8_t* w) const {
    int32_t four;
    __builtin_memcpy(&four, a, sizeof(four));
    return {vdotq_s32(v, vreinterpretq_s8_s32(vdupq_n_s32(four)), vld1q_s8(w))};
  }
  Vec<float> to_float() const { return {vcvtq_f32_s32(v)}; }
};
#else
struct Dot {
  static constexpr int kDepth = 2;
  static constexpr int32_t kZero = 0, kLevels = 127;
  using Activation = int16_t;
  int32x4_t v;

  static Dot load(const int32_t* p) { return {vld1q_s32(p)}; }
  Dot plus(const Activation* a, const int8_t* w) const {
    int32_t pair;
    __builtin_memcpy(&pair, a, sizeof(pair));
    const int16x8_t x = vreinterpretq_s16_s32(vdupq_n_s32(pair));
    const int16x8_t weights = vmovl_s8(vld1_s8(w));
    return {vaddq_s32(v, vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(weights)),
                                    vmull_high_s16(x, weights)))};
  }
  Vec<float> to_float() const { return {vcvtq_f32_s32(v)}; }
};
#endif
