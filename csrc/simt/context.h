// SPDX-License-Identifier: Apache-2.0
// Switching between stacks of one OS thread. On x86-64 that is 14 instructions; elsewhere, or with
// SIMT_UCONTEXT, the C library's ucontext, which costs a system call a switch.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif

#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif

namespace iss::simt {

#ifdef SIMT_UCONTEXT

using Context = ucontext_t;

// A context that calls entry(), which must not return, when it is first switched to.
inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

#else

using Context = void*;  // the stack pointer; what the ABI has a function preserve lies on top of it

extern "C" void iss_simt_switch(Context* from, Context to);

inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  constexpr int kPreserved = 6;
  void** top = reinterpret_cast<void**>(stack + bytes) - 1;
  *top = nullptr;  // entry's return address: its stack is as misaligned as a call leaves it
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kPreserved; ++i) *--top = nullptr;
  context = top;
}
inline void switch_context(Context& from, Context& to) { iss_simt_switch(&from, to); }

#endif

}  // namespace iss::simt
