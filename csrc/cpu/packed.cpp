// SPDX-License-Identifier: Apache-2.0

#include "cpu/packed.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <list>
#include <mutex>

#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/team.h"

namespace iss {
namespace {

// 64 bits of all values and the shape, in eight independent chains so that it runs at the speed of
// the cache. Each word is mixed in by a multiplication and a rotation: an odd factor alone would
// never carry the topmost bit, the sign of every other float, to another place.
uint64_t fingerprint(const at::Tensor& weight) {
  constexpr int kChains = 8;
  constexpr uint64_t kFactor = 0x9E3779B97F4A7C15;  // 2^64 / golden ratio, odd
  uint64_t chains[kChains] = {1, 2, 3, 4, 5, 6, 7, 8};
  const char* at = static_cast<const char*>(weight.const_data_ptr());
  int64_t bytes = weight.nbytes();
  const auto mix = [](uint64_t hash, uint64_t word) {
    return std::rotl((hash ^ word) * kFactor, 31);
  };
  for (; bytes >= kChains * 8; bytes -= kChains * 8, at += kChains * 8)
    for (int i = 0; i < kChains; ++i) {
      uint64_t word;
      std::memcpy(&word, at + 8 * i, 8);
      chains[i] = mix(chains[i], word);
    }
  uint64_t hash = static_cast<uint64_t>(weight.size(0));
  for (; bytes > 0; bytes -= 8, at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, at, std::min<int64_t>(bytes, 8));
    hash = mix(hash, word);
  }
  for (const uint64_t chain : chains) hash = mix(hash, chain);
  return hash;
}

Format format_of(at::ScalarType type) {
  switch (type) {
    case at::kHalf:
      return Format::kFloat16;
    case at::kBFloat16:
      return Format::kBfloat16;
    case at::kChar:
      return Format::kInt8;
    default:
      return Format::kSame;
  }
}

template <typename T>
Matrix pack_as(PackArgs weight) {
  const int64_t bytes =
      cpu_kernels().of<T>().packed_bytes(weight.k, weight.columns, weight.gates, weight.format);
  const at::Tensor panels = recycled({bytes}, at::kByte);
  weight.packed = panels.mutable_data_ptr();
  pack_all<T>(weight);
  return {panels, weight.format};
}

// One weight's panels. The weak pointer tells whether the tensor still lives: its address may be
// given to another.
struct Entry {
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> weight;
  const c10::TensorImpl* address;
  const CpuKernels* kernels;
  at::ScalarType dtype;
  Layout layout;
  uint64_t fingerprint;
  Matrix packed;
};

std::mutex entries_mutex;
std::list<Entry>& entries() {
  static auto* list = new std::list<Entry>;  // never destroyed: torch's own statics may go first
  return *list;
}

}  // namespace

PackArgs pack_args(const at::Tensor& weight, Layout layout, const at::Tensor& scales) {
  const int64_t width = weight.size(1);
  return {.k = weight.size(layout.transposed ? 1 : 0),
          .columns = weight.size(layout.transposed ? 0 : 1),
          .gates = layout.gates,
          .format = format_of(weight.scalar_type()),
          .b = weight.const_data_ptr(),
          .stride_k = layout.transposed ? 1 : width,
          .stride_column = layout.transposed ? width : 1,
          .scales = scales.defined() ? scales.const_data_ptr<float>() : nullptr};
}

Matrix pack(const at::Tensor& weight, Layout layout, const at::Tensor& scales) {
  const PackArgs args = pack_args(weight, layout, scales);
  return weight.scalar_type() == at::kDouble ? pack_as<double>(args) : pack_as<float>(args);
}

template <typename T>
void pack_all(const PackArgs& weight) {
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  const int64_t panels =
      kernels.panels(weight.gates ? weight.columns / 4 : weight.columns, weight.gates);
  if (panels == 0 || weight.k == 0) return;
  constexpr int64_t kMultiplies = 16;  // what takes as long as one element does
  each_part(panels, kMultiplies * weight.k * weight.columns / panels,
            [&](int64_t begin, int64_t end) {
              PackArgs part = weight;
              part.panels = {begin, end};
              kernels.pack(part);
            });
}
template void pack_all<float>(const PackArgs&);
template void pack_all<double>(const PackArgs&);

Matrix pack_once(const at::Tensor& weight, Layout layout) {
  const uint64_t now = fingerprint(weight);
  const auto is_it = [&](const Entry& entry) {
    return entry.address == weight.unsafeGetTensorImpl() && entry.layout == layout &&
           entry.kernels == &cpu_kernels() && entry.dtype == weight.scalar_type();
  };
  {
    const std::lock_guard lock(entries_mutex);
    for (auto entry = entries().begin(); entry != entries().end();) {
      if (entry->weight.expired()) {
        entry = entries().erase(entry);
        continue;
      }
      if (is_it(*entry) && entry->fingerprint == now) return entry->packed;
      ++entry;
    }
  }
  const Matrix result = pack(weight, layout);
  const std::lock_guard lock(entries_mutex);
  entries().remove_if(is_it);
  entries().push_front(Entry{.weight = decltype(Entry::weight)(weight.getIntrusivePtr()),
                             .address = weight.unsafeGetTensorImpl(),
                             .kernels = &cpu_kernels(),
                             .dtype = weight.scalar_type(),
                             .layout = layout,
                             .fingerprint = now,
                             .packed = result});
  return result;
}

}  // namespace iss
