// SPDX-License-Identifier: Apache-2.0

#include "locks.h"

#include <pthread.h>

namespace iss {
namespace {

constinit std::mutex mutex;
constinit std::atomic<int> generation = 1;  // a child's is one more than its parent's

[[maybe_unused]] const int registered = pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); },
                                                       [] {
                                                         mutex.unlock();
                                                         ++generation;
                                                       });

}  // namespace

std::mutex& process_mutex() { return mutex; }

void ObjectMutex::lock() {
  const int now = generation.load(std::memory_order_relaxed);
  int holder = 0;
  while (!holder_.compare_exchange_weak(holder, now, std::memory_order_acquire)) {
    if (holder == now) {
      holder_.wait(now, std::memory_order_relaxed);
      holder = 0;
    } else if (holder != 0 &&
               holder_.compare_exchange_strong(holder, now, std::memory_order_acquire)) {
      abandoned_ = true;
      return;
    } else {
      holder = 0;
    }
  }
}

}  // namespace iss
