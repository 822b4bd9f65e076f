// SPDX-License-Identifier: Apache-2.0
// How host code launches kernels and asks how many blocks fit, in the names of CUDA's runtime: for
// g++ these are host.h's, so that an emulated launch takes the same steps.
#pragma once

#include <mutex>
#include <set>
#include <tuple>
#include <type_traits>

namespace iss::simt {

// Raises a limit of a kernel as far as the current device lets it, the first time that it is asked
// for. A limit holds for every launch of the kernel: set to what one launch needs, it would be too
// low for a larger one that another thread is about to make, or that a graph replays.
SIMT_UNCHECKED inline cudaError_t raise_limit(const void* kernel, cudaFuncAttribute limit) {
  static std::mutex mutex;
  static std::set<std::tuple<const void*, int, cudaFuncAttribute>> raised;
  int device = 0, value = 1;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard lock(mutex);
  if (raised.contains({kernel, device, limit})) return cudaSuccess;
  if (limit == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    cudaFuncAttributes attributes = {};
    error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    value -= static_cast<int>(attributes.sharedSizeBytes);
  }
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, limit, value);
  if (error == cudaSuccess) raised.insert({kernel, device, limit});
  return error;
}

// Lets a kernel use more than 48 KB of shared memory and more than 8 blocks in a cluster.
inline cudaError_t allow(const void* kernel, size_t shared_bytes, unsigned cluster) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024)
    error = raise_limit(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize);
  if (error == cudaSuccess && cluster > 8)
    error = raise_limit(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed);
  return error;
}

inline cudaLaunchAttribute clusters_of(unsigned blocks) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = blocks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

// One way to launch: plain, cooperative (all blocks resident, grid_sync allowed), or in clusters of
// `cluster` > 1 consecutive blocks along x.
template <typename... P>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, bool cooperative, unsigned cluster,
                   std::type_identity_t<P>... args) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {grid, block, shared_bytes, stream, attributes, 0};
  if (cooperative) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  if (cluster > 1) attributes[config.numAttrs++] = clusters_of(cluster);
  cudaError_t error = allow(reinterpret_cast<const void*>(kernel), shared_bytes, cluster);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error != cudaSuccess) cudaGetLastError();  // it is returned: no error of the next launch
  return error;
}

// How many blocks of `kernel` the current device holds at once; 0 where it cannot run one.
template <typename... P>
int resident_blocks(void (*kernel)(P...), int threads, size_t shared_bytes, unsigned cluster) {
  int device = 0, processors = 0, count = 0;
  bool ok = allow(reinterpret_cast<const void*>(kernel), shared_bytes, cluster) == cudaSuccess &&
            cudaGetDevice(&device) == cudaSuccess;
  if (ok && cluster > 1) {
    cudaLaunchAttribute attribute = clusters_of(cluster);
    const cudaLaunchConfig_t config = {dim3(cluster), dim3(threads), shared_bytes,
                                       nullptr,       &attribute,    1};
    ok = cudaOccupancyMaxActiveClusters(&count, kernel, &config) == cudaSuccess;
    count *= static_cast<int>(cluster);
  } else if (ok) {
    ok = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) ==
             cudaSuccess &&
         cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, shared_bytes) ==
             cudaSuccess;
    count *= processors;
  }
  if (!ok) cudaGetLastError();  // asking is no error of the next launch
  return ok ? count : 0;
}

}  // namespace iss::simt
