// SPDX-License-Identifier: Apache-2.0
// The only platform header a kernel includes. nvcc gets CUDA and thin wrappers over PTX; a C++
// compiler gets the same names from host.h, where every CUDA thread is a fiber (csrc/README.md,
// "How CUDA kernels run without a GPU"). A wrapper here has its twin there, in the same order.
//
// Kernels use these names alone: no <<<>>>, no __shared__, no volatile, no __CUDA_ARCH__.
#pragma once

#include <cstdint>
#include <type_traits>

#include "types.h"

#ifndef __CUDACC__
#include "simt/host.h"
#else

#include <cooperative_groups.h>
#include <cuda_runtime.h>

// What the code is compiled for: 800, 900, ...; 0 in nvcc's pass over host code.
#ifdef __CUDA_ARCH__
#define SIMT_ARCH __CUDA_ARCH__
#else
#define SIMT_ARCH 0
#endif

// SIMT_SHARED(float, tile, [32][33]) declares `float tile[32][33]`; SIMT_DYN_SHARED(float, all)
// declares `float* all`, the start of what the launch asked for, aligned to 16 bytes.
#define SIMT_SHARED(T, name, dims) __shared__ T name dims
#define SIMT_DYN_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char simt_dyn_shared[]; \
  T* name = reinterpret_cast<T*>(simt_dyn_shared)

#define SIMT_DEVICE __device__ __forceinline__
#define SIMT_UNCHECKED  // host code that the emulator's checker is not told of

namespace iss {

// Flags between blocks, for the whole GPU: what a thread wrote before add_release is seen by who
// reads the sum with load_acquire. spin_hint() belongs in every loop that waits for one.
SIMT_DEVICE uint32_t load_acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
SIMT_DEVICE void add_release(uint32_t* flag, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
SIMT_DEVICE void spin_hint() {}  // asking takes as long as L2 does: reason enough not to sleep

// Through L2, past L1: what another multiprocessor has written.
template <typename T>
SIMT_DEVICE T load_l2(const T* from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  uint32_t words[sizeof(T) / 4];
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(words[0]) : "l"(from) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "l"(from)
                 : "memory");
  } else {
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(from)
                 : "memory");
  }
  T value;
  memcpy(&value, words, sizeof(T));
  return value;
}

SIMT_DEVICE unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// 16 bytes on their way while the thread goes on. cp_async_wait<N>() waits until at most N groups
// of this thread's copies are under way; other threads see them after a barrier.
SIMT_DEVICE void cp_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}
SIMT_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
SIMT_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 8x8 matrices of 16-bit elements: lane 8i + j gives the address of row j of matrix i, and gets
// the elements 2 (lane % 4) and the next of row lane / 4 of every matrix.
SIMT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
SIMT_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// d [16, 8] += a [16, K] @ b [K, 8]. Of d, a lane has rows lane / 4 and 8 further down, columns
// 2 (lane % 4) and the next; a and b as ldmatrix_x4 and _x2 load them from a and from b.T.
template <typename T>
SIMT_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, Bfloat16> || std::is_same_v<T, Float16>);
  if constexpr (std::is_same_v<T, Bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}
SIMT_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The nearest number with 10 bits of mantissa; ties away from zero.
SIMT_DEVICE uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// 2^x within 2 ulp and 1/x within 1 ulp, by the special function unit; denormal numbers are 0.
SIMT_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SIMT_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The cluster that a block belongs to (sm_90 and later; elsewhere no launch gets this far). What a
// thread wrote before cluster_arrive is seen after cluster_wait, and shared memory of another block
// may be touched only between two barriers of the cluster: it must have started and not ended.
SIMT_DEVICE unsigned cluster_rank() {
  unsigned rank = 0;
#if SIMT_ARCH >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
SIMT_DEVICE unsigned cluster_size() {
  unsigned size = 1;
#if SIMT_ARCH >= 900
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}
SIMT_DEVICE void cluster_arrive() {
#if SIMT_ARCH >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  __trap();
#endif
}
SIMT_DEVICE void cluster_wait() {
#if SIMT_ARCH >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
SIMT_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
template <typename T>
SIMT_DEVICE T* map_shared(T* shared, unsigned rank) {
#if SIMT_ARCH >= 900
  uint64_t address;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(rank));
  return reinterpret_cast<T*>(address);
#else
  return shared;
#endif
}

// All blocks of a cooperative launch.
SIMT_DEVICE void grid_sync() { cooperative_groups::this_grid().sync(); }

}  // namespace iss
#endif

#include "simt/launch.h"
