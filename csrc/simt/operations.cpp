// SPDX-License-Identifier: Apache-2.0
// What a kernel's threads do with each other and with memory (host.h): the twins of instructions.

#include <algorithm>
#include <utility>

#include "simt/checker.h"

namespace iss::simt {

namespace {

Launch& launch() { return *current->block->launch; }
bool checking() { return launch().settings.check; }

unsigned cluster_threads() { return launch().thread_count * launch().cluster; }
Barrier& cluster_barrier() {
  const Block& block = *current->block;
  return launch().blocks[block.index - block.rank]->cluster_barrier;
}

void meet(Barrier& barrier, unsigned need, Where where, bool ordered) {
  const unsigned phase = barrier.phase;
  launch().arrive(barrier, need, where, ordered);
  launch().wait(barrier, phase, where, ordered);
}

// Of the lanes of `mask` in this thread's warp.
Collective& collective(unsigned mask, Where where) {
  if ((mask >> here.lane & 1) == 0)
    launch().fail("wrong mask: lane ", here.lane, " is not in it, at ", where);
  return current->block->warps[current->index / 32][mask];
}

void meet(Collective& lanes, unsigned mask, Where where, bool ordered) {
  const unsigned threads = std::min(32u, launch().thread_count - current->index / 32 * 32);
  const unsigned exist = threads == 32 ? ~0u : (1u << threads) - 1;
  meet(lanes.barrier, __builtin_popcount(mask & exist), where, ordered);
}

// What the lanes of `mask` show each other. It stays until this lane's next two calls.
const char (&show(unsigned mask, const void* value, size_t bytes,
                  Where where))[32][Collective::kMaxBytes] {
  Collective& lanes = collective(mask, where);
  auto& values = lanes.values[lanes.barrier.phase % 2];
  if (bytes > Collective::kMaxBytes) launch().fail("a shuffle of more than 32 bytes at ", where);
  memcpy(values[here.lane], value, bytes);
  meet(lanes, mask, where, false);
  return values;
}

// Instructions that PTX calls .aligned: all lanes of the warp must execute them together. Those
// that went different ways do so again after __syncwarp or a barrier; before that, if the compiler
// likes.
void together(Where where) {
  if (!checking()) return;
  const auto& paths = show(~0u, &current->path, sizeof(current->path), where);
  const unsigned lanes = std::min(32u, launch().thread_count - current->index / 32 * 32);
  for (unsigned lane = 1; lane < lanes; ++lane)
    if (memcmp(paths[lane], paths[0], sizeof(current->path)) != 0)
      launch().fail("diverged: lanes came to ", where, " by different ways, without __syncwarp");
  current->path = 0;
}

}  // namespace

void barrier(Scope scope, unsigned mask, Where where) {
  constexpr const char* kCalls[] = {"__syncwarp", "__syncthreads", "cluster_sync", "grid_sync"};
  if (left_out(kCalls[static_cast<int>(scope)], __builtin_return_address(0))) return;
  Launch& l = launch();
  if (scope == Scope::kCluster) together(where);
  if (mask == ~0u) current->path = 0;
  switch (scope) {
    case Scope::kWarp:
      return meet(collective(mask, where), mask, where, true);
    case Scope::kBlock:
      return meet(current->block->barrier, l.thread_count, where, true);
    case Scope::kCluster:
      return meet(cluster_barrier(), cluster_threads(), where, true);
    case Scope::kGrid:
      if (!l.cooperative) l.fail("grid_sync in a launch that is not cooperative, at ", where);
      return meet(l.grid_barrier, l.thread_count * l.block_count, where, true);
  }
}

void cluster_arrive(Where where) {
  if (left_out("cluster_arrive", __builtin_return_address(0))) return;
  together(where);
  if (std::exchange(current->arrived_at_cluster, true))
    launch().fail("cluster_arrive without cluster_wait before it, at ", where);
  current->cluster_phase = cluster_barrier().phase;
  launch().arrive(cluster_barrier(), cluster_threads(), where, true);
}

void cluster_wait(Where where) {
  if (left_out("cluster_wait", __builtin_return_address(0))) return;
  together(where);
  if (!std::exchange(current->arrived_at_cluster, false))
    launch().fail("cluster_wait without cluster_arrive before it, at ", where);
  launch().wait(cluster_barrier(), current->cluster_phase, where, true);
}

void shuffle(unsigned mask, const void* value, unsigned source, void* result, size_t bytes,
             Where where) {
  const auto& values = show(mask, value, bytes, where);
  if ((mask >> source & 1) == 0)
    launch().fail("wrong mask: a shuffle reads lane ", source, ", which is not in it, at ", where);
  memcpy(result, values[source], bytes);
}

unsigned ballot(unsigned mask, bool predicate, Where where) {
  const auto& values = show(mask, &predicate, 1, where);
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) result |= (values[lane][0] != 0 ? 1u : 0u) << lane;
  return result;
}

void yield(Where where) {
  Launch& l = launch();
  if (++l.spins > 1000ull * l.thread_count * l.block_count + 10000)
    l.fail("deadlock: spinning at ", where, " while nothing else happens");
  l.give_way();
}

// Where order among threads is decided by chance, every atomic access is an opportunity.
void before_atomic(const void* address, size_t bytes, bool writes, bool ordered, Where where) {
  Launch& l = launch();
  if (l.settings.policy == Policy::kRandom) l.give_way();
  if (writes) l.spins = 0;
  if (!l.settings.check) return;
  checker::access(address, bytes, writes ? Access::kAtomicWrite : Access::kAtomicRead,
                  __builtin_return_address(0));
  if (ordered && !left_out(writes ? "add_release" : "load_acquire", __builtin_return_address(0))) {
    if (writes)
      checker::release(address, *current);
    else
      checker::acquire(address, *current);
  }
}

void read_through_l2(const void* from, void* to, size_t bytes) {
  if (checking()) checker::access(from, bytes, Access::kRead, __builtin_return_address(0));
  memcpy(to, from, bytes);
}

void read_only(const void* from, void* to, size_t bytes) {
  if (checking()) checker::access(from, bytes, Access::kReadOnly, __builtin_return_address(0));
  memcpy(to, from, bytes);
}

void copy(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }

void* static_shared(const void* id, size_t bytes) {
  Launch& l = launch();
  Block& block = *current->block;
  auto found = std::find_if(l.statics.begin(), l.statics.end(),
                            [&](const auto& declared) { return declared.first == id; });
  if (found == l.statics.end()) {
    const size_t offset = (l.static_end + 127) / 128 * 128;
    l.static_end = offset + bytes + Launch::kRedZone;
    l.static_bytes += bytes;
    if (l.static_end > l.shared_bytes() ||
        l.static_bytes + l.dynamic_bytes > static_cast<size_t>(device.shared_bytes))
      l.fail("shared memory: expected at most 48 KB of it static, and with the dynamic part ",
             device.shared_bytes, " bytes");
    found = l.statics.insert(found, {id, offset});
  }
  if (checking()) checker::declare_static(block, found->second, bytes);
  return block.shared + found->second;
}

void* dynamic_shared() { return current->block->shared + Launch::kRedZone; }

void* map_shared(const void* shared, unsigned rank, Where where) {
  const Block& block = *current->block;
  const size_t offset = static_cast<const char*>(shared) - block.shared;
  if (rank >= launch().cluster || offset >= launch().shared_bytes())
    launch().fail("map_shared: expected own shared memory and a rank of the cluster, got rank ",
                  rank, " at ", where);
  return launch().blocks[block.index - block.rank + rank]->shared + offset;
}

// The worst that hardware may do: data land as late as they can.
void cp_async16(void* shared, const void* global, Where where) {
  const void* pc = __builtin_return_address(0);
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16 != 0)
    launch().fail("misaligned: cp_async16 at ", where);
  if (checking()) {
    checker::access(global, 16, Access::kRead, pc);
    checker::access(shared, 16, Access::kCopyStarts, pc);
  }
  current->copies.push_back({shared, global, pc});
}

void cp_async_commit() {
  current->committed.push_back(std::move(current->copies));
  current->copies.clear();
}

void cp_async_wait(unsigned keep, Where where) {
  if (left_out("cp_async_wait", __builtin_return_address(0))) return;
  auto& groups = current->committed;
  for (; groups.size() > keep; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      if (checking()) {  // both ends must have been left alone all the while
        checker::access(copy.from, 16, Access::kRead, copy.pc);
        checker::access(copy.to, 16, Access::kWrite, copy.pc);
      }
      memcpy(copy.to, copy.from, 16);
    }
  }
}

void ldmatrix(uint32_t* r, unsigned count, const void* row, Where where) {
  const void* pc = __builtin_return_address(0);
  together(where);
  if (here.lane < 8 * count && reinterpret_cast<uintptr_t>(row) % 16 != 0)
    launch().fail("misaligned: a row of ldmatrix at ", where);
  const auto& rows = show(~0u, &row, sizeof(row), where);
  for (unsigned matrix = 0; matrix < count; ++matrix) {
    const char* word;
    memcpy(&word, rows[8 * matrix + here.lane / 4], sizeof(word));
    word += 4 * (here.lane % 4);
    if (checking()) checker::access(word, 4, Access::kRead, pc);
    memcpy(&r[matrix], word, 4);
  }
}

namespace {

float widen(uint16_t bits, Elements elements) {
  if (elements == Elements::kBfloat16)
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
  const bool finite = (bits & 0x7c00) != 0x7c00;
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13 | (finite ? 0 : 0x7f800000);
  const float value =
      __builtin_bit_cast(float, magnitude) * (finite ? 0x1p112f : 1);  // their biases
  return bits >> 15 ? -value : value;
}

// The 1 or 2 elements of a register; tensor cores drop what TF32 has no bits for.
struct Pair {
  float low, high;
  Pair(uint32_t bits, Elements elements)
      : low(elements == Elements::kTf32 ? __builtin_bit_cast(float, bits & ~0x1fffu)
                                        : widen(static_cast<uint16_t>(bits), elements)),
        high(elements == Elements::kTf32 ? 0 : widen(bits >> 16, elements)) {}
};

}  // namespace

// A register holds 1 or 2 neighbours along K, and a row of K is 8 registers: 4 of neighbouring
// lanes, then the next 4 of the same lanes.
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Elements elements,
         Where where) {
  together(where);
  uint32_t registers[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto& all = show(~0u, registers, sizeof(registers), where);
  const auto element = [&](unsigned lane, unsigned i) {
    uint32_t bits;
    memcpy(&bits, &all[lane][4 * i], 4);
    return Pair(bits, elements);
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned lower = i / 2, column = here.lane % 4 * 2 + i % 2;  // row: lane / 4 + 8 lower
    for (unsigned k = 0; k < 8; ++k) {
      const Pair x = element(here.lane / 4 * 4 + k % 4, lower + k / 4 * 2);
      const Pair y = element(column * 4 + k % 4, 4 + k / 4);
      d[i] += x.low * y.low;
      d[i] += x.high * y.high;
    }
  }
}

}  // namespace iss::simt
