// SPDX-License-Identifier: Apache-2.0
// What this machine's cores can do at best: `roofline THREADS` prints a line "fma,,GFLOP/s" and one
// line "read,BYTES,GB/s" for each working set from 16 KB to 256 MB. Built and run by roofline.py.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

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
