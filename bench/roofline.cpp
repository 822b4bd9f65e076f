// SPDX-License-Identifier: Apache-2.0
// What this machine's cores can do at best: `roofline THREADS` prints a line "fma,,GFLOP/s", the
// same of "bfloat16" and "int8" where there are instructions for them, and one line
// "read,BYTES,GB/s" for each working set from 16 KB to 256 MB. Built and run by roofline.py.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));
constexpr int64_t kLanes = kBytes / sizeof(float);

// Independent sums: 12 cover two FMAs a cycle at up to 6 cycles each, and leave registers for the
// factors where there are 16.
constexpr int kSums = 12;
constexpr double kSeconds = 0.005;  // of one measurement; starting threads is below 1 % of it
constexpr int kTries = 8;           // the best of these counts

// The compiler cannot know what this leaves in a value: work on it is neither folded nor dropped.
template <class T>
void hide(T& value) {
  asm volatile("" : "+m"(value));
}

void finish(const Vector* sums, int count) {
  Vector total = {};
  for (int i = 0; i < count; ++i) total += sums[i];
  hide(total);
}

void multiply_add(int64_t passes) {
  Vector sums[kSums] = {};
  Vector scale = Vector{} + 0.5f, offset = Vector{} + 1.0f;
  hide(scale), hide(offset);
  for (int64_t pass = 0; pass < passes; ++pass) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * scale + offset;
  }
  finish(sums, kSums);
}

// The same for products of pairs in bfloat16 and of fours in int8, by the best unit that there is.
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
constexpr double kPairFlops = 4 * 2.0 * 16 * 16 * 32, kFourFlops = 4 * 2.0 * 16 * 16 * 64;
template <bool kIntegers>
void multiply_tiles(int64_t passes) {
  struct alignas(64) Shapes {
    uint8_t palette = 1, rest[15] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static constexpr Shapes kShapes;  // GCC's intrinsic does not say that it reads all of it
  _tile_loadconfig(&kShapes);
  for (int64_t pass = 0; pass < passes; ++pass) {
    if constexpr (kIntegers) {
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_release();
}
void multiply_pairs(int64_t passes) { multiply_tiles<false>(passes); }
void multiply_fours(int64_t passes) { multiply_tiles<true>(passes); }
#else
#if defined(__AVX512BF16__)
constexpr double kPairFlops = 2.0 * kSums * 32;
void multiply_pairs(int64_t passes) {
  __m512 sums[kSums] = {}, factor = _mm512_set1_ps(0);
  hide(factor);
  for (int64_t pass = 0; pass < passes; ++pass)
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i)
      sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)factor, (__m512bh)factor);
  for (__m512& sum : sums) hide(sum);
}
#endif
#if defined(__AVX512VNNI__)
constexpr double kFourFlops = 2.0 * kSums * 64;
void multiply_fours(int64_t passes) {
  __m512i sums[kSums] = {}, factor = _mm512_setzero_si512();
  hide(factor);
  for (int64_t pass = 0; pass < passes; ++pass)
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], factor, factor);
  for (__m512i& sum : sums) hide(sum);
}
#endif
#endif

// count: vectors, a multiple of kReads.
constexpr int kReads = 8;
void read(const Vector* data, int64_t count, int64_t passes) {
  Vector sums[kReads] = {};
  for (int64_t pass = 0; pass < passes; ++pass) {
    hide(data);  // or it would read the same memory once
    for (int64_t i = 0; i < count; i += kReads) {
#pragma GCC unroll 8
      for (int j = 0; j < kReads; ++j) sums[j] += data[i + j];
    }
  }
  finish(sums, kReads);
}

double seconds_of(int threads, const std::function<void(int)>& work) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (std::thread& other : others) other.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Best rate of `work(thread, passes)`: units per second where one pass of all threads is `units`.
double best_rate(int threads, double units, const std::function<void(int, int64_t)>& work) {
  const auto run = [&](int64_t passes) {
    return seconds_of(threads, [&](int thread) { work(thread, passes); });
  };
  int64_t passes = 1;
  while (run(passes) < kSeconds) passes *= 2;
  double best = 0;
  for (int i = 0; i < kTries; ++i) best = std::max(best, units * passes / run(passes));
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  const double flops = 2.0 * kSums * kLanes * threads;
  const double peak = best_rate(threads, flops, [](int, int64_t n) { multiply_add(n); });
  std::printf("fma,,%.2f\n", peak / 1e9);
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 1;  // asks for the tiles
#endif
#if defined(__AVX512BF16__)
  const double pairs =
      best_rate(threads, kPairFlops * threads, [](int, int64_t n) { multiply_pairs(n); });
  std::printf("bfloat16,,%.2f\n", pairs / 1e9);
#endif
#if defined(__AVX512VNNI__)
  const double fours =
      best_rate(threads, kFourFlops * threads, [](int, int64_t n) { multiply_fours(n); });
  std::printf("int8,,%.2f\n", fours / 1e9);
#endif

  constexpr int64_t kSmallest = 16 << 10, kLargest = 256 << 20;
  std::vector<std::vector<Vector>> data(threads);  // each thread its part, as weights are split
  for (auto& part : data) part.assign(kLargest / threads / kBytes, Vector{});
  for (int64_t bytes = kSmallest; bytes <= kLargest; bytes *= 2) {
    const int64_t count = bytes / threads / kBytes / kReads * kReads;
    const double total = double(count) * kBytes * threads;
    const double rate = best_rate(threads, total, [&](int thread, int64_t passes) {
      read(data[thread].data(), count, passes);
    });
    std::printf("read,%lld,%.2f\n", static_cast<long long>(bytes), rate / 1e9);
  }
}
