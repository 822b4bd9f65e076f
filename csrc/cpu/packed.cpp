// SPDX-License-Identifier: Apache-2.0

#include "cpu/packed.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <utility>

#include "cpu/finite.h"
#include "cpu/kernels/table.h"
#include "locks.h"
#include "memory.h"
#include "cpu/team.h"

namespace iss {
namespace {

// 64 bits of all values and the shape, in eight independent chains so that it runs at the speed of
// the cache. Each word is mixed in by both halves of a product: the lower half alone would leave a
// change of the topmost bit, the sign of every other float, in one place, where the change of
// another word might undo it.
uint64_t fingerprint(const at::Tensor& weight) {
  constexpr int kChains = 8;
  constexpr uint64_t kFactor = 0x9E3779B97F4A7C15;  // 2^64 / golden ratio, odd
  uint64_t chains[kChains] = {1, 2, 3, 4, 5, 6, 7, 8};
  const char* at = static_cast<const char*>(weight.const_data_ptr());
  int64_t bytes = weight.nbytes();
  const auto mix = [](uint64_t hash, uint64_t word) {
    const auto product = static_cast<unsigned __int128>(hash ^ word) * kFactor;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
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

// part: the first of `parts`, which are `bytes` apart and have `rows` rows of the weight each.
template <typename T>
Matrix pack_as(const PackArgs& part, int64_t parts, int64_t bytes, int64_t rows) {
  const int64_t packed_bytes =
      cpu_kernels().of<T>().packed_bytes(part.k, part.columns, part.gates, part.format);
  const at::Tensor panels = recycled({parts * packed_bytes}, at::kByte);
  for (int64_t p = 0; p < parts; ++p) {
    PackArgs args = part;
    args.b = static_cast<const char*>(part.b) + p * bytes;
    if (part.scales != nullptr) args.scales = part.scales + p * rows;
    args.packed = static_cast<char*>(panels.mutable_data_ptr()) + p * packed_bytes;
    pack_all<T>(args);
  }
  return {.panels = panels, .format = part.format, .part_bytes = packed_bytes};
}

// Whether `weight`, contiguous, has no inf and no NaN; of int8 that is up to its scales.
bool is_finite(const at::Tensor& weight, const at::Tensor& scales) {
  const at::Tensor& values = scales.defined() ? scales : weight;
  std::atomic<bool> finite = true;
  const auto look = [&](auto* data) {
    each_part(values.numel(), 1, [&](int64_t begin, int64_t end) {
      if (!all_finite(data + begin, end - begin)) finite.store(false, std::memory_order_relaxed);
    });
  };
  switch (values.scalar_type()) {
    case at::kHalf:
      look(static_cast<const Float16*>(values.const_data_ptr()));
      break;
    case at::kBFloat16:
      look(static_cast<const Bfloat16*>(values.const_data_ptr()));
      break;
    case at::kDouble:
      look(values.const_data_ptr<double>());
      break;
    default:
      look(values.const_data_ptr<float>());
  }
  return finite;
}

// The panels of a weight, for each layout that it was asked for in. A tensor carries them as its
// BackendMeta, so that they are found at once, go when it goes, and hold no reference to it, which
// torch.utils.swap_tensors would refuse. An alias of the tensor (detach, .data) has its own.
struct KeptPanels final : c10::BackendMeta {
  struct Entry {
    const CpuKernels* kernels = nullptr;
    at::ScalarType dtype = at::ScalarType::Undefined;
    uint64_t fingerprint = 0;
    Matrix packed;
  };
  Entry entries[2][5];  // by Layout::transposed and Layout::gates

  c10::intrusive_ptr<c10::BackendMeta> clone(
      const c10::intrusive_ptr<c10::BackendMeta>&) const override {
    return {};
  }
};

}  // namespace

Format format_of(at::ScalarType type) {
  switch (type) {
    case at::kHalf:
      return Format::kFloat16;
    case at::kBFloat16:
      return cpu_kernels().f32.bfloat16;
    case at::kChar:
      return cpu_kernels().f32.int8;
    default:
      return Format::kSame;
  }
}

PackArgs pack_args(const at::Tensor& weight, Layout layout, const at::Tensor& scales) {
  const int64_t width = weight.size(1);
  const int64_t height = weight.size(0) / layout.parts;
  return {.k = layout.transposed ? width : height,
          .columns = layout.transposed ? height : width,
          .gates = layout.gates,
          .format = format_of(weight.scalar_type()),
          .b = weight.const_data_ptr(),
          .stride_k = layout.transposed ? 1 : width,
          .stride_column = layout.transposed ? width : 1,
          .scales = scales.defined() ? scales.const_data_ptr<float>() : nullptr};
}

Matrix pack(const at::Tensor& weight, Layout layout, const at::Tensor& scales, bool look) {
  const PackArgs part = pack_args(weight, layout, scales);
  const int64_t parts = layout.parts, rows = weight.size(0) / parts;
  const int64_t bytes = static_cast<int64_t>(weight.nbytes()) / parts;
  Matrix result = weight.scalar_type() == at::kDouble ? pack_as<double>(part, parts, bytes, rows)
                                                      : pack_as<float>(part, parts, bytes, rows);
  result.finite = look && is_finite(weight, scales);
  return result;
}

template <typename T>
void pack_all(const PackArgs& weight) {
  const Kernels<T>& kernels = cpu_kernels().of<T>();
  const int64_t panels = kernels.panels(weight.columns / weight.gates, weight.gates);
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

Matrix pack_once(const at::Tensor& weight, Layout layout, bool look) {
  const uint64_t now = fingerprint(weight);
  c10::TensorImpl* const tensor = weight.unsafeGetTensorImpl();
  const auto kept = [&]() -> KeptPanels::Entry* {
    auto* const panels = dynamic_cast<KeptPanels*>(tensor->get_backend_meta());
    return panels == nullptr ? nullptr : &panels->entries[layout.transposed][layout.gates];
  };
  {
    const std::lock_guard lock(process_mutex());
    const KeptPanels::Entry* const entry = kept();
    if (entry != nullptr && entry->kernels == &cpu_kernels() &&
        entry->dtype == weight.scalar_type() && entry->fingerprint == now)
      return entry->packed;
  }
  // A copy is packed: another thread may write the weight meanwhile, and the panels have to hold
  // the values that the fingerprint is kept for.
  const at::Tensor values = recycled(weight.sizes(), weight.scalar_type());
  std::memcpy(values.mutable_data_ptr(), weight.const_data_ptr(), weight.nbytes());
  const Matrix result = pack(values, layout, {}, look);
  KeptPanels::Entry entry{&cpu_kernels(), weight.scalar_type(), fingerprint(values), result};
  {
    const std::lock_guard lock(process_mutex());
    if (tensor->get_backend_meta() == nullptr)
      tensor->set_backend_meta(c10::make_intrusive<KeptPanels>());
    if (kept() != nullptr) std::swap(*kept(), entry);
  }
  return result;  // the panels that were replaced go now, after the lock
}

}  // namespace iss
