// SPDX-License-Identifier: Apache-2.0
// The group-lasso ops on CUDA: one launch for all matrices of a model (up to 32; one for each 32 of
// a larger one). Nothing here waits for the device, but for the first look at a tensor of labels.

#include <ATen/core/Tensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "checks.h"
#include "cuda/device.h"
#include "cuda/group_lasso_kernels.h"
#include "host.h"

namespace iss {
namespace {

// Least and most of some ids and -1.
struct IdRange {
  int32_t least, most;
};

IdRange range_on_device(const char* op, const char* name, const Tensor& ids) {
  if (ids.numel() == 0) return {-1, -1};
  TORCH_CHECK(!is_capturing(), op, ": expected ", name,
              " in a CUDA graph to have been checked by a call before it, got a tensor that was "
              "not, or has changed since");
  const auto [least, most] = at::aminmax(ids);
  const Tensor both = at::stack({least, most}).cpu();  // waits for the device
  const int32_t* const found = both.const_data_ptr<int32_t>();
  return {std::min(-1, found[0]), std::max(-1, found[1])};
}

// The same, remembered while the tensor lives and nothing was written to it by an op of torch's.
// While a graph is captured it must be remembered.
// Labels change once in a model's life, if ever, and a look at them would make each call wait. What
// is written behind torch's back may go unnoticed here; kernels take ids out of range for -1.
IdRange range_of(const char* op, const char* name, const Tensor& ids) {
  struct Entry {
    // Also keeps the address from being given to another tensor.
    c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> tensor;
    const void* data;
    int64_t version;
    IdRange range;
  };
  static std::mutex mutex;
  static auto* const entries = new std::unordered_map<const c10::TensorImpl*, Entry>;
  if (ids.is_inference()) return range_on_device(op, name, ids);  // has no version
  const c10::TensorImpl* const address = ids.unsafeGetTensorImpl();
  const void* const data = ids.const_data_ptr();
  const int64_t version = ids._version();
  {
    const std::lock_guard lock(mutex);
    const auto found = entries->find(address);
    if (found != entries->end() && found->second.data == data && found->second.version == version)
      return found->second.range;
  }
  const IdRange range = range_on_device(op, name, ids);
  const std::lock_guard lock(mutex);
  std::erase_if(*entries, [](const auto& entry) { return entry.second.tensor.expired(); });
  entries->insert_or_assign(
      address, Entry{decltype(Entry::tensor)(ids.getIntrusivePtr()), data, version, range});
  return range;
}

void check_labels(const char* op, const std::vector<Tensor>& row_units,
                  const std::vector<Tensor>& column_units, int64_t units) {
  const auto check = [&](const char* name, const Tensor& ids) {
    const IdRange range = range_of(op, name, ids);
    check_unit_ids(op, name, range.least, range.most, units);
  };
  for (size_t i = 0; i < row_units.size(); ++i) {
    check("row_units", row_units[i]);
    check("column_units", column_units[i]);
  }
}

// Matrices [first, ...) of the tensors, as many as one launch takes. All tensors are contiguous;
// without outputs the kernel only reads.
template <typename W>
LabelledModel<W> model_of(size_t first, const std::vector<Tensor>& weights,
                          const std::vector<Tensor>& outputs, const std::vector<Tensor>& row_units,
                          const std::vector<Tensor>& column_units, int64_t units) {
  LabelledModel<W> model{.count = 0, .units = units, .matrices = {}};
  for (size_t i = first; i < weights.size() && model.count < model.kMatrices; ++i)
    model.matrices[model.count++] = {
        .rows = weights[i].size(0),
        .columns = weights[i].size(1),
        .weight = values<W>(weights[i]),
        .output = outputs.empty() ? nullptr : mutable_values<W>(outputs[i]),
        .row_units = values<int32_t>(row_units[i]),
        .column_units = values<int32_t>(column_units[i]),
        .row_sums = nullptr,
        .column_sums = nullptr};
  return model;
}

Tensor group_norms_forward_cuda(const std::vector<Tensor>& weights,
                                const std::vector<Tensor>& row_units,
                                const std::vector<Tensor>& column_units, int64_t units, double eps,
                                bool paper_overlap) {
  constexpr const char* op = "group_norms_forward";
  check_labelled(op, weights, row_units, column_units);
  check_group_norms(op, units, eps);
  const DeviceGuard guard(weights[0].device());
  check_labels(op, row_units, column_units, units);
  const std::vector<Tensor> matrices = contiguous(weights), rows = contiguous(row_units),
                            columns = contiguous(column_units);
  const auto options = weights[0].options().dtype(factor_type(weights[0]));
  const Tensor norms = at::empty({units}, options);
  ISS_DISPATCH(weights[0].scalar_type(), op, [&] {
    using W = KernelType<scalar_t>;
    constexpr size_t kMatrices = LabelledModel<W>::kMatrices;
    const bool several = weights.size() > kMatrices;
    const Tensor squares = several ? at::empty({units}, options.dtype(at::kDouble)) : Tensor();
    for (size_t first = 0; first < weights.size(); first += kMatrices) {
      GroupNormsArgs<W> args{.model = model_of<W>(first, matrices, {}, rows, columns, units),
                             .eps = eps,
                             .paper_overlap = paper_overlap,
                             .more_before = first > 0,
                             .more_after = first + kMatrices < weights.size(),
                             .strips = nullptr,
                             .ranges = nullptr,
                             .squares = several ? squares.mutable_data_ptr<double>() : nullptr,
                             .norms = mutable_values<Wide<W>>(norms)};
      int64_t sums = 0;
      const auto place_sums = [&](Wide<W>* begin) {
        sums = 0;
        for (int i = 0; i < args.model.count; ++i) {
          LabelledMatrix<W>& m = args.model.matrices[i];
          m.row_sums = begin + sums;
          m.column_sums = m.row_sums + m.across() * m.rows;
          sums += m.across() * m.rows + m.down() * m.columns;
        }
      };
      place_sums(nullptr);
      const Tensor workspace = at::empty({sums}, options);
      place_sums(mutable_values<Wide<W>>(workspace));
      constexpr int64_t kBytes = sizeof(LabelStrip) + LabelStrip::kRanges * sizeof(UnitRange);
      const int64_t strips = args.model.strips();
      const Tensor labels = at::empty({strips * kBytes}, options.dtype(at::kByte));
      args.strips = static_cast<LabelStrip*>(labels.mutable_data_ptr());
      args.ranges = reinterpret_cast<UnitRange*>(args.strips + strips);
      check_launch(op, launch_group_norms(args, device_limits(norms.device()).multiprocessors,
                                          current_stream(norms)));
    }
  });
  return norms;
}

// All arguments are checked and contiguous; the launches that take `what` to every matrix.
void run_by_units(const char* op, ByUnits what, const std::vector<Tensor>& outputs,
                  const std::vector<Tensor>& weights, const std::vector<Tensor>& row_units,
                  const std::vector<Tensor>& column_units, int64_t units, const Tensor& factors,
                  bool paper_overlap, bool overwrite, double threshold) {
  ISS_DISPATCH(weights[0].scalar_type(), "by_units", [&] {
    using W = KernelType<scalar_t>;
    for (size_t first = 0; first < weights.size(); first += LabelledModel<W>::kMatrices) {
      const ModelByUnitsArgs<W> args{
          .model = model_of<W>(first, weights, outputs, row_units, column_units, units),
          .factors = factors.defined() ? values<Wide<W>>(factors) : nullptr,
          .paper_overlap = paper_overlap,
          .overwrite = overwrite,
          .threshold = static_cast<Wide<W>>(threshold)};
      check_launch(op, launch_by_units(what, args, current_stream(weights[0])));
    }
  });
}

void add_scaled(const char* op, const std::vector<Tensor>& outputs,
                const std::vector<Tensor>& weights, const std::vector<Tensor>& row_units,
                const std::vector<Tensor>& column_units, const Tensor& factors, bool paper_overlap,
                bool overwrite) {
  check_by_units(op, "outputs", outputs, weights, row_units, column_units, factors);
  const DeviceGuard guard(weights[0].device());
  check_labels(op, row_units, column_units, factors.size(0));
  run_by_units(op, ByUnits::kAddScaled, outputs, contiguous(weights), contiguous(row_units),
               contiguous(column_units), factors.size(0), factors.contiguous(), paper_overlap,
               overwrite, 0);
}

void add_scaled_by_units_cuda_(const std::vector<Tensor>& outputs,
                               const std::vector<Tensor>& weights,
                               const std::vector<Tensor>& row_units,
                               const std::vector<Tensor>& column_units, const Tensor& factors,
                               bool paper_overlap) {
  add_scaled("add_scaled_by_units_", outputs, weights, row_units, column_units, factors,
             paper_overlap, false);
}

std::vector<Tensor> group_norms_backward_cuda(const Tensor& dnorms, const Tensor& norms,
                                              const std::vector<Tensor>& weights,
                                              const std::vector<Tensor>& row_units,
                                              const std::vector<Tensor>& column_units, double eps,
                                              bool paper_overlap) {
  constexpr const char* op = "group_norms_backward";
  check_labelled(op, weights, row_units, column_units);
  check_group_norms_backward(op, dnorms, norms, weights);
  std::vector<Tensor> dweights;
  for (const Tensor& weight : weights)
    dweights.push_back(at::empty_like(weight, {}, {}, {}, {}, at::MemoryFormat::Contiguous));
  add_scaled(op, dweights, weights, row_units, column_units, dnorms / norms, paper_overlap, true);
  return dweights;
}

void scale_by_units_cuda_(const std::vector<Tensor>& weights, const std::vector<Tensor>& row_units,
                          const std::vector<Tensor>& column_units, const Tensor& factors) {
  constexpr const char* op = "scale_by_units_";
  check_by_units(op, "weights", weights, weights, row_units, column_units, factors);
  const DeviceGuard guard(weights[0].device());
  check_labels(op, row_units, column_units, factors.size(0));
  run_by_units(op, ByUnits::kScale, weights, weights, contiguous(row_units),
               contiguous(column_units), factors.size(0), factors.contiguous(), false, false, 0);
}

void threshold_cuda_(const std::vector<Tensor>& weights, const std::vector<Tensor>& row_units,
                     const std::vector<Tensor>& column_units, double threshold) {
  constexpr const char* op = "threshold_";
  constexpr int64_t kAnyUnit = std::numeric_limits<int32_t>::max();
  check_by_units(op, "weights", weights, weights, row_units, column_units, {});
  check_threshold(op, threshold);
  const DeviceGuard guard(weights[0].device());
  check_labels(op, row_units, column_units, kAnyUnit);
  run_by_units(op, ByUnits::kThreshold, weights, weights, contiguous(row_units),
               contiguous(column_units), kAnyUnit, Tensor(), false, false, threshold);
}

TORCH_LIBRARY_IMPL(ISS_NAMESPACE, ISS_DEVICE, library) {
  library.impl("group_norms_forward", &group_norms_forward_cuda);
  library.impl("group_norms_backward", &group_norms_backward_cuda);
  library.impl("add_scaled_by_units_", &add_scaled_by_units_cuda_);
  library.impl("scale_by_units_", &scale_by_units_cuda_);
  library.impl("threshold_", &threshold_cuda_);
}

}  // namespace
}  // namespace iss
