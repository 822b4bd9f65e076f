// SPDX-License-Identifier: Apache-2.0
// What the scheduler and the checker share: the threads, blocks and barriers of a launch.
//
// All threads of a launch run on the OS thread that launched them, one at a time, until they wait:
// a run is the same every time, and its order is a setting. Launches of several OS threads come one
// after the other.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "simt/context.h"
#include "simt/host.h"

namespace iss::simt {

struct Knowledge;  // vector clocks: checker.h
using KnowledgePtr = std::shared_ptr<const Knowledge>;

struct Launch;
struct Block;
struct Thread;

// A thread's clock as it arrived at a barrier, and what it knew of other threads' then.
struct Arrival {
  const Thread* thread;
  uint32_t clock;
  KnowledgePtr known;
};

struct Barrier {
  Scope scope;
  unsigned arrived = 0, phase = 0;
  Where where = {};  // the place of this phase's first arrival
  std::vector<Thread*> waiting = {};
  std::vector<Arrival> arrivals = {};  // of this phase, in a checked launch
  KnowledgePtr released = {};          // of the last phase
};

// A barrier of the lanes of one mask, and what they show each other: two sets, for a lane may be
// one phase ahead of another.
struct Collective {
  static constexpr size_t kMaxBytes = 32;
  Barrier barrier{.scope = Scope::kWarp};
  alignas(16) char values[2][32][kMaxBytes];
};

struct Copy {
  void* to;
  const void* from;
  const void* pc;
};

struct Thread {
  Block* block;
  unsigned index;  // in the block
  char* stack;
  Context context;
  bool done = false;
  const Barrier* waits_for = nullptr;
  Where where;                      // it waits
  bool arrived_at_cluster = false;  // since its last wait there
  unsigned cluster_phase;
  // The way through the code since the warp was last together, in a checked launch.
  uint64_t path = 0;
  std::vector<Copy> copies;                 // cp.async not yet committed
  std::deque<std::vector<Copy>> committed;  // groups under way
  // Vector clocks, in a checked launch.
  uint32_t id, clock = 1;
  KnowledgePtr known, known_at_arrival, acquired;
};

struct Block {
  Launch* launch;
  unsigned index, rank;  // in the grid, in the cluster
  dim3 id;
  std::vector<std::unique_ptr<Thread>> threads;
  unsigned alive;
  char* shared;  // dynamic shared memory and then static, between red zones
  Barrier barrier{.scope = Scope::kBlock}, cluster_barrier{.scope = Scope::kCluster};
  std::vector<std::map<unsigned, Collective>> warps;
  // Last accesses of other blocks to this one's shared memory, by thread; what its ended threads
  // knew.
  std::map<uint32_t, std::pair<uint32_t, const void*>> remote;
  KnowledgePtr known_at_exit;
};

enum class Policy { kFifo, kLifo, kRandom };

struct Settings {
  Policy policy = Policy::kFifo;
  uint64_t seed = 0;
  bool check = false;
  unsigned preempt = 0;  // checked: give way at one memory access in so many; 0: never
  unsigned window = 4;   // blocks of a plain launch that are there at once
};

extern constinit thread_local Thread* current;  // nullptr outside kernels

// A place of the source that calls into the scheduler; a call or access in the compiled code.
std::ostream& operator<<(std::ostream& out, Where where);
struct Pc {
  const void* address;
};
std::ostream& operator<<(std::ostream& out, Pc pc);
std::ostream& operator<<(std::ostream& out,
                         const Thread& thread);  // "block (0, 0, 0) thread (5, 0, 0)"

struct Launch {
  static constexpr size_t kRedZone = 256, kMaxStatic = 48 * 1024, kStack = 128 * 1024;

  Launch(dim3 grid, dim3 block, size_t dynamic_bytes, bool cooperative, unsigned cluster,
         const Settings& settings);
  ~Launch();
  void run(void (*body)(void*), void* argument);
  // Ends the launch. Called by one of its threads it does not return: the thread is left as it is.
  template <typename... Parts>
  void fail(const Parts&... parts) {
    if (error.empty()) {
      std::ostringstream what;
      (what << ... << parts);
      if (current != nullptr) what << " [" << *current << "]";
      error = what.str();
    }
    if (current != nullptr) switch_context(current->context, scheduler);
  }

  dim3 position(unsigned thread) const {
    return {thread % block.x, thread / block.x % block.y, thread / block.x / block.y};
  }
  size_t shared_bytes() const { return 2 * kRedZone + dynamic_bytes + kMaxStatic; }
  void arrive(Barrier& barrier, unsigned need, Where where, bool ordered);
  void wait(Barrier& barrier, unsigned phase, Where where, bool ordered);
  void give_way();

  const dim3 grid, block;
  const unsigned block_count, thread_count;  // of the grid, of a block
  const size_t dynamic_bytes;
  const bool cooperative;
  const unsigned cluster;
  const Settings settings;
  std::string error;
  std::vector<std::unique_ptr<Block>> blocks;           // by index; nullptr before and after
  std::vector<std::pair<const void*, size_t>> statics;  // id, offset in Block::shared
  size_t static_end, static_bytes = 0;
  Barrier grid_barrier{.scope = Scope::kGrid};
  std::mt19937_64 random;
  uint64_t spins = 0;  // since a thread last did anything but spin
  Context scheduler;
  void (*body)(void*);
  void* argument;

 private:
  void start_cluster(unsigned first);
  void end_cluster(unsigned first);
  void resume(Thread& thread);
  void retire(Thread& thread);
  Thread& next();
  std::string deadlock() const;

  std::deque<Thread*> ready;
  unsigned resident = 0;  // blocks
};

// Whether a test wants this call of synchronisation not to happen. Calls are told apart by the
// address that they return to: a function that is inlined in several places has as many.
bool left_out(const char* call, const void* pc);

// Held by a launch, and to change what memory or settings it would see.
extern std::mutex machine;

}  // namespace iss::simt
