// SPDX-License-Identifier: Apache-2.0
// Locks that survive a fork. A child process has only the thread that forked: a plain mutex which
// another thread held at that moment stays locked in the child for ever.
#pragma once

#include <atomic>
#include <mutex>

namespace iss {

// Guards what all threads share: recycled memory and packed weights. fork() takes it and releases
// it on both sides, so a child finds it free and what it guards whole. Held for a few instructions;
// nothing is allocated or freed under it.
std::mutex& process_mutex();

// The mutex of one object. In a child, a lock held by a thread that is not there counts as free,
// and what it guards as abandoned() half-way.
class ObjectMutex {
 public:
  void lock();
  void unlock() {
    holder_.store(0, std::memory_order_release);
    holder_.notify_one();
  }

  // To be asked and told while the lock is held.
  bool abandoned() const { return abandoned_; }
  void recover() { abandoned_ = false; }

 private:
  std::atomic<int> holder_ = 0;  // the generation of the process that holds the lock; 0: free
  bool abandoned_ = false;
};

}  // namespace iss
