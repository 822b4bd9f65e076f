// SPDX-License-Identifier: Apache-2.0
// A team: the threads that work on one sequence together. They run in one parallel region for all
// steps and meet at a spinning barrier; a fork and join for each step would take longer than a
// small step itself.
//
// A thread without a core of its own makes the others wait, for some milliseconds where a busy
// process has that core. So a team goes on without a member that is late (Team), and for a while
// later calls use fewer threads (free_threads).
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

// The least work, in multiplies, that is worth another thread. OpenMP's threads spin for some
// milliseconds after a parallel region: a thread that still spins costs 2 to 4 us, one that sleeps
// and has to be woken 30 to 80 us.
constexpr int64_t kWorthAThread = 1 << 17, kWorthWaking = 1 << 21;
// Threads are taken to spin for this long after they last took part, or might have taken part.
constexpr std::chrono::milliseconds kSpinning{2};
// A wait is for a thread without a core if it is longer than this and longer than the waiting
// thread's own work. Waking a thread and short disturbances take less; the time slice of another
// process takes longer.
constexpr std::chrono::milliseconds kLate{2};

// torch's number of threads: the most that can take part, so a call lays out buffers for as many.
// 1 inside another parallel region.
inline int64_t available_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// How many of these threads can be expected to have a core. At most the process's cores divided by
// its concurrent calls, and fewer for a while after a thread was late. Varies from call to call.
int64_t free_threads(Clock::time_point now);

// Tell free_threads that one of `threads` threads was late by so much, or that at the end of a
// region none was. slept: the thread had slept before the region and had not come yet. Returns
// whether the lateness counts; if not, the thread is only waking up.
bool note_late(int64_t threads, Clock::duration by, bool slept);
void note_on_time(Clock::time_point begin, Clock::time_point end);

// The cores that the process may use: those of its affinity, but at most what limit_cores was last
// given (the quota of a cgroup). A test replaces both by pretend_cores; 0 ends that.
int64_t cores(Clock::time_point now);
void limit_cores(int64_t most);
void pretend_cores(int64_t cores);

// Counts a call while it runs, so that calls from several threads share the cores.
class Call {
 public:
  Call();
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
};

// When the calling thread last ran a team, or last considered it.
inline Clock::time_point& last_together() {
  thread_local Clock::time_point last;
  return last;
}

// When the calling thread last ran a team.
inline Clock::time_point& last_region() {
  thread_local Clock::time_point last;
  return last;
}

// Whether the threads of a region that begins at `begin` have to be woken.
inline bool asleep(Clock::time_point begin) { return begin - last_region() > kSpinning; }

// ThreadSanitizer does not see OpenMP's fork and join. These two tell it: what happens before
// `release` is visible after `acquire`.
#ifdef __SANITIZE_THREAD__
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
inline void acquire(void* fork) { __tsan_acquire(fork); }
inline void release(void* fork) { __tsan_release(fork); }
#else
inline void acquire(void*) {}
inline void release(void*) {}
#endif

// Calls body(begin, end) on up to `threads` threads, which divide the indices [0, threads) among
// them: one index each where all threads take part. Reports late threads to free_threads.
template <typename Body>
void together(int64_t threads, const Body& body) {
  const Clock::time_point begin = Clock::now();
  const bool slept = asleep(begin);
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
  const Clock::time_point now = last_together() = last_region() = Clock::now();
  const Clock::time_point done = first_done.load(std::memory_order_relaxed);
  if (now - done > std::max<Clock::duration>(kLate, (done - begin) / 2))
    note_late(threads, now - done, slept);
  else
    note_on_time(begin, now);
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

// Divides `count` items, each of `multiplies` multiplies, into one part for each thread that the
// work is worth, and calls body(begin, end) for each part.
template <typename Body>
void each_part(int64_t count, int64_t multiplies, const Body& body) {
  const int64_t parts = std::min(count, threads_for(count * multiplies));
  if (parts <= 1) return body(0, count);
  together(parts,
           [&](int64_t begin, int64_t end) { body(count * begin / parts, count * end / parts); });
}

// Divides `count` items, each of `multiplies` multiplies, into blocks of at most `most`, and calls
// body(begin, end, thread) for each block, thread < available_threads(). A thread that has finished
// a block takes the next one, so a thread that loses its core delays one block only.
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

// Returns when ready() is true. In a long wait it calls late(since, now) from time to time; after
// that has returned true, it sleeps between its checks of ready().
template <typename Ready, typename Late>
void spin_until(const Ready& ready, const Late& late) {
  // The first checks take some microseconds, longer than a step that is worth a team, and read no
  // clock.
  constexpr int64_t kLooks = 1 << 12, kPauses = 1 << 6;
  for (int64_t looks = 0; looks < kLooks; ++looks)
    if (ready()) return;
  const Clock::time_point since = Clock::now();
  while (!late(since, Clock::now()))
    for (int64_t pauses = 0; pauses < kPauses; ++pauses) {
      if (ready()) return;
      pause();
    }
  // Not yield(): a busy process could then run for a whole time slice.
  while (!ready()) std::this_thread::sleep_for(std::chrono::microseconds(50));
}

// Threads that take steps together and meet after each step. Where a member is late, half of the
// members leave at that meeting, unless it was only waking up. Member 0, the calling thread, never
// leaves, so it waits for late members at most once for each halving and once for their waking.
class Team {
 public:
  // The members that are left of the `all` threads at the start: [0, members(all)).
  int64_t members(int64_t all) const {
    return std::max<int64_t>(1, all >> halvings_.load(std::memory_order_relaxed));
  }

  // A barrier: returns when all members have called it. Only members call. Without `shrinks` no
  // member leaves.
  void meet(int64_t all, bool shrinks = true) {
    const int64_t parties = members(all);
    if (parties == 1) return;
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == parties) {
      arrived_.store(0, std::memory_order_relaxed);
      if (late_.exchange(false, std::memory_order_relaxed)) {
        const Clock::duration by = Clock::now() - late_since_.load(std::memory_order_relaxed);
        if (note_late(parties, by, slept_ && round == 0) && shrinks)
          halvings_.fetch_add(1, std::memory_order_relaxed);
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
  const bool slept_ = asleep(begin_);
  alignas(64) std::atomic<int64_t> arrived_ = 0;
  alignas(64) std::atomic<int64_t> round_ = 0;
  std::atomic<int64_t> halvings_ = 0;
  std::atomic<bool> late_ = false;
  std::atomic<Clock::time_point> late_since_ = {};
};

// Calls body(member, members) on up to `wanted` threads at once. Inside another parallel region,
// and where torch has one thread, there is one member.
template <typename Body>
void run_team(int64_t wanted, const Body& body) {
  together(wanted, [&](int64_t begin, int64_t end) {
    // parallel_for gives each thread `share` indices: more than one where it has fewer threads than
    // wanted.
    const int64_t share = begin == 0 ? end : begin / at::get_thread_num();
    body(begin / share, (wanted + share - 1) / share);
  });
}

}  // namespace iss
