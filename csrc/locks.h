// SPDX-License-Identifier: Apache-2.0
// Locks that survive a fork. A child process has only the thread that forked, so a plain mutex held
// by another thread at that moment would stay locked in the child for ever.
#pragma once

#include <atomic>
#include <mutex>

namespace iss {

// Guards what all threads share: recycled memory and packed weights. fork() takes this mutex and
// releases it in parent and child, so a child finds the mutex free and the data whole. It is held
// for a few instructions, and never while memory is allocated or freed.
std::mutex& process_mutex();

// The mutex of one object. Where a fork leaves it locked by a thread that the child does not have,
// the child can lock it, and abandoned() says that the object may be in the middle of a change.
class ObjectMutex {
 public:
  void lock();
  void unlock() {
    holder_.store(0, std::memory_order_release);
    holder_.notify_one();
  }

  // Both are called while the lock is held.
  bool abandoned() const { return abandoned_; }
  void recover() { abandoned_ = false; }

 private:
  std::atomic<int> holder_ = 0;  // generation of the process that holds the lock; 0: free
  bool abandoned_ = false;
};

}  // namespace iss
