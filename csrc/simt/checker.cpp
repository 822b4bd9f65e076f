// SPDX-License-Identifier: Apache-2.0
// The checker (checker.h), and the answers to what -fsanitize=thread,alignment and
// -fsanitize-coverage=trace-pc have the compiler call.
//
// Every 2 bytes of memory that a kernel touches have a Cell with their last write and the reads
// since. 2: neighbouring 16-bit elements may belong to different threads.

#include "simt/checker.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <tuple>
#include <unordered_map>

namespace iss::simt {

namespace {

constexpr size_t kGranule = 2;

// Who did it, and what its clock was; clock 0: nobody.
struct Event {
  uint32_t thread = 0;  // Thread::id
  uint32_t clock : 30 = 0;
  uint32_t atomic : 1 = 0, write : 1 = 0;

  // Of events with the same source the last tells all.
  std::tuple<uint32_t, bool, bool> source() const { return {thread, atomic, write}; }
};

// kHost: of memory that host code may have written; of shared memory: not part of any array.
enum class State : uint8_t { kHost, kUnwritten, kInFlight, kWritten };

struct Cell {
  Event write, read;
  const void* write_pc;
  std::vector<Event>* others;  // reads that `read` does not come after, atomic writes alike
  uint32_t launch;             // that the events belong to; older ones are as good as none
  State state;
  bool other_writes;  // among `others`
  bool read_only;     // somebody relied on it
};

struct Region {
  char *begin, *end;
  Block* block;  // whose shared memory it is, or nullptr
  Cell* cells = nullptr;

  Cell& cell(const char* at) {
    if (cells == nullptr)  // from calloc: pages that nobody touches cost nothing
      cells = static_cast<Cell*>(std::calloc((end - begin) / kGranule + 1, sizeof(Cell)));
    return cells[(at - begin) / kGranule];
  }
};

// All of it under `machine`.
std::map<const char*, Region> regions;  // by begin
Region* last_region = nullptr;          // of a lookup
uint32_t launches = 0;
KnowledgePtr nothing;
std::unordered_map<const void*, KnowledgePtr> flags;  // what each flag's releases published
std::deque<std::vector<Event>> event_sets;            // Cell::others of this launch
std::minstd_rand preemption;

constexpr unsigned kThreadBits = 10;
unsigned block_of(uint32_t id) { return id >> kThreadBits; }
unsigned index_of(uint32_t id) { return id & ((1u << kThreadBits) - 1); }

bool knows(const Knowledge& knowledge, uint32_t thread, uint32_t clock) {
  const Clocks* clocks = knowledge.blocks[block_of(thread)].get();
  return clocks != nullptr && (*clocks)[index_of(thread)] >= clock;
}

bool is_before(Event event, const Thread& thread) {
  return event.clock == 0 || event.thread == thread.id ||
         knows(*thread.known, event.thread, event.clock);
}

// What either knows; one of the two themselves where the other adds nothing.
KnowledgePtr merge(const KnowledgePtr& a, const KnowledgePtr& b) {
  if (a == b) return a;
  std::shared_ptr<Knowledge> merged;
  for (size_t i = 0; i < a->blocks.size(); ++i) {
    const auto &mine = a->blocks[i], &theirs = b->blocks[i];
    if (mine == theirs || theirs == nullptr) continue;
    std::shared_ptr<const Clocks> both = theirs;
    if (mine != nullptr) {
      auto maxima = std::make_shared<Clocks>(*mine);
      for (size_t k = 0; k < maxima->size(); ++k) (*maxima)[k] = std::max((*mine)[k], (*theirs)[k]);
      if (*maxima == *mine) continue;
      both = std::move(maxima);
    }
    if (merged == nullptr) merged = std::make_shared<Knowledge>(*a);
    merged->blocks[i] = std::move(both);
  }
  return merged != nullptr ? merged : a;
}

// `known`, and how far these threads themselves had come.
KnowledgePtr with_own(const KnowledgePtr& known, const Arrival* arrivals, size_t count) {
  auto knowledge = std::make_shared<Knowledge>(*known);
  std::map<unsigned, std::shared_ptr<Clocks>> changed;
  for (size_t i = 0; i < count; ++i) {
    const Block& block = *arrivals[i].thread->block;
    auto& clocks = changed[block.index];
    if (clocks == nullptr) {
      const auto& before = known->blocks[block.index];
      clocks = before != nullptr ? std::make_shared<Clocks>(*before)
                                 : std::make_shared<Clocks>(block.threads.size());
    }
    (*clocks)[arrivals[i].thread->index] = arrivals[i].clock;
  }
  for (auto& [block, clocks] : changed) knowledge->blocks[block] = std::move(clocks);
  return knowledge;
}

struct Described {
  Region& region;
  const char* at;
};
std::ostream& operator<<(std::ostream& out, const Described& d) {
  if (d.region.block == nullptr)
    return out << "byte " << d.at - d.region.begin << " of a tensor of "
               << d.region.end - d.region.begin;
  const Launch& launch = *d.region.block->launch;
  const auto offset = static_cast<size_t>(d.at - d.region.begin);
  const size_t dynamic = offset - Launch::kRedZone;
  if (offset < Launch::kRedZone * 3 / 2 + launch.dynamic_bytes)
    return out << "byte " << static_cast<ptrdiff_t>(dynamic) << " of " << launch.dynamic_bytes
               << " of the dynamic shared memory of block " << d.region.block->index;
  return out << "static shared memory of block " << d.region.block->index << " (byte "
             << offset - launch.dynamic_bytes - 2 * Launch::kRedZone << ")";
}

struct Doer {
  Event event;
};
std::ostream& operator<<(std::ostream& out, Doer doer) {
  return out << "thread " << index_of(doer.event.thread) << " of block "
             << block_of(doer.event.thread);
}

Region* find_region(const char* at) {
  if (last_region != nullptr && at >= last_region->begin && at < last_region->end)
    return last_region;
  auto after = regions.upper_bound(at);
  if (after == regions.begin()) return nullptr;
  Region& region = std::prev(after)->second;
  return at < region.end ? last_region = &region : nullptr;
}

// Whose guard an address is in, or nullptr.
Region* find_guarded(const char* at) {
  auto after = regions.upper_bound(at);
  if (after != regions.end() && after->second.begin - at <= ptrdiff_t{Launch::kRedZone})
    return &after->second;
  if (after == regions.begin()) return nullptr;
  Region& region = std::prev(after)->second;
  return at - region.end < ptrdiff_t{Launch::kRedZone} ? &region : nullptr;
}

bool is_poison(const char* at, size_t bytes) {
  const char* begin = at - reinterpret_cast<uintptr_t>(at) % kGranule;
  for (uint16_t value; begin < at + bytes; begin += kGranule) {
    memcpy(&value, begin, sizeof(value));
    if (value != kPoison) return false;
  }
  return true;
}

// One access in the making: what it is to its cells.
struct Check {
  Launch& launch;
  Thread& thread;
  Region& region;
  const char* at;
  size_t bytes;
  Access kind;
  const void* pc;

  bool writes() const {
    return kind == Access::kWrite || kind == Access::kAtomicWrite || kind == Access::kCopyStarts;
  }
  bool atomic() const { return kind == Access::kAtomicRead || kind == Access::kAtomicWrite; }
  bool reads() const { return kind != Access::kWrite && kind != Access::kCopyStarts; }
  const char* verb() const { return writes() ? "write" : "read"; }
  Described place() const { return {region, at}; }

  void out_of_bounds() const {
    launch.fail("out of bounds: ", verb(), " of ", bytes, " bytes at ", place(), ", at ", Pc{pc});
  }

  // Shared memory of another block: it must have started and must not have ended.
  void remote() {
    Block& owner = *region.block;
    if (thread.known->blocks[owner.index] == nullptr)
      launch.fail("shared memory of block ", owner.index,
                  " touched before its block is known to have started, at ", Pc{pc});
    if (owner.alive == 0)
      launch.fail("shared memory of block ", owner.index, " touched after its block has ended, at ",
                  Pc{pc});
    owner.remote[thread.id] = {thread.clock, pc};
  }

  void cell(Cell& c) {
    if (c.launch != launches) {
      c.launch = launches;
      c.write = c.read = {};
      c.others = nullptr;
      c.other_writes = c.read_only = false;
    }
    if (c.state == State::kHost && region.block != nullptr) out_of_bounds();
    if (conflicts(c.write))
      launch.fail("race: ", verb(), " of ", place(), " at ", Pc{pc}, ", and a write by ",
                  Doer{c.write}, " at ", Pc{c.write_pc});
    if (c.other_writes)
      for (Event e : *c.others)
        if (e.write && conflicts(e)) race(e);
    if (reads()) read(c);
    if (writes()) write(c);
  }

  void race(Event event) const {
    launch.fail("race: ", verb(), " of ", place(), " at ", Pc{pc}, ", and a ",
                event.write ? "write by " : "read by ", Doer{event});
  }
  bool conflicts(Event event) const {
    return !(event.atomic && atomic()) && !is_before(event, thread);
  }
  Event event() const { return {thread.id, thread.clock, atomic(), writes()}; }

  void read(Cell& c) {
    if (c.state == State::kInFlight)
      launch.fail("in flight: read of ", place(), " before the cp.async at ", Pc{c.write_pc},
                  " has been waited for, at ", Pc{pc});
    if (c.state == State::kUnwritten)
      launch.fail("uninitialised: read of ", place(), ", which nobody has written, at ", Pc{pc});
    if (kind == Access::kReadOnly) {
      if (c.write.clock != 0)
        launch.fail("__ldg of ", place(), ", which this launch writes at ", Pc{c.write_pc}, ", at ",
                    Pc{pc});
      c.read_only = true;
    }
    if (writes()) return;  // what conflicts with it is the write
    if (!is_covered(c.read)) keep(c, c.read);
    c.read = event();
  }

  // Whether an earlier event can be forgotten: who comes after this one comes after both, unless it
  // is an atomic access, which need not come after this one.
  bool is_covered(Event earlier) const {
    return is_before(earlier, thread) && (earlier.atomic || earlier.clock == 0 || !atomic());
  }

  void keep(Cell& c, Event event) {
    if (c.others == nullptr) c.others = &event_sets.emplace_back();
    c.others->push_back(event);
    c.other_writes |= event.write;
    const size_t size = c.others->size();
    if (size < 32 || (size & (size - 1)) != 0) return;  // now and then, drop what tells nothing
    std::sort(c.others->begin(), c.others->end(), [](Event a, Event b) {
      return a.source() != b.source() ? a.source() < b.source() : a.clock > b.clock;
    });
    const auto alike = [](Event a, Event b) { return a.source() == b.source(); };
    c.others->erase(std::unique(c.others->begin(), c.others->end(), alike), c.others->end());
    std::erase_if(*c.others, [&](Event e) { return is_covered(e); });
  }

  void write(Cell& c) {
    if (conflicts(c.read)) race(c.read);
    if (c.others != nullptr)
      for (Event e : *c.others)
        if (conflicts(e)) race(e);
    if (c.read_only)
      launch.fail("write of ", place(), ", which this launch reads by __ldg, at ", Pc{pc});
    if (!atomic()) {  // it comes after all there was
      c.others = nullptr;
      c.other_writes = false;
    } else {
      for (Event e : {c.read, c.write})
        if (!is_covered(e)) keep(c, e);
    }
    c.read = {};
    c.write = event();
    c.write_pc = pc;
    c.state = kind == Access::kCopyStarts ? State::kInFlight : State::kWritten;
  }
};

// Stack, thread-local variables, constants: nobody else's, or never written.
bool is_private(const char* at, const Thread& thread) {
  Dl_info info;
  return (at >= thread.stack && at < thread.stack + Launch::kStack) ||
         (at >= reinterpret_cast<char*>(&here) && at < reinterpret_cast<char*>(&here + 1)) ||
         dladdr(at, &info) != 0;
}

}  // namespace

std::ostream& operator<<(std::ostream& out, Pc pc) {
  Dl_info info;
  if (dladdr(pc.address, &info) == 0) return out << "an unknown place";
  // The call comes before the address that it returns to.
  const auto offset = static_cast<const char*>(pc.address) - 1 - static_cast<char*>(info.dli_fbase);
  char line[512];
  snprintf(line, sizeof(line), "addr2line -s -i -e '%s' 0x%zx 2>&1", info.dli_fname,
           static_cast<size_t>(offset));
  FILE* pipe = popen(line, "r");
  if (pipe == nullptr) return out << "an unknown place";
  const char* separator = "";  // inlined functions come first, their callers follow
  while (fgets(line, sizeof(line), pipe) != nullptr) {
    line[strcspn(line, " \n")] = 0;
    if (strncmp(line, "host.h:", 7) == 0) continue;
    out << separator << line;
    separator = " called at ";
  }
  pclose(pipe);
  return out;
}

void poison(void* begin, size_t bytes) {
  auto* values = static_cast<uint16_t*>(begin);
  std::fill(values, values + bytes / sizeof(kPoison), kPoison);
  memcpy(values + bytes / sizeof(kPoison), &kPoison, bytes % sizeof(kPoison));
}

namespace checker {

void start(Launch& launch) {
  ++launches;
  nothing = std::make_shared<Knowledge>(
      Knowledge{.blocks = std::vector<std::shared_ptr<const Clocks>>(launch.block_count)});
  preemption.seed(static_cast<uint32_t>(launch.settings.seed + 1));
}

void end(Launch&) {
  nothing = nullptr;
  flags.clear();
  event_sets.clear();
}

void start_block(Block& block) {
  Launch& launch = *block.launch;
  char* begin = block.shared;
  Region& region =
      regions[begin] = {.begin = begin, .end = begin + launch.shared_bytes(), .block = &block};
  for (size_t i = 0; i < launch.dynamic_bytes; i += kGranule)
    region.cell(begin + Launch::kRedZone + i).state = State::kUnwritten;
  for (const auto& thread : block.threads) {
    thread->id = block.index << kThreadBits | thread->index;
    thread->known = nothing;
  }
  block.known_at_exit = nothing;
}

void end_block(Block& block) { remove_memory(block.shared); }

void end_thread(Thread& thread) {
  Block& block = *thread.block;
  block.known_at_exit = merge(block.known_at_exit, thread.known);
  if (block.alive > 1) return;
  for (const auto& [id, access] : block.remote)
    if (!knows(*block.known_at_exit, id, access.first))
      block.launch->fail("shared memory of block ", block.index, " may have ended before ",
                         Doer{{.thread = id}}, " touches it at ", Pc{access.second});
}

void declare_static(Block& block, size_t offset, size_t bytes) {
  Region& region = regions[block.shared];
  char* begin = block.shared + offset;
  if (region.cell(begin).state != State::kHost) return;
  for (size_t i = 0; i < bytes; i += kGranule) region.cell(begin + i).state = State::kUnwritten;
}

void access(const void* address, size_t bytes, Access kind, const void* pc) {
  Thread& thread = *current;
  Launch& launch = *thread.block->launch;
  const auto* at = static_cast<const char*>(address);
  if (at >= thread.stack && at < thread.stack + Launch::kStack) return;
  Region* region = find_region(at);
  if (region == nullptr) {
    if (is_private(at, thread)) return;
    if (Region* guarded = find_guarded(at); guarded != nullptr)
      Check{launch, thread, *guarded, at, bytes, kind, pc}.out_of_bounds();
    launch.fail("out of bounds: access of ", bytes, " bytes at ", address,
                ", which is no tensor's memory, at ", Pc{pc});
  }
  if (launch.settings.preempt != 0 && preemption() % launch.settings.preempt == 0) {
    launch.give_way();
    region = find_region(at);
  }
  Check check{launch, thread, *region, at, bytes, kind, pc};
  if (at + bytes > region->end) check.out_of_bounds();
  if (region->block != nullptr && region->block != thread.block) check.remote();
  if (check.reads() && region->block == nullptr && region->cell(at).state == State::kHost &&
      is_poison(at, bytes))
    launch.fail("uninitialised: read of ", check.place(), ", which nobody has written, at ",
                Pc{pc});
  for (size_t i = 0; i < bytes; i += kGranule) check.cell(region->cell(at + i));
}

void acquire(const void* flag, Thread& thread) {
  const auto found = flags.find(flag);
  if (found == flags.end() || thread.acquired == found->second) return;
  thread.acquired = found->second;
  thread.known = merge(thread.known, found->second);
}

void release(const void* flag, Thread& thread) {
  const Arrival own{&thread, thread.clock++, thread.known};
  KnowledgePtr& published = flags[flag];
  const KnowledgePtr mine = with_own(thread.known, &own, 1);
  published = published != nullptr ? merge(published, mine) : mine;
}

void arrive(Barrier& barrier, Thread& thread) {
  barrier.arrivals.push_back({&thread, thread.clock++, thread.known});
  thread.known_at_arrival = thread.known;
}

void release(Barrier& barrier) {
  KnowledgePtr all = barrier.arrivals.front().known;
  const Knowledge* merged = all.get();
  for (const Arrival& arrival : barrier.arrivals)
    if (arrival.known.get() != merged) {
      merged = arrival.known.get();
      all = merge(all, arrival.known);
    }
  barrier.released = with_own(all, barrier.arrivals.data(), barrier.arrivals.size());
  barrier.arrivals.clear();
}

void leave(Barrier& barrier, Thread& thread) {
  const bool learnt = thread.known != thread.known_at_arrival;  // something else, between the two
  thread.known = learnt ? merge(barrier.released, thread.known) : barrier.released;
}

void add_memory(char* begin, size_t bytes) {
  regions[begin] = {.begin = begin, .end = begin + bytes, .block = nullptr};
}

void remove_memory(char* begin) {
  const auto found = regions.find(begin);
  std::free(found->second.cells);
  regions.erase(found);
  last_region = nullptr;
}

}  // namespace checker
}  // namespace iss::simt

// The compiler's calls, one before every access, in kernels and in the host code next to them.
namespace {
void compiled_access(const void* address, size_t bytes, iss::simt::Access kind, const void* pc) {
  const iss::simt::Thread* thread = iss::simt::current;
  if (thread == nullptr || !thread->block->launch->settings.check) return;
  if (bytes <= 16 && (bytes & (bytes - 1)) == 0 &&
      reinterpret_cast<uintptr_t>(address) % bytes != 0)
    thread->block->launch->fail("misaligned: access of ", bytes, " bytes at ", address, ", at ",
                                iss::simt::Pc{pc});
  iss::simt::checker::access(address, bytes, kind, pc);
}
}  // namespace

#define ACCESS(name, bytes, kind)                                                          \
  void name(void* address) {                                                               \
    compiled_access(address, bytes, iss::simt::Access::kind, __builtin_return_address(0)); \
  }
#define ACCESSES(bytes)                              \
  ACCESS(__tsan_read##bytes, bytes, kRead)           \
  ACCESS(__tsan_write##bytes, bytes, kWrite)         \
  ACCESS(__tsan_unaligned_read##bytes, bytes, kRead) \
  ACCESS(__tsan_unaligned_write##bytes, bytes, kWrite)

extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* address, size_t bytes) {
  compiled_access(address, bytes, iss::simt::Access::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  compiled_access(address, bytes, iss::simt::Access::kWrite, __builtin_return_address(0));
}
void __tsan_init() {}

// -fsanitize-coverage=trace-pc: at every branch's end, so that lanes that went different ways have
// different paths.
void __sanitizer_cov_trace_pc() {
  iss::simt::Thread* thread = iss::simt::current;
  if (thread == nullptr) return;
  const auto place = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  thread->path = (thread->path ^ place) * 0x9e3779b97f4a7c15;
}

void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// -fsanitize=alignment: a reference or a pointer's target that is not where its type must be.
void __ubsan_handle_type_mismatch_v1(void* data, uintptr_t address) {
  struct Data {
    const char* file;
    uint32_t line, column;
  };
  const auto* place = static_cast<const Data*>(data);
  if (iss::simt::current == nullptr || address == 0) return;
  iss::simt::current->block->launch->fail("misaligned: access at ",
                                          reinterpret_cast<void*>(address), ", at ", place->file,
                                          ":", place->line);
}
}
