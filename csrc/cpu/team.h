// SPDX-License-Identifier: Apache-2.0
// Threads that work on one sequence together: one parallel region for all its steps, with a barrier
// that spins between them. A fork and join per step would cost more than a small step itself.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <utility>

namespace iss {

// Multiplies that take 2 to 4 us, and 30 to 80: what it costs to have a thread take part that still
// spins from the last time, as OpenMP's do for some milliseconds, and one that has to be woken.
constexpr int64_t kWorthAThread = 1 << 17, kWorthWaking = 1 << 21;
// A thread that was asked for, or let go, no longer ago than this is taken to spin.
constexpr std::chrono::milliseconds kSpinning{2};

// One inside another parallel region.
inline int64_t available_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

using Clock = std::chrono::steady_clock;

// When the calling thread last asked for others, or let them go.
inline Clock::time_point& last_together() {
  thread_local Clock::time_point last;
  return last;
}

// at::parallel_for, after which the threads spin for a while.
template <typename Body>
void together(int64_t count, int64_t grain, const Body& body) {
  at::parallel_for(0, count, grain, body);
  last_together() = Clock::now();
}

// The threads that so many multiplies are worth.
inline int64_t threads_for(int64_t multiplies) {
  const int64_t threads = available_threads();
  if (threads == 1 || multiplies < 2 * kWorthAThread) return 1;
  const Clock::time_point now = Clock::now();
  const bool spinning = now - std::exchange(last_together(), now) < kSpinning;
  const int64_t each = spinning ? kWorthAThread : kWorthWaking;
  return std::clamp<int64_t>(multiplies / each, 1, threads);
}

// Calls body(begin, end) for parts of `count` things that take so many multiplies each, on as many
// threads as that is worth.
template <typename Body>
void each_part(int64_t count, int64_t multiplies, const Body& body) {
  const int64_t parts = threads_for(count * multiplies);
  if (parts == 1) return body(0, count);
  together(count, (count + parts - 1) / parts, body);
}

// Calls body(begin, end, thread) for blocks of `count` things, up to `most` in each, that take so
// many multiplies each. A thread that is done with one takes the next: a core is not always a
// thread's own. thread < available_threads().
template <typename Body>
void each_block(int64_t count, int64_t most, int64_t multiplies, const Body& body) {
  const int64_t threads = std::min(count, threads_for(count * multiplies));
  if (threads == 0) return;
  const int64_t blocks = (count + threads * most - 1) / (threads * most) * threads;
  std::atomic<int64_t> next = 0;
  const auto take_all = [&](int64_t thread, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < blocks;)
      body(count * i / blocks, count * (i + 1) / blocks, thread);
  };
  if (threads == 1) return take_all(0, 1);
  together(threads, 1, take_all);
}

// Returns when ready() is true. Gives its core away when the wait gets long, as it does where there
// are more threads than cores.
template <typename Ready>
void spin_until(const Ready& ready) {
  constexpr int64_t kSpins = 1 << 14;  // some 10 us: longer than a step that is worth a team
  for (int64_t spins = 0; !ready(); ++spins)
    if (spins > kSpins) std::this_thread::yield();
}

class SpinBarrier {
 public:
  // Blocks until `parties` threads have called.
  void wait(int64_t parties) {
    if (parties == 1) return;
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == parties) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    spin_until([&] { return round_.load(std::memory_order_acquire) != round; });
  }

 private:
  alignas(64) std::atomic<int64_t> arrived_ = 0;
  alignas(64) std::atomic<int64_t> round_ = 0;
};

// Calls body(member, members, barrier) on up to `wanted` threads at once, where barrier() waits for
// all members. There is one member inside another parallel region, and where torch has one thread.
template <typename Body>
void run_team(int64_t wanted, const Body& body) {
  SpinBarrier shared;
  together(wanted, 1, [&](int64_t begin, int64_t end) {
    // parallel_for gives each thread `share` of the indices; fewer threads than asked for get more.
    const int64_t share = begin == 0 ? end : begin / at::get_thread_num();
    const int64_t members = (wanted + share - 1) / share;
    body(begin / share, members, [&] { shared.wait(members); });
  });
}

}  // namespace iss
