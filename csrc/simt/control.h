// SPDX-License-Identifier: Apache-2.0
// What host files may ask of the emulation (cuda/device.h): small enough to include next to ATen.
#pragma once

#include "cuda/plan.h"

namespace iss::simt {

// The GPU that is pretended: an H100 with few multiprocessors, so that small cases fill it.
extern DeviceLimits device;

// Whether the streams pretend that a graph is captured: nothing may wait for the device.
extern bool capturing;

// Why this OS thread's last launch failed; empty when it did not.
const char* last_error();

}  // namespace iss::simt
