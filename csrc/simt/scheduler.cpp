// SPDX-License-Identifier: Apache-2.0
// Runs the threads of a launch: who is next, who waits, what a launch may ask for. And the controls
// that tests have (python_tests/simt).

#include "simt/scheduler.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <string_view>
#include <tuple>
#include <utility>

#include "simt/checker.h"

#ifndef SIMT_UCONTEXT
asm(R"(.text
.hidden iss_simt_switch
.globl iss_simt_switch
.type iss_simt_switch, @function
iss_simt_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size iss_simt_switch, . - iss_simt_switch
)");
#endif

namespace iss::simt {

constinit thread_local Coordinates here = {};
constinit thread_local Thread* current = nullptr;
DeviceLimits device = {.major = 9, .minor = 0, .multiprocessors = 8, .shared_bytes = 227 * 1024};
bool capturing = false;
std::mutex machine;

namespace {

enum {
  kInvalidValue = 1,
  kInvalidConfiguration = 9,
  kLaunchFailure = 719,
  kCooperativeLaunchTooLarge = 720
};

thread_local std::string error_text;
thread_local cudaError_t last_code = cudaSuccess;  // for cudaGetLastError

// Limits of a kernel on one device, as CUDA has them from the start.
struct KernelLimits {
  size_t dynamic_bytes = 48 * 1024;
  unsigned cluster = kPortableCluster;
};
int multiprocessors_left = device.multiprocessors;  // as the runtime counts them now
int device_index = 0;                               // each GPU that was ever pretended has its own
std::map<std::pair<const void*, int>, KernelLimits> kernel_limits;
int limits_set = 0;  // calls of cudaFuncSetAttribute

Settings settings;                         // of the next launch
std::vector<const void*> omitted;          // calls of synchronisation that are left out
std::map<const void*, const char*> calls;  // those that were made while recording
bool recording = false;
std::vector<char*> free_stacks;  // all of these: under `machine`

const char* name(Scope scope) {
  constexpr const char* kNames[] = {"a warp's barrier or shuffle", "__syncthreads", "cluster_sync",
                                    "grid_sync"};
  return kNames[static_cast<int>(scope)];
}

bool same(Where a, Where b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::string_view(a.file_name()) == b.file_name();
}

uint64_t offset_in_library(const void* pc) {
  Dl_info info;
  return dladdr(pc, &info) != 0 ? static_cast<const char*>(pc) - static_cast<char*>(info.dli_fbase)
                                : 0;
}

char* new_stack() {
  if (!free_stacks.empty()) {
    char* stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
  }
  void* stack = mmap(nullptr, Launch::kStack, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
  mprotect(stack, 4096, PROT_NONE);  // who overflows it stops there
  return static_cast<char*>(stack);
}

void enter_thread() {
  Launch& launch = *current->block->launch;
  launch.body(launch.argument);
  current->done = true;
  switch_context(current->context, launch.scheduler);
  abort();  // not resumed
}

}  // namespace

std::ostream& operator<<(std::ostream& out, Where where) {
  std::string_view file = where.file_name();
  return out << file.substr(file.rfind('/') + 1) << ":" << where.line();
}

std::ostream& operator<<(std::ostream& out, const Thread& thread) {
  const dim3 block = thread.block->id, id = thread.block->launch->position(thread.index);
  return out << "block (" << block.x << ", " << block.y << ", " << block.z << ") thread (" << id.x
             << ", " << id.y << ", " << id.z << ")";
}

bool left_out(const char* call, const void* pc) {
  if (recording) calls.insert({pc, call});
  return std::find(omitted.begin(), omitted.end(), pc) != omitted.end();
}

Launch::Launch(dim3 grid, dim3 block, size_t dynamic_bytes, bool cooperative, unsigned cluster,
               const Settings& settings)
    : grid(grid),
      block(block),
      block_count(grid.x * grid.y * grid.z),
      thread_count(block.x * block.y * block.z),
      dynamic_bytes(dynamic_bytes),
      cooperative(cooperative),
      cluster(cluster),
      settings(settings),
      blocks(block_count),
      static_end(2 * kRedZone + dynamic_bytes),
      random(settings.seed) {
  if (settings.check) checker::start(*this);
}

Launch::~Launch() {
  for (unsigned first = 0; first < block_count; first += cluster) end_cluster(first);
  if (settings.check) checker::end(*this);
}

void Launch::start_cluster(unsigned first) {
  for (unsigned rank = 0; rank < cluster; ++rank) {
    auto owned = std::make_unique<Block>();
    Block& b = *owned;
    b.launch = this;
    b.index = first + rank;
    b.rank = rank;
    b.id = {b.index % grid.x, b.index / grid.x % grid.y, b.index / grid.x / grid.y};
    b.alive = thread_count;
    b.warps.resize((thread_count + 31) / 32);
    b.shared = static_cast<char*>(std::aligned_alloc(1024, (shared_bytes() + 1023) / 1024 * 1024));
    poison(b.shared, shared_bytes());
    for (unsigned i = 0; i < thread_count; ++i) {
      Thread& t = *b.threads.emplace_back(std::make_unique<Thread>());
      t.block = &b;
      t.index = i;
      t.stack = new_stack();
      prepare(t.context, t.stack, kStack, enter_thread);
      ready.push_back(&t);
    }
    if (settings.check) checker::start_block(b);
    blocks[b.index] = std::move(owned);
    ++resident;
  }
}

void Launch::end_cluster(unsigned first) {
  if (!blocks[first]) return;
  for (unsigned rank = 0; rank < cluster; ++rank) {
    Block& b = *blocks[first + rank];
    if (settings.check) checker::end_block(b);
    for (const auto& thread : b.threads) free_stacks.push_back(thread->stack);
    std::free(b.shared);
    blocks[b.index] = nullptr;
    --resident;
  }
}

// Blocks come and threads go on in the order of the policy until all have ended, one has failed, or
// all wait.
void Launch::run(void (*body)(void*), void* argument) {
  this->body = body;
  this->argument = argument;
  std::vector<unsigned> unstarted;  // first blocks of clusters, the next one last
  for (unsigned first = 0; first < block_count; first += cluster) unstarted.push_back(first);
  if (settings.policy == Policy::kFifo) std::reverse(unstarted.begin(), unstarted.end());
  if (settings.policy == Policy::kRandom) std::shuffle(unstarted.begin(), unstarted.end(), random);
  const unsigned window = cooperative ? block_count : std::max(settings.window, cluster);
  while (error.empty()) {
    while (!unstarted.empty() && resident + cluster <= window) {
      start_cluster(unstarted.back());
      unstarted.pop_back();
    }
    if (ready.empty()) {
      if (resident > 0) fail(deadlock());
      break;
    }
    Thread& thread = next();
    resume(thread);
    if (thread.done) retire(thread);
  }
}

Thread& Launch::next() {
  Thread* thread;
  if (settings.policy == Policy::kRandom) std::swap(ready[random() % ready.size()], ready.back());
  if (settings.policy == Policy::kFifo) {
    thread = ready.front();
    ready.pop_front();
  } else {
    thread = ready.back();
    ready.pop_back();
  }
  return *thread;
}

void Launch::resume(Thread& thread) {
  const Block& b = *thread.block;
  here = {.thread = position(thread.index),
          .block = b.id,
          .block_dim = block,
          .grid_dim = grid,
          .lane = thread.index % 32,
          .cluster_rank = b.rank,
          .cluster_size = cluster};
  current = &thread;
  switch_context(scheduler, thread.context);
  current = nullptr;
}

void Launch::retire(Thread& thread) {
  spins = 0;
  bool copying = !thread.copies.empty();
  for (const auto& group : thread.committed) copying |= !group.empty();
  if (copying) fail("cp.async: ", thread, " ends with copies that it has not waited for");
  if (settings.check) checker::end_thread(thread);
  Block& b = *thread.block;
  if (--b.alive > 0) return;
  const unsigned first = b.index - b.rank;
  unsigned alive = 0;
  for (unsigned rank = 0; rank < cluster; ++rank) alive += blocks[first + rank]->alive;
  if (alive == 0) end_cluster(first);
}

std::string Launch::deadlock() const {
  struct Waiting {
    unsigned count = 0;
    const Thread* first;
  };
  std::map<std::string, Waiting> places;
  unsigned ended = 0;
  for (const auto& b : blocks) {
    if (!b) continue;
    for (const auto& t : b->threads) {
      if (t->done) {
        ++ended;
        continue;
      }
      std::ostringstream place;
      place << name(t->waits_for->scope) << " at " << t->where;
      Waiting& waiting = places[place.str()];
      if (waiting.count++ == 0) waiting.first = t.get();
    }
  }
  std::ostringstream message;
  message << "deadlock:";
  for (const auto& [place, waiting] : places)
    message << " " << waiting.count << " threads wait in " << place << ", the first "
            << *waiting.first << ";";
  message << " " << ended << " of their blocks' threads have ended";
  return message.str();
}

void Launch::arrive(Barrier& barrier, unsigned need, Where where, bool ordered) {
  spins = 0;
  if (barrier.arrived++ == 0)
    barrier.where = where;
  else if (!same(barrier.where, where))
    fail("divergent barrier: ", name(barrier.scope), " at ", where, " meets the one at ",
         barrier.where);
  if (ordered && settings.check) checker::arrive(barrier, *current);
  if (barrier.arrived < need) return;
  if (ordered && settings.check) checker::release(barrier);
  barrier.arrived = 0;
  ++barrier.phase;
  ready.insert(ready.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
}

void Launch::wait(Barrier& barrier, unsigned phase, Where where, bool ordered) {
  Thread& thread = *current;
  if (barrier.phase == phase) {
    barrier.waiting.push_back(&thread);
    thread.waits_for = &barrier;
    thread.where = where;
    switch_context(thread.context, scheduler);
    thread.waits_for = nullptr;
  }
  if (ordered && settings.check) checker::leave(barrier, thread);
}

void Launch::give_way() {
  Thread& thread = *current;
  if (settings.policy == Policy::kLifo)
    ready.push_front(&thread);
  else
    ready.push_back(&thread);
  switch_context(thread.context, scheduler);
}

namespace {

template <typename... Parts>
cudaError_t refuse(cudaError_t code, const Parts&... parts) {
  std::ostringstream what;
  (what << ... << parts);
  error_text = what.str();
  return last_code = code;
}

// The blocks that fit on one multiprocessor.
int blocks_each(const KernelLimits& limits, int threads, size_t shared_bytes) {
  const auto shared = static_cast<int64_t>(shared_bytes);
  if (threads < 1 || threads > 1024 || shared > device.shared_bytes ||
      shared_bytes > limits.dynamic_bytes)
    return 0;
  constexpr int64_t kReserved = 1024, kThreads = 2048, kBlocks = 32;
  return static_cast<int>(std::min({kThreads / ((threads + 31) / 32 * 32), kBlocks,
                                    (device.shared_bytes + kReserved) / (shared + kReserved)}));
}

// The blocks that fit on the device, all of whole clusters.
int resident_blocks(const KernelLimits& limits, int threads, size_t shared_bytes,
                    unsigned cluster) {
  if (cluster == 0 || cluster > limits.cluster || (cluster > 1 && device.major < 9)) return 0;
  const int all = blocks_each(limits, threads, shared_bytes) * multiprocessors_left;
  return all - all % static_cast<int>(cluster);
}

int threads_of(const cudaLaunchConfig_t& config) {
  return static_cast<int>(config.block.x * config.block.y * config.block.z);
}

unsigned cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension)
      return config.attrs[i].val.clusterDim.x;
  return 1;
}

bool is_cooperative(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeCooperative)
      return config.attrs[i].val.cooperative != 0;
  return false;
}

}  // namespace

cudaError_t count_blocks(int* count, const void* kernel, int threads, size_t shared_bytes) {
  const std::lock_guard lock(machine);
  *count = blocks_each(kernel_limits[{kernel, device_index}], threads, shared_bytes);
  return cudaSuccess;
}

cudaError_t count_clusters(int* count, const void* kernel, const cudaLaunchConfig_t& config) {
  const std::lock_guard lock(machine);
  const unsigned cluster = cluster_of(config);
  *count = resident_blocks(kernel_limits[{kernel, device_index}], threads_of(config),
                           config.shared_bytes, cluster) /
           static_cast<int>(cluster);
  return cudaSuccess;
}

cudaError_t run(const void* kernel, const cudaLaunchConfig_t& config, void (*body)(void*),
                void* argument) {
  const std::lock_guard lock(machine);
  const dim3 grid = config.grid;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const int threads = threads_of(config);
  const unsigned cluster = cluster_of(config);
  const int resident =
      resident_blocks(kernel_limits[{kernel, device_index}], threads, config.shared_bytes, cluster);
  error_text.clear();
  constexpr unsigned kMostAcross = 65535;  // along y and z
  if (blocks == 0 || resident == 0 || grid.x % cluster != 0 || grid.x > INT32_MAX ||
      grid.y > kMostAcross || grid.z > kMostAcross) {
    return refuse(kInvalidConfiguration, "invalid configuration: ", grid.x, " x ", grid.y, " x ",
                  grid.z, " blocks of ", threads, " threads and ", config.shared_bytes,
                  " bytes of shared memory, in clusters of ", cluster);
  }
  if (is_cooperative(config) && blocks > static_cast<uint64_t>(resident)) {
    return refuse(kCooperativeLaunchTooLarge, "cooperative launch too large: ", blocks,
                  " blocks, of which ", resident, " fit");
  }
  Launch launch(grid, config.block, config.shared_bytes, is_cooperative(config), cluster, settings);
  launch.run(body, argument);
  error_text = launch.error;
  return last_code = error_text.empty() ? 0 : kLaunchFailure;
}

const char* last_error() { return error_text.c_str(); }

}  // namespace iss::simt

cudaError_t cudaGetDevice(int* device) {
  const std::lock_guard lock(iss::simt::machine);
  *device = iss::simt::device_index;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(iss::simt::last_code, cudaSuccess); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const std::lock_guard lock(iss::simt::machine);
  *value = attribute == cudaDevAttrMultiProcessorCount
               ? iss::simt::multiprocessors_left
               : static_cast<int>(iss::simt::device.shared_bytes);
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard lock(iss::simt::machine);
  ++iss::simt::limits_set;
  auto& limits = iss::simt::kernel_limits[{kernel, iss::simt::device_index}];
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    limits.cluster = value != 0 ? iss::kLargestCluster : iss::kPortableCluster;
    return cudaSuccess;
  }
  if (value < 0 || value > iss::simt::device.shared_bytes)
    return iss::simt::refuse(iss::simt::kInvalidValue, "invalid value: ", value,
                             " bytes of shared memory");
  limits.dynamic_bytes = value;
  return cudaSuccess;
}

// What tests set and ask, through ctypes.
#define SIMT_CONTROL extern "C" __attribute__((visibility("default")))

SIMT_CONTROL void simt_configure(int policy, uint64_t seed, int check, unsigned preempt,
                                 unsigned window) {
  const std::lock_guard lock(iss::simt::machine);
  iss::simt::settings = {.policy = static_cast<iss::simt::Policy>(policy),
                         .seed = seed,
                         .check = check != 0,
                         .preempt = preempt,
                         .window = window};
}

// left: of its multiprocessors, those that the runtime now says there are.
SIMT_CONTROL void simt_pretend(int major, int minor, int multiprocessors, int64_t shared_bytes,
                               int left) {
  static std::map<std::tuple<int, int, int, int64_t>, int> indices;
  const std::lock_guard lock(iss::simt::machine);
  iss::simt::device = {major, minor, multiprocessors, shared_bytes};
  iss::simt::multiprocessors_left = left;
  const int next = static_cast<int>(indices.size()) + 1;
  iss::simt::device_index =
      indices.emplace(std::tuple(major, minor, multiprocessors, shared_bytes), next).first->second;
}

SIMT_CONTROL void simt_capture(int on) { iss::simt::capturing = on != 0; }

SIMT_CONTROL const char* simt_last_error() { return iss::simt::last_error(); }

// What the next cudaGetLastError would return; how often cudaFuncSetAttribute was called so far.
SIMT_CONTROL int simt_pending_error() { return iss::simt::last_code; }
SIMT_CONTROL int simt_limits_set() {
  const std::lock_guard lock(iss::simt::machine);
  return iss::simt::limits_set;
}

// For the mutation test: calls of synchronisation that were made since recording began, one a line,
// as "__syncthreads 0x1234", an offset in this library; and those that are made no more.
SIMT_CONTROL void simt_record_calls(int on) {
  const std::lock_guard lock(iss::simt::machine);
  iss::simt::recording = on != 0;
  if (on != 0) iss::simt::calls.clear();
}
SIMT_CONTROL const char* simt_calls() {
  thread_local std::string text;
  const std::lock_guard lock(iss::simt::machine);
  std::ostringstream out;
  for (const auto& [pc, call] : iss::simt::calls)
    out << call << " 0x" << std::hex << iss::simt::offset_in_library(pc) << "\n";
  text = out.str();
  return text.c_str();
}
SIMT_CONTROL void simt_leave_out(const uint64_t* offsets, size_t count) {
  const std::lock_guard lock(iss::simt::machine);
  iss::simt::omitted.clear();
  for (const auto& [pc, call] : iss::simt::calls)
    if (std::count(offsets, offsets + count, iss::simt::offset_in_library(pc)) > 0)
      iss::simt::omitted.push_back(pc);
}
