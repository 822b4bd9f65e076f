// SPDX-License-Identifier: Apache-2.0
// Memory that is used again, since to be given fresh pages takes up to half as long as a small
// training step: tensors from one call to the next, and what one call needs beside them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace iss {

// at::empty, but what is large comes from tensors that were made here and are gone, of which some
// 128 MB are kept; in pages of 2 MB from 4 MB on, where that can be had.
at::Tensor recycled(at::IntArrayRef sizes, at::ScalarType dtype);

// The calling thread's memory for intermediate results: grows, and is used again by the next call.
void* scratch(int64_t bytes);

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
