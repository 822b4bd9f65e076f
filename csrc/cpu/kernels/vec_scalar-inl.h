// SPDX-License-Identifier: Apache-2.0
// Vec<T> with one lane: the fallback that runs everywhere. Its comments define the interface that
// every vec_*-inl.h implements.

// The factor 2^112 moves the exponent from a bias of 15 to a bias of 127, also for subnormals.
inline float to_float(Float16 half) {
  const uint32_t rest = (half.bits & 0x7fffu) << 13, sign = (half.bits & 0x8000u) << 16;
  if (rest >= 0x7c00u << 13) return std::bit_cast<float>(rest | 0x7f800000u | sign);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(std::bit_cast<float>(rest) * 0x1p112f) |
                              sign);
}

// Rounds to nearest, ties to even. A NaN is made quiet instead: the carry of rounding could turn it
// into infinity.
inline Bfloat16 to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
  return {static_cast<uint16_t>(rounded >> 16)};
}

template <typename T>
struct Vec {
  static constexpr int64_t kLanes = 1;
  static constexpr int kTileRows = 2;  // 2 rows x 4 accumulators of 16 registers
  static constexpr int kTallRows = 2;
  static constexpr int kRowPanels = 2;  // panels that a tile of one row covers
  T v;

  static Vec set(T x) { return {x}; }
  static Vec load(const T* p) { return {*p}; }
  // Whether this CPU is faster with another type than Vec for the sums of a single row of float16.
  // load<true> then returns that type; the bits of the results are the same.
  static constexpr bool halves() { return false; }
  template <bool kHalves>
  static Vec load(const Float16* p) {
    return {to_float(*p)};
  }
  // Every other one of 2 * kLanes elements, which are cheaper to widen than neighbours: load_even
  // takes p[0], p[2], ..., load_odd the rest.
  static Vec load_even(const Bfloat16* p) {
    return {std::bit_cast<float>(static_cast<uint32_t>(p[0].bits) << 16)};
  }
  template <int Rows>  // rows of the tile
  static Vec load_odd(const Bfloat16* p) {
    return load_even(p + 1);
  }
  static Vec load(const Bfloat16* p) { return load_even(p); }
  // A Pair in the place of each element, and sum + x.first * w.first + x.second * w.second of them.
  static constexpr bool kPairs = std::is_same_v<T, float>;
  static Vec load(const Pair* p) {
    Vec pair;
    __builtin_memcpy(&pair, p, sizeof(pair));
    return pair;
  }
  static Vec dot(Vec x, Vec w, Vec sum) {
    const auto half = [](Vec pair, int shift) {
      return std::bit_cast<float>(std::bit_cast<uint32_t>(pair.v) << shift & 0xffff0000u);
    };
    return {sum.v + half(x, 16) * half(w, 16) + half(x, 0) * half(w, 0)};
  }
  // kLanes elements, rounded to Bfloat16; the Pairs of two vectors. To nearest, but a subnormal may
  // count as zero.
  void round_to(void* p) const {
    const Bfloat16 rounded = to_bfloat16(v);
    __builtin_memcpy(p, &rounded, sizeof(rounded));
  }
  static void store_pairs(Vec first, Vec second, Pair* to) {
    to->bits = to_bfloat16(first.v).bits | uint32_t{to_bfloat16(second.v).bits} << 16;
  }
  static Vec load(const T* p, int64_t) { return {*p}; }  // the first n < kLanes lanes; others are 0
  static Vec load(const Bfloat16* p, int64_t) { return load(p); }
  // Transposes kLanes rows of 4 columns: lane r of to[k] = rows[r][at + k], k < 4.
  static void load_columns(const T* const* rows, int64_t at, Vec* to) {
    for (int k = 0; k < 4; ++k) to[k] = {rows[0][at + k]};
  }
  void store(T* p) const { *p = v; }
  void store(T* p, int64_t) const { *p = v; }
  void store(Bfloat16* p) const { *p = to_bfloat16(v); }
  void store(Bfloat16* p, int64_t) const { store(p); }
  T sum() const { return v; }
  // Lane l: the sum of the lanes of rows[l].
  static Vec sums(const Vec* rows) { return rows[0]; }
};

template <typename T>
Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return {a.v + b.v};
}
template <typename T>
Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return {a.v - b.v};
}
template <typename T>
Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return {a.v * b.v};
}
template <typename T>
Vec<T> operator/(Vec<T> a, Vec<T> b) {
  return {a.v / b.v};
}
// a * b + c. Two roundings here: without FMA hardware, std::fma is a slow call.
template <typename T>
Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return {a.v * b.v + c.v};
}
// min and max return b where either is NaN, as SSE does; so a NaN passes as the second argument.
template <typename T>
Vec<T> min(Vec<T> a, Vec<T> b) {
  return {a.v < b.v ? a.v : b.v};
}
template <typename T>
Vec<T> max(Vec<T> a, Vec<T> b) {
  return {a.v > b.v ? a.v : b.v};
}
// x where |x| >= limit or x is NaN, else 0.
template <typename T>
Vec<T> zero_below(Vec<T> x, Vec<T> limit) {
  return {x.v < limit.v && -x.v < limit.v ? T(0) : x.v};
}
// value where x > 0 or x is NaN, else 0.
template <typename T>
Vec<T> if_positive(Vec<T> x, Vec<T> value) {
  return {x.v <= 0 ? T(0) : value.v};
}
// 2^n for the integer n in the low bits of `shifted` (math-inl.h, kShift).
inline Vec<float> exp2_of(Vec<float> shifted) {
  return {std::bit_cast<float>((std::bit_cast<uint32_t>(shifted.v) << 23) + (127u << 23))};
}
inline Vec<double> exp2_of(Vec<double> shifted) {
  return {std::bit_cast<double>((std::bit_cast<uint64_t>(shifted.v) << 52) + (1023ull << 52))};
}

// Sums of products of 8-bit integers, kDepth at a time: sum[lane] += a[0] * w[lane][0] + .... An
// activation is quantised to -kLevels ... kLevels, and kZero is added to what is stored.
struct Dot {
  static constexpr int kDepth = 1;
  static constexpr int32_t kZero = 0, kLevels = 127;
  using Activation = int16_t;
  int32_t v;

  static Dot load(const int32_t* p) { return {*p}; }
  Dot plus(const Activation* a, const int8_t* w) const { return {v + *a * *w}; }
  Vec<float> to_float() const { return {static_cast<float>(v)}; }
};
