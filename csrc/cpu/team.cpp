// SPDX-License-Identifier: Apache-2.0

#include "cpu/team.h"

#include <pthread.h>

#include <limits>

#ifdef __linux__
#include <sched.h>
#endif

namespace iss {
namespace {

constexpr int64_t kAll = std::numeric_limits<int64_t>::max();
constexpr int64_t kMillisecond = 1'000'000;

int64_t nanoseconds(Clock::time_point time) { return time.time_since_epoch().count(); }

// -- Cores

std::atomic<int64_t> core_limit = kAll, pretended = 0;

int64_t cores_by_affinity() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  const int64_t cores = std::thread::hardware_concurrency();
  return cores > 0 ? cores : kAll;
}

// -- Calls from several threads

std::atomic<int64_t> calls_under_way = 0;

// The most concurrent calls in this window of time and in the one before. One word holds [window,
// count of the window before, count of this window].
constexpr int kCountBits = 12, kMostCalls = (1 << kCountBits) - 1;
constexpr int64_t kWindow = 8 * kMillisecond;
std::atomic<int64_t> most_calls = 0;

int64_t concurrent_calls(int64_t now) {
  const int64_t window = now / kWindow;
  const int64_t calls =
      std::clamp<int64_t>(calls_under_way.load(std::memory_order_relaxed), 1, kMostCalls);
  int64_t word = most_calls.load(std::memory_order_relaxed), next, before, in_window;
  do {
    const int64_t age = window - (word >> 2 * kCountBits);
    before = age == 0 ? word >> kCountBits & kMostCalls : age == 1 ? word & kMostCalls : 0;
    in_window = std::max(calls, age == 0 ? word & kMostCalls : 0);
    next = window << 2 * kCountBits | before << kCountBits | in_window;
  } while (next != word &&
           !most_calls.compare_exchange_weak(word, next, std::memory_order_relaxed));
  return std::max(before, in_window);
}

// -- Threads that came late

// After a thread was late, half of the threads are not used for eight times as long as it was late.
// If a thread is late again before the threads have been of use for that long, another process has
// their cores: the next hold is then four times longer than the one before.
//
// A thread that slept may be late because its core slept too: a virtual machine takes 2 to 8 ms to
// wake one, and some take 84. That thread is on time from then on, so its lateness does not count.
// It does count if the thread was late the time before as well: then another process has its core,
// or calls come so seldom that the second thread is worth less than its waking.
constexpr int64_t kLongestHold = 1024 * kMillisecond, kLongestWaking = 100 * kMillisecond;
std::atomic<int64_t> thread_limit = kAll, hold = 0, hold_ends = 0;
std::atomic<int64_t> of_use = kAll / 2;  // nanoseconds in regions without a late thread since then
std::atomic<int64_t> last_late = 0;
std::atomic<bool> may_wake = true;  // whether lateness of a thread that slept is not counted

// A forked child has no calls of other threads, and threads of its own, which were never late.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
  calls_under_way.store(0, std::memory_order_relaxed);
  thread_limit.store(kAll, std::memory_order_relaxed);
  hold.store(0, std::memory_order_relaxed);
  of_use.store(kAll / 2, std::memory_order_relaxed);
});

int64_t limit_now(int64_t now, int64_t available) {
  const int64_t limit = thread_limit.load(std::memory_order_relaxed);
  if (limit == kAll || now < hold_ends.load(std::memory_order_relaxed)) return limit;
  const int64_t more = 2 * limit < available ? 2 * limit : kAll;
  thread_limit.store(more, std::memory_order_relaxed);
  if (more != kAll)
    hold_ends.store(now + hold.load(std::memory_order_relaxed), std::memory_order_relaxed);
  return more;
}

}  // namespace

void limit_cores(int64_t most) { core_limit.store(most, std::memory_order_relaxed); }

void pretend_cores(int64_t cores) { pretended.store(cores, std::memory_order_relaxed); }

int64_t cores(Clock::time_point time) {
  if (const int64_t given = pretended.load(std::memory_order_relaxed); given > 0) return given;
  // taskset may change the affinity while the process runs.
  constexpr int64_t kRefresh = 100 * kMillisecond;
  static std::atomic<int64_t> known = cores_by_affinity(), checked = 0;
  const int64_t now = nanoseconds(time);
  if (now - checked.load(std::memory_order_relaxed) > kRefresh) {
    known.store(cores_by_affinity(), std::memory_order_relaxed);
    checked.store(now, std::memory_order_relaxed);
  }
  return std::min(known.load(std::memory_order_relaxed),
                  core_limit.load(std::memory_order_relaxed));
}

int64_t free_threads(Clock::time_point time) {
  const int64_t available = available_threads();
  if (available == 1) return 1;
  const int64_t now = nanoseconds(time);
  const int64_t with_a_core = std::max<int64_t>(1, cores(time) / concurrent_calls(now));
  return std::min({available, with_a_core, limit_now(now, available)});
}

void note_on_time(Clock::time_point begin, Clock::time_point end) {
  of_use.fetch_add((end - begin).count(), std::memory_order_relaxed);
  if (!may_wake.load(std::memory_order_relaxed) &&
      nanoseconds(begin) > last_late.load(std::memory_order_relaxed))
    may_wake.store(true, std::memory_order_relaxed);
}

bool note_late(int64_t threads, Clock::duration by, bool slept) {
  const int64_t now = nanoseconds(Clock::now()), cost = 8 * int64_t{by.count()};
  last_late.store(now, std::memory_order_relaxed);
  const bool counts =
      !slept || by.count() > kLongestWaking || !may_wake.load(std::memory_order_relaxed);
  may_wake.store(counts, std::memory_order_relaxed);
  if (!counts) return false;
  const bool again = of_use.exchange(0, std::memory_order_relaxed) < cost;
  const int64_t longer = again ? 4 * hold.load(std::memory_order_relaxed) : 0;
  const int64_t next = std::min(std::max(cost, longer), kLongestHold);
  hold.store(next, std::memory_order_relaxed);
  hold_ends.store(now + next, std::memory_order_relaxed);
  thread_limit.store(std::max<int64_t>(1, threads / 2), std::memory_order_relaxed);
  return true;
}

Call::Call() { calls_under_way.fetch_add(1, std::memory_order_relaxed); }
Call::~Call() { calls_under_way.fetch_sub(1, std::memory_order_relaxed); }

}  // namespace iss
