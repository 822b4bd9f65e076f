// SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set: once, best first; ISS_KERNELS_ISA or set_isa forces one.

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/kernels/table.h"

namespace iss {

extern const CpuKernels kScalarKernels, kScalarBf16Kernels;
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels, kAvx2VnniKernels;
extern const CpuKernels kAvx512Kernels, kAvx512Bf16Kernels, kAmxKernels;
#elif defined(__aarch64__)
extern const CpuKernels kNeonKernels, kNeonBf16Kernels;
#endif

namespace {

// Every ISA that is built, best first. A new one is its isa_*.cpp, its vec_*-inl.h and a line here.
const CpuKernels* const kBuilt[] = {
#if defined(__x86_64__)
    &kAmxKernels,        &kAvx512Bf16Kernels, &kAvx512Kernels, &kAvx2VnniKernels, &kAvx2Kernels,
#elif defined(__aarch64__)
    &kNeonBf16Kernels,
    &kNeonKernels,
#endif
    &kScalarKernels,
    &kScalarBf16Kernels,  // on request alone, for tests
};

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const CpuKernels* find(const std::string& name, const std::string& who) {
  for (const CpuKernels* kernels : kBuilt) {
    if (name != kernels->isa) continue;
    if (kernels->supported()) return kernels;
    throw std::invalid_argument(who + ": expected an ISA that this CPU supports (" +
                                joined(supported_isas()) + "), got " + name);
  }
  throw std::invalid_argument(who + ": expected one of " + joined(built_isas()) + ", got " + name);
}

const CpuKernels* choose() {
  if (const char* forced = std::getenv("ISS_KERNELS_ISA"); forced != nullptr && *forced != '\0')
    return find(forced, "ISS_KERNELS_ISA");
  for (const CpuKernels* kernels : kBuilt)
    if (kernels->supported()) return kernels;
  return &kScalarKernels;
}

std::atomic<const CpuKernels*>& chosen() {
  static std::atomic<const CpuKernels*> kernels = choose();
  return kernels;
}

}  // namespace

const CpuKernels& cpu_kernels() { return *chosen().load(std::memory_order_relaxed); }

std::string set_isa(const std::string& name) {
  return chosen().exchange(find(name, "use_isa"))->isa;
}

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const CpuKernels* kernels : kBuilt) names.emplace_back(kernels->isa);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const CpuKernels* kernels : kBuilt)
    if (kernels->supported()) names.emplace_back(kernels->isa);
  return names;
}

}  // namespace iss
