// SPDX-License-Identifier: Apache-2.0
// Memory of CPU tensors for checked launches: registered with the checker, between guards that
// belong to nobody, and NaN until it is written.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <new>

#include "simt/checker.h"

namespace iss::simt {
namespace {

constexpr size_t kGuard = 256;

void free_guarded(void* begin) {
  {
    const std::lock_guard lock(machine);
    checker::remove_memory(static_cast<char*>(begin));
  }
  std::free(static_cast<char*>(begin) - kGuard);
}

struct GuardedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const size_t all = (bytes + 2 * kGuard + 63) / 64 * 64;
    auto* memory = static_cast<char*>(std::aligned_alloc(64, all));
    if (memory == nullptr) throw std::bad_alloc();
    poison(memory, all);
    char* begin = memory + kGuard;
    const std::lock_guard lock(machine);
    checker::add_memory(begin, bytes);
    return {begin, begin, &free_guarded, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_guarded; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace
}  // namespace iss::simt

// Tensors made from now on get guarded memory, or again what they got before. They may outlive
// either: each is freed as it was made.
extern "C" __attribute__((visibility("default"))) void simt_guard_tensors(int on) {
  static iss::simt::GuardedAllocator guarded;
  static c10::Allocator* before = nullptr;
  if ((before != nullptr) == (on != 0)) return;
  if (on != 0) {
    before = c10::GetCPUAllocator();
    c10::SetCPUAllocator(&guarded, 1);
  } else {
    c10::SetCPUAllocator(before, 1);
    before = nullptr;
  }
}
