// SPDX-License-Identifier: Apache-2.0
// What a host file asks of the device: which one, its stream, its limits, whether a launch worked;
// and the dtypes of its kernels.
// Emulated (SIMT_HOST), the device is a pretended one that a test may change.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <map>
#include <mutex>
#include <optional>
#include <string>

#include "cuda/launches.h"
#include "cuda/plan.h"
#include "library.h"
#include "types.h"

#ifdef SIMT_HOST
#include "simt/control.h"
#else
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace iss {

// What the kernels call a dtype of torch.
template <typename scalar_t>
struct KernelTypeOf {
  using type = scalar_t;
};
template <>
struct KernelTypeOf<at::BFloat16> {
  using type = Bfloat16;
};
template <>
struct KernelTypeOf<at::Half> {
  using type = Float16;
};
template <typename scalar_t>
using KernelType = typename KernelTypeOf<scalar_t>::type;

// With scalar_t for each dtype that there are kernels for.
#define ISS_DISPATCH(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, TYPE, NAME, __VA_ARGS__)

#ifdef SIMT_HOST

struct DeviceGuard {
  explicit DeviceGuard(const at::Device&) {}
};
inline CudaStream current_stream(const at::Tensor&) { return nullptr; }
inline bool is_capturing() { return simt::capturing; }
inline DeviceLimits device_limits(const at::Device&) { return simt::device; }
inline std::string launch_error(int) { return simt::last_error(); }

#else

using DeviceGuard = c10::cuda::CUDAGuard;

inline CudaStream current_stream(const at::Tensor& t) {
  return c10::cuda::getCurrentCUDAStream(t.device().index()).stream();
}

// Whether the current stream of the current device is recorded for a graph: nothing may wait for
// it.
inline bool is_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

// For tests: a device taken for a lesser one, so that every plan runs on any.
inline std::optional<DeviceLimits>& pretended_device() {
  static std::optional<DeviceLimits> limits;
  return limits;
}

inline DeviceLimits ask_for_limits(const at::Device& device) {
  const DeviceGuard guard(device);
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device.index());
    TORCH_CHECK(error == cudaSuccess, "iss_kernels: expected ", device, " to tell its limits, got ",
                cudaGetErrorString(error));
    return value;
  };
  DeviceLimits limits = {.major = ask(cudaDevAttrComputeCapabilityMajor),
                         .minor = ask(cudaDevAttrComputeCapabilityMinor),
                         .multiprocessors = ask(cudaDevAttrMultiProcessorCount),
                         .shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  for (size_t n = 2; limits.major >= 9 && n <= limits.clusters.size(); ++n)
    limits.clusters[n - 1] = resident_clusters(static_cast<int>(n), limits.shared_bytes);
  return limits;
}

// Asked once for each device, which has an index. Where the device has been partitioned since (by
// MPS; MIG asks for a device that no process uses), they say too much: what must be resident at
// once is asked of the runtime again before each launch (can_launch, resident_blocks), and another
// plan or a smaller grid is taken.
inline DeviceLimits device_limits(const at::Device& device) {
  if (pretended_device()) return *pretended_device();
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  const std::lock_guard lock(mutex);
  auto found = known.find(device.index());
  if (found == known.end()) found = known.emplace(device.index(), ask_for_limits(device)).first;
  return found->second;
}

inline std::string launch_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

#endif

// Of what a launch_...() returned.
inline void check_launch(const char* op, int code) {
  TORCH_CHECK(code == 0, op, ": expected the kernel to start, got ", launch_error(code));
}

// Host memory to the device of `like`, without waiting for the device.
inline at::Tensor to_device(const at::Tensor& host, const at::Tensor& like) {
  TORCH_CHECK(!is_capturing(),
              "iss_kernels: expected padded sequences in a CUDA graph, got batch_sizes, which a "
              "replay would copy again from host memory that is gone");
#ifdef SIMT_HOST
  return host;
#else
  return host.pin_memory().to(like.device(), /*non_blocking=*/true);
#endif
}

}  // namespace iss
