// SPDX-License-Identifier: Apache-2.0
// Memory that is used again: tensors that go back to a list when they die, and one scratch block
// for each thread. Fresh pages would cost up to half the time of a small training step. Where
// memory runs out, all functions here raise torch's own error.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/alloc_cpu.h>

#include <cstdint>
#include <new>
#include <vector>

namespace iss {

// at::empty from recycled memory. Large tensors made here return their memory to a list of up to
// 128 MB when they die, and later ones take it from there. Blocks of 4 MB and more ask for pages of
// 2 MB.
at::Tensor recycled(at::IntArrayRef sizes, at::ScalarType dtype);

// The tensor itself, contiguous, or a recycled copy in another type. (Tensor::to takes fresh
// memory, whose page faults cost as much as the copy.)
at::Tensor converted(const at::Tensor& t, at::ScalarType dtype);

// New memory, aligned to 64 bytes; c10::free_cpu frees it. Where there is none, the list of
// recycled() is freed first, then the allocation is tried again.
void* allocate(size_t bytes);

// The calling thread's block for intermediate results, aligned to 64 bytes. It grows as needed, and
// the next call of scratch() gets the same memory. nullptr for 0 bytes.
void* scratch(int64_t bytes);

// The allocator of containers as large as an input: std::bad_alloc would not be torch's error.
template <typename T>
struct CpuAllocator {
  using value_type = T;

  CpuAllocator() = default;
  template <typename U>
  CpuAllocator(const CpuAllocator<U>&) {}

  T* allocate(size_t count) { return static_cast<T*>(iss::allocate(count * sizeof(T))); }
  void deallocate(T* memory, size_t) { c10::free_cpu(memory); }
  bool operator==(const CpuAllocator&) const = default;
};

template <typename T>
using Vector = std::vector<T, CpuAllocator<T>>;

// Divides one block of memory into arrays, each aligned to 64 bytes. A caller lays out twice: first
// with base = nullptr, to learn the size of the block (`used`), then with the block.
struct Arena {
  char* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* const result = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * int64_t{sizeof(T)} + 63) / 64 * 64;
    return result;
  }
};

}  // namespace iss
