// SPDX-License-Identifier: Apache-2.0
// How many clusters a device holds at once: it tells of a kernel alone, so there is one to ask
// about. Each block takes a multiprocessor for itself, as those of a resident LSTM may.
#include "cuda/launches.h"
#include "cuda/tile.h"
#include "simt/simt.h"

namespace iss {
namespace {

__global__ void occupy() {}

}  // namespace

int resident_clusters(int blocks, int64_t shared_bytes) {
  return simt::resident_blocks(&occupy, max_threads(Math::kFloat32), shared_bytes, blocks) / blocks;
}

}  // namespace iss
