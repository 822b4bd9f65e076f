// SPDX-License-Identifier: Apache-2.0
// Threads that work on one sequence together: one parallel region for all its steps, with a barrier
// that spins between them. A fork and join per step would cost more than a small step itself.
//
// A thread without a core of its own makes all others wait, for some milliseconds where a busy
// process has that core. So threads are counted on only while they come in time (free_threads), and
// a team whose member comes late goes on without it.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <utility>

namespace iss {

using Clock = std::chrono::steady_clock;

// Multiplies that take 2 to 4 us, and 30 to 80: what it costs to have a thread take part that still
// spins from the last time, as OpenMP's do for some milliseconds, and one that has to be woken.
constexpr int64_t kWorthAThread = 1 << 17, kWorthWaking = 1 << 21;
// A thread that took part, or was counted on, no longer ago than this is taken to spin.
constexpr std::chrono::milliseconds kSpinning{2};
// A wait that is longer than this, and than what the waiting thread had to do itself, is for a
// thread that has no core: longer than waking one takes, or a moment's disturbance; shorter than
// the time slice of another process.
constexpr std::chrono::milliseconds kLate{2};

// The threads that torch has: the most that take part, whose buffers a call lays out. One inside
// another parallel region.
inline int64_t available_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Those of them that may be expected to have a core: no more than the process has cores for its
// concurrent calls, and fewer for a while after one came late. Varies from call to call.
int64_t free_threads(Clock::time_point now);

// Tells free_threads that one of so many threads came late, by so much; that none did in a region.
void note_late(int64_t threads, Clock::duration by);
void note_on_time(Clock::duration region);

// The cores that the process may use: by its affinity, and no more than limit_cores last said (the
// quota of a cgroup). What a test pretends goes before both; 0: nothing.
int64_t cores(Clock::time_point now);
void limit_cores(int64_t most);
void pretend_cores(int64_t cores);

// Lives as long as a call, so that calls from several threads share the cores.
class Call {
 public:
  Call();
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
};

// When the calling thread last counted on others, or had them take part.
inline Clock::time_point& last_together() {
  thread_local Clock::time_point last;
  return last;
}

// A fork or join of OpenMP, which ThreadSanitizer does not see: what `release` has seen before,
// `acquire` sees after.
#ifdef __SANITIZE_THREAD__
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
inline void acquire(void* fork) { __tsan_acquire(fork); }
inline void release(void* fork) { __tsan_release(fork); }
#else
inline void acquire(void*) {}
inline void release(void*) {}
#endif

// at::parallel_for over [0, threads) with a thread for each, after which the threads spin for a
// while. body(begin, end); end > begin + 1 where there are fewer threads than that.
template <typename Body>
void together(int64_t threads, const Body& body) {
  const Clock::time_point begin = Clock::now();
  std::atomic<Clock::time_point> first_done = Clock::time_point::max();
  release(&first_done);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    acquire(&first_done);
    body(first, last);
    const Clock::time_point now = Clock::now();
    Clock::time_point done = first_done.load(std::memory_order_relaxed);
    while (now < done && !first_done.compare_exchange_weak(done, now, std::memory_order_relaxed)) {
    }
    release(&first_done);
  });
  acquire(&first_done);
  const Clock::time_point now = last_together() = Clock::now();
  const Clock::time_point done = first_done.load(std::memory_order_relaxed);
  if (now - done > std::max<Clock::duration>(kLate, (done - begin) / 2))
    note_late(threads, now - done);
  else
    note_on_time(now - begin);
}

// The threads that so many multiplies are worth, of `threads` that spin.
inline int64_t threads_worth(int64_t multiplies, int64_t threads) {
  return std::clamp<int64_t>(multiplies / kWorthAThread, 1, threads);
}

// The threads that so many multiplies are worth now.
inline int64_t threads_for(int64_t multiplies) {
  if (multiplies < 2 * kWorthAThread || available_threads() == 1) return 1;
  const Clock::time_point now = Clock::now();
  const int64_t threads = free_threads(now);
  if (threads == 1) return 1;
  const bool spinning = now - std::exchange(last_together(), now) < kSpinning;
  const int64_t each = spinning ? kWorthAThread : kWorthWaking;
  return std::clamp<int64_t>(multiplies / each, 1, threads);
}

// Calls body(begin, end) for parts of `count` things that take so many multiplies each, on as many
// threads as that is worth.
template <typename Body>
void each_part(int64_t count, int64_t multiplies, const Body& body) {
  const int64_t parts = std::min(count, threads_for(count * multiplies));
  if (parts <= 1) return body(0, count);
  together(parts,
           [&](int64_t begin, int64_t end) { body(count * begin / parts, count * end / parts); });
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
  together(threads, take_all);
}

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// Returns when ready() is true. When the wait gets long, calls late(since, now) now and then; once
// that is true, gives the core away between looks.
template <typename Ready, typename Late>
void spin_until(const Ready& ready, const Late& late) {
  // Some us: longer than a step that is worth a team. No clock is read before that.
  constexpr int64_t kLooks = 1 << 12, kPauses = 1 << 6;
  for (int64_t looks = 0; looks < kLooks; ++looks)
    if (ready()) return;
  const Clock::time_point since = Clock::now();
  while (!late(since, Clock::now()))
    for (int64_t pauses = 0; pauses < kPauses; ++pauses) {
      if (ready()) return;
      pause();
    }
  // Not yield(), after which a busy process may run for a whole slice.
  while (!ready()) std::this_thread::sleep_for(std::chrono::microseconds(50));
}

// Threads that take steps together and meet after each. Where one comes late by far, half of them
// leave at that meeting, the calling thread never; so it waits no more than once for each half.
class Team {
 public:
  // Those of the `all` threads at first that are still members: [0, members(all)).
  int64_t members(int64_t all) const {
    return std::max<int64_t>(1, all >> halvings_.load(std::memory_order_relaxed));
  }

  // Blocks until all members have called; only members call. Without `shrinks` nobody leaves.
  void meet(int64_t all, bool shrinks = true) {
    const int64_t parties = members(all);
    if (parties == 1) return;
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == parties) {
      arrived_.store(0, std::memory_order_relaxed);
      if (late_.exchange(false, std::memory_order_relaxed)) {
        note_late(parties, Clock::now() - late_since_.load(std::memory_order_relaxed));
        if (shrinks) halvings_.fetch_add(1, std::memory_order_relaxed);
      }
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    spin_until([&] { return round_.load(std::memory_order_acquire) != round; },
               [&](Clock::time_point since, Clock::time_point now) {
                 const Clock::duration a_round = (since - begin_) / (round + 1);
                 if (now - since < std::max<Clock::duration>(kLate, a_round)) return false;
                 late_since_.store(since, std::memory_order_relaxed);
                 late_.store(true, std::memory_order_relaxed);
                 return true;
               });
  }

 private:
  const Clock::time_point begin_ = Clock::now();
  alignas(64) std::atomic<int64_t> arrived_ = 0;
  alignas(64) std::atomic<int64_t> round_ = 0;
  std::atomic<int64_t> halvings_ = 0;
  std::atomic<bool> late_ = false;
  std::atomic<Clock::time_point> late_since_ = {};
};

// Calls body(member, members) on up to `wanted` threads at once. There is one member inside another
// parallel region, and where torch has one thread.
template <typename Body>
void run_team(int64_t wanted, const Body& body) {
  together(wanted, [&](int64_t begin, int64_t end) {
    // parallel_for gives each thread `share` of the indices; fewer threads than asked for get more.
    const int64_t share = begin == 0 ? end : begin / at::get_thread_num();
    body(begin / share, (wanted + share - 1) / share);
  });
}

}  // namespace iss
