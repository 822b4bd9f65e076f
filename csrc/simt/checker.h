// SPDX-License-Identifier: Apache-2.0
// Finds what a GPU would forgive most of the time: races, reads of memory that nobody wrote,
// accesses out of bounds. Kernels are compiled with -fsanitize=thread and linked without its
// library: the compiler's calls at every access end in checker.cpp.
//
// Two accesses are a race unless a chain of barriers, or of add_release and load_acquire, orders
// them; vector clocks tell, whatever order the threads happened to run in. The scheduler calls
// these functions in checked launches alone.
#pragma once

#include "simt/scheduler.h"

namespace iss::simt {

// How far each thread of a block had come, and that for every block heard of (nullptr: none).
using Clocks = std::vector<uint32_t>;
struct Knowledge {
  std::vector<std::shared_ptr<const Clocks>> blocks;
};

enum class Access {
  kRead,
  kWrite,
  kReadOnly,     // __ldg: nobody may write it in this launch
  kAtomicRead,   // load_acquire
  kAtomicWrite,  // atomicAdd, add_release
  kCopyStarts,   // cp.async: a write that has not happened yet
};

namespace checker {

void start(Launch& launch);
void end(Launch& launch);
void start_block(Block& block);  // its threads exist
void end_block(Block& block);    // no thread of its cluster runs any more
void end_thread(Thread& thread);
void declare_static(Block& block, size_t offset, size_t bytes);

void access(const void* address, size_t bytes, Access kind, const void* pc);
void acquire(const void* flag, Thread& thread);
void release(const void* flag, Thread& thread);
void arrive(Barrier& barrier, Thread& thread);
void release(Barrier& barrier);  // all have arrived
void leave(Barrier& barrier, Thread& thread);

// Memory that kernels may use; one of the host's, whose values are known to nobody but the host.
// `guard` bytes around it are nobody's. Held: `machine`.
void add_memory(char* begin, size_t bytes);
void remove_memory(char* begin);

}  // namespace checker

// What new memory is filled with, a NaN in every format: a float, a double, either 16-bit type.
inline constexpr uint16_t kPoison = 0xfff5;
void poison(void* begin, size_t bytes);

}  // namespace iss::simt
