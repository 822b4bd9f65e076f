// SPDX-License-Identifier: Apache-2.0
// CUDA's names for a C++ compiler: every CUDA thread is a fiber, and whatever threads do with each
// other is a call into scheduler.cpp, with the place in the source that it came from. These
// functions touch no memory of the kernel themselves, so nothing in here is seen by the checker.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "types.h"
#include "simt/control.h"

#ifndef SIMT_ARCH
#define SIMT_ARCH 900
#endif

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define SIMT_UNCHECKED __attribute__((no_sanitize("thread")))

using cudaStream_t = void*;
using cudaError_t = int;
enum { cudaSuccess = 0 };

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

namespace iss::simt {

using Where = std::source_location;

// Of the thread that runs; the scheduler sets it at every switch.
struct Coordinates {
  dim3 thread, block, block_dim, grid_dim;
  unsigned lane, cluster_rank, cluster_size;
};
extern constinit thread_local Coordinates here;

enum class Scope { kWarp, kBlock, kCluster, kGrid };

void barrier(Scope scope, unsigned mask, Where where);
void cluster_arrive(Where where);
void cluster_wait(Where where);
// Lane `source`'s value of the lanes of `mask`, which all call it.
void shuffle(unsigned mask, const void* value, unsigned source, void* result, size_t bytes,
             Where where);
unsigned ballot(unsigned mask, bool predicate, Where where);
void yield(Where where);

// Before an atomic access; `ordered`: a release if it writes, an acquire if it does not.
void before_atomic(const void* address, size_t bytes, bool writes, bool ordered, Where where);
void read_through_l2(const void* from, void* to, size_t bytes);
void read_only(const void* from, void* to, size_t bytes);
void copy(void* to, const void* from, size_t bytes);

void* static_shared(const void* id, size_t bytes);  // id: one per declaration
void* dynamic_shared();
void* map_shared(const void* shared, unsigned rank, Where where);
void cp_async16(void* shared, const void* global, Where where);
void cp_async_commit();
void cp_async_wait(unsigned keep, Where where);
// count matrices, the words of this lane.
void ldmatrix(uint32_t* r, unsigned count, const void* row, Where where);
enum class Elements { kBfloat16, kFloat16, kTf32 };
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Elements elements,
         Where where);

template <typename T>
__forceinline__ T atomic_add(T* address, T value, bool ordered, Where where) {
  before_atomic(address, sizeof(T), true, ordered, where);
  T old, sum;
  copy(&old, address, sizeof(T));
  sum = old + value;
  copy(address, &sum, sizeof(T));
  return old;
}

template <typename T>
__forceinline__ T shuffle(unsigned mask, T value, unsigned source, Where where) {
  T result;
  shuffle(mask, &value, source, &result, sizeof(T), where);
  return result;
}

}  // namespace iss::simt

// The part of CUDA's runtime that launch.h needs: names, meaning and order of arguments are the
// same.
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative, cudaLaunchAttributeClusterDimension };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;  // 0: what a kernel declares is known once it runs
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {  // gridDim and blockDim are names that kernels have for others
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetLastError();
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
namespace iss::simt {
cudaError_t count_blocks(int* count, const void* kernel, int threads, size_t shared_bytes);
cudaError_t count_clusters(int* count, const void* kernel, const cudaLaunchConfig_t& config);
cudaError_t run(const void* kernel, const cudaLaunchConfig_t& config, void (*body)(void*),
                void* argument);
}  // namespace iss::simt
template <typename... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, void (*kernel)(P...),
                                                          int threads, size_t shared_bytes) {
  return iss::simt::count_blocks(count, reinterpret_cast<const void*>(kernel), threads,
                                 shared_bytes);
}
template <typename... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, void (*kernel)(P...),
                                           const cudaLaunchConfig_t* config) {
  return iss::simt::count_clusters(count, reinterpret_cast<const void*>(kernel), *config);
}
template <typename... P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               std::type_identity_t<P>... args) {
  // The arguments are read from the launching function's stack, which is none of the kernel's
  // memory.
  auto body = [=]() SIMT_UNCHECKED { kernel(args...); };
  return iss::simt::run(
      reinterpret_cast<const void*>(kernel), *config,
      [](void* argument) SIMT_UNCHECKED { (*static_cast<decltype(body)*>(argument))(); }, &body);
}

#define threadIdx (::iss::simt::here.thread)
#define blockIdx (::iss::simt::here.block)
#define blockDim (::iss::simt::here.block_dim)
#define gridDim (::iss::simt::here.grid_dim)
#define SIMT_WHERE ::iss::simt::Where where = ::iss::simt::Where::current()

#define SIMT_SHARED(T, name, dims) \
  using name##_type = T dims;      \
  static const char name##_id = 0; \
  name##_type& name =              \
      *static_cast<name##_type*>(::iss::simt::static_shared(&name##_id, sizeof(name##_type)))
#define SIMT_DYN_SHARED(T, name) T* name = static_cast<T*>(::iss::simt::dynamic_shared())
#define SIMT_DEVICE __forceinline__

SIMT_DEVICE void __syncthreads(SIMT_WHERE) {
  iss::simt::barrier(iss::simt::Scope::kBlock, ~0u, where);
}
SIMT_DEVICE void __syncwarp(unsigned mask = ~0u, SIMT_WHERE) {
  iss::simt::barrier(iss::simt::Scope::kWarp, mask, where);
}

// Lanes of a shuffle fall into segments of `width`; who asks beyond its own gets its own value.
template <typename T>
SIMT_DEVICE T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_WHERE) {
  unsigned first = iss::simt::here.lane & -width;
  return iss::simt::shuffle(mask, value, first + (source & (width - 1)), where);
}
template <typename T>
SIMT_DEVICE T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SIMT_WHERE) {
  unsigned lane = iss::simt::here.lane, source = lane ^ bits;
  return iss::simt::shuffle(mask, value, source / width <= lane / width ? source : lane, where);
}
template <typename T>
SIMT_DEVICE T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, SIMT_WHERE) {
  unsigned lane = iss::simt::here.lane;
  bool inside = lane % width + by < static_cast<unsigned>(width);
  return iss::simt::shuffle(mask, value, inside ? lane + by : lane, where);
}
template <typename T>
SIMT_DEVICE T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, SIMT_WHERE) {
  unsigned lane = iss::simt::here.lane;
  return iss::simt::shuffle(mask, value, lane % width >= by ? lane - by : lane, where);
}
SIMT_DEVICE unsigned __ballot_sync(unsigned mask, int predicate, SIMT_WHERE) {
  return iss::simt::ballot(mask, predicate != 0, where);
}

template <typename T>
SIMT_DEVICE T atomicAdd(T* address, std::type_identity_t<T> value, SIMT_WHERE) {
  return iss::simt::atomic_add(address, value, false, where);
}
template <typename T>
SIMT_DEVICE T __ldg(const T* from) {
  T value;
  iss::simt::read_only(from, &value, sizeof(T));
  return value;
}

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }

namespace iss {

SIMT_DEVICE uint32_t load_acquire(const uint32_t* flag, SIMT_WHERE) {
  simt::before_atomic(flag, sizeof(*flag), false, true, where);
  uint32_t value;
  simt::copy(&value, flag, sizeof(value));
  return value;
}
SIMT_DEVICE void add_release(uint32_t* flag, uint32_t value, SIMT_WHERE) {
  simt::atomic_add(flag, value, true, where);
}
SIMT_DEVICE void spin_hint(SIMT_WHERE) { simt::yield(where); }

template <typename T>
SIMT_DEVICE T load_l2(const T* from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  T value;
  simt::read_through_l2(from, &value, sizeof(T));
  return value;
}

SIMT_DEVICE void cp_async16(void* shared, const void* global, SIMT_WHERE) {
  simt::cp_async16(shared, global, where);
}
SIMT_DEVICE void cp_async_commit() { simt::cp_async_commit(); }
template <int N>
SIMT_DEVICE void cp_async_wait(SIMT_WHERE) {
  simt::cp_async_wait(N, where);
}

SIMT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row, SIMT_WHERE) {
  simt::ldmatrix(r, 4, row, where);
}
SIMT_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row, SIMT_WHERE) {
  simt::ldmatrix(r, 2, row, where);
}

template <typename T>
SIMT_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              SIMT_WHERE) {
  static_assert(std::is_same_v<T, Bfloat16> || std::is_same_v<T, Float16>);
  simt::mma(d, a, b,
            std::is_same_v<T, Bfloat16> ? simt::Elements::kBfloat16 : simt::Elements::kFloat16,
            where);
}
SIMT_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                  SIMT_WHERE) {
  simt::mma(d, a, b, simt::Elements::kTf32, where);
}
SIMT_DEVICE uint32_t to_tf32(float value) {
  uint32_t bits = __float_as_uint(value);
  bool finite = (bits & 0x7f800000) != 0x7f800000;
  return finite ? (bits + 0x1000) & ~0x1fffu : bits;
}

SIMT_DEVICE float exp2_approx(float x) { return exp2f(x); }
SIMT_DEVICE float reciprocal(float x) { return 1 / x; }

SIMT_DEVICE unsigned cluster_rank() { return simt::here.cluster_rank; }
SIMT_DEVICE unsigned cluster_size() { return simt::here.cluster_size; }
SIMT_DEVICE void cluster_arrive(SIMT_WHERE) { simt::cluster_arrive(where); }
SIMT_DEVICE void cluster_wait(SIMT_WHERE) { simt::cluster_wait(where); }
SIMT_DEVICE void cluster_sync(SIMT_WHERE) { simt::barrier(simt::Scope::kCluster, ~0u, where); }
template <typename T>
SIMT_DEVICE T* map_shared(T* shared, unsigned rank, SIMT_WHERE) {
  return static_cast<T*>(simt::map_shared(shared, rank, where));
}
SIMT_DEVICE void grid_sync(SIMT_WHERE) { simt::barrier(simt::Scope::kGrid, ~0u, where); }

}  // namespace iss
