// SPDX-License-Identifier: Apache-2.0
// Runs some of the samples without torch, checked, in every order: "passed", or what went wrong.
// For processors that there is an emulator for, but no torch.

#include <cstdio>
#include <cstdlib>

#include "simt/checker.h"

using Sample = int(bool wrong, const float* in, float* out, uint32_t* flag, int64_t size);
extern "C" {
Sample exchange_unready, neighbour_through_grid, relaxed_release, shuffle_as_barrier,
    copy_in_flight, beyond_tensor, uninitialised_shared, endless_spin, skipped_barrier;
void simt_configure(int policy, uint64_t seed, int check, unsigned preempt, unsigned window);
}

namespace {

constexpr size_t kSize = 256;

template <typename T>
T* tensor(size_t count) {
  constexpr size_t kGuard = 256;
  auto* begin = static_cast<char*>(std::aligned_alloc(64, count * sizeof(T) + 2 * kGuard)) + kGuard;
  iss::simt::poison(begin, count * sizeof(T));
  iss::simt::checker::add_memory(begin, count * sizeof(T));
  return reinterpret_cast<T*>(begin);
}

bool run(Sample* sample, bool wrong, bool exchanges) {
  auto* in = tensor<float>(kSize);
  auto* out = tensor<float>(kSize);
  auto* flag = tensor<uint32_t>(1);
  for (size_t i = 0; i < kSize; ++i) in[i] = static_cast<float>(i);
  *flag = 0;
  const bool failed = sample(wrong, in, out, flag, kSize) != 0;
  bool right = failed == wrong;
  for (size_t i = 0; right && !wrong && exchanges && i < kSize; ++i) right = out[i] == in[i ^ 128];
  if (!right) std::printf("wrong = %d: \"%s\"\n", wrong, iss::simt::last_error());
  return right;
}

}  // namespace

int main() {
  bool right = true;
  for (int policy = 0; policy < 3; ++policy) {
    simt_configure(policy, 1, 1, policy == 2 ? 20 : 0, 4);
    for (Sample* sample : {exchange_unready, neighbour_through_grid, relaxed_release})
      for (bool wrong : {false, true}) right &= run(sample, wrong, true);
    for (Sample* sample : {shuffle_as_barrier, copy_in_flight, beyond_tensor, uninitialised_shared,
                           endless_spin, skipped_barrier})
      for (bool wrong : {false, true}) right &= run(sample, wrong, false);
  }
  std::puts(right ? "passed" : "failed");
}
