// SPDX-License-Identifier: Apache-2.0
// The namespace that ops register in, and the device whose tensors the CUDA host files take. In the
// tests' emulated build (SIMT_HOST, csrc/simt) the same files make ops of CPU tensors, in a
// namespace of their own.
#pragma once

#ifdef SIMT_HOST
#ifndef ISS_NAMESPACE  // the checked build has another
#define ISS_NAMESPACE iss_kernels_simt
#endif
#define ISS_DEVICE CPU
#else
#define ISS_NAMESPACE iss_kernels
#define ISS_DEVICE CUDA
#endif
