// SPDX-License-Identifier: Apache-2.0
// Memory that is used again, since to be given fresh pages takes up to half as long as a small
// training step: tensors from one call to the next, and what one call needs beside them. Where
// there is no memory, all of it raises torch's own error.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/alloc_cpu.h>

#include <cstdint>
#include <new>
#include <vector>

namespace iss {

// at::empty, but what is large comes from tensors that were made here and are gone, of which some
// 128 MB are kept; in pages of 2 MB from 4 MB on, where that can be had.
at::Tensor recycled(at::IntArrayRef sizes, at::ScalarType dtype);

// New memory at a multiple of 64 bytes, for c10::free_cpu to free. Where there is none, what
// recycled() keeps goes first.
void* allocate(size_t bytes);

// The calling thread's memory for intermediate results: grows, and is used again by the next call.
// At a multiple of 64 bytes; nullptr for 0 bytes.
void* scratch(int64_t bytes);

// For containers as large as an input, whose std::bad_alloc would not be torch's error.
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

// Hands out pieces of one block of memory; first run without a block to learn its size.
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
