// SPDX-License-Identifier: Apache-2.0

#include "memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/safe_numerics.h>

#include <algorithm>
#include <bit>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "locks.h"

namespace iss {
namespace {

// Asks the kernel for pages of 2 MB, before the memory is first touched. Arrays larger than the L3
// cache, and those read in long strides, are then read faster. A refusal does no harm.
void prefer_huge_pages(void* memory, int64_t bytes) {
#ifdef __linux__
  constexpr int64_t kPage = 4096, kWorthIt = 1 << 22;
  if (bytes < kWorthIt) return;
  const auto first = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), bytes - kPage, MADV_HUGEPAGE);
#endif
}

// Smaller tensors, in bytes, come from malloc, which recycles such blocks itself.
constexpr size_t kLarge = 1 << 16;

// The allocator of torch's storages. A block is a header of kAligned bytes that holds its size,
// then the memory of the storage.
class Recycler final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t count) override {
    // Sizes are rounded up by at most an eighth, so that sequences of varying length find blocks
    // that fit.
    const size_t step = std::max(kAligned, std::bit_floor(count) / 8);
    void* const block = take((count + step - 1) / step * step);
    void* const data = static_cast<char*>(block) + kAligned;
    c10::profiledCPUMemoryReporter().New(data, count);
    return {data, block, &give_back, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }

  // Frees the list.
  void release() {
    for (;;) {
      std::unique_lock lock(process_mutex());
      if (free_.empty()) return;
      free_oldest(std::move(lock));
    }
  }

 private:
  static constexpr size_t kAligned = 64, kKeep = 1 << 27;

  Recycler() { free_.reserve(kKeep / kLarge); }
  friend Recycler& recycler();

  static size_t& size_of(void* block) { return *static_cast<size_t*>(block); }

  static void give_back(void* block);

  void* take(size_t bytes);

  // Adds the block to the list and frees the oldest blocks beyond kKeep.
  void keep(void* block) {
    if (size_of(block) > kKeep) return c10::free_cpu(block);
    for (;;) {
      std::unique_lock lock(process_mutex());
      if (kept_ + size_of(block) <= kKeep) {
        free_.push_back(block);
        kept_ += size_of(block);
        return;
      }
      free_oldest(std::move(lock));
    }
  }

  void free_oldest(std::unique_lock<std::mutex> lock) {
    void* const block = free_.front();
    erase(free_.begin());
    lock.unlock();
    c10::free_cpu(block);
  }

  void erase(std::vector<void*>::iterator block) {
    kept_ -= size_of(*block);
    free_.erase(block);
  }

  std::vector<void*> free_;  // oldest first; never grows beyond what it reserved
  size_t kept_ = 0;          // bytes
};

Recycler& recycler() {
  static auto* recycler = new Recycler;  // never destroyed: tensors may live longer
  return *recycler;
}

void* Recycler::take(size_t bytes) {
  {
    const std::lock_guard lock(process_mutex());
    auto best = free_.end();
    for (auto block = free_.begin(); block != free_.end(); ++block)
      if (size_of(*block) >= bytes && size_of(*block) <= 2 * bytes &&
          (best == free_.end() || size_of(*block) <= size_of(*best)))
        best = block;  // of equal blocks the last used: caches may still hold it
    if (best != free_.end()) {
      void* const block = *best;
      erase(best);
      return block;
    }
  }
  void* const block = iss::allocate(bytes + kAligned);
  prefer_huge_pages(block, static_cast<int64_t>(bytes));
  size_of(block) = bytes;
  return block;
}

void Recycler::give_back(void* block) {
  c10::profiledCPUMemoryReporter().Delete(static_cast<char*>(block) + kAligned);
  recycler().keep(block);
}

}  // namespace

void* allocate(size_t bytes) {
  try {
    return c10::alloc_cpu(bytes);
  } catch (const c10::Error&) {
    recycler().release();
    return c10::alloc_cpu(bytes);
  }
}

at::Tensor recycled(at::IntArrayRef sizes, at::ScalarType dtype) {
  uint64_t count;
  const bool overflows = c10::safe_multiplies_u64(sizes, &count);  // at::empty raises the error
  if (overflows || count * c10::elementSize(dtype) < kLarge) return at::empty(sizes, dtype);
  return at::detail::empty_generic(sizes, &recycler(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   dtype, std::nullopt);
}

at::Tensor converted(const at::Tensor& t, at::ScalarType dtype) {
  if (t.scalar_type() == dtype) return t.contiguous();
  const at::Tensor copy = recycled(t.sizes(), dtype);
  return copy.copy_(t);
}

void* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* memory) const { c10::free_cpu(memory); }
  };
  struct Block {
    std::unique_ptr<void, Free> memory;
    int64_t bytes = 0;
  };
  thread_local Block block;
  constexpr int64_t kKeep = 1 << 26;  // a larger block is freed when a smaller one is enough
  if (bytes > block.bytes || (block.bytes > kKeep && bytes <= kKeep)) {
    block = {};  // before the next line, which may raise
    block.memory.reset(allocate(bytes));
    block.bytes = bytes;
    prefer_huge_pages(block.memory.get(), bytes);
  }
  return bytes == 0 ? nullptr : block.memory.get();
}

}  // namespace iss
