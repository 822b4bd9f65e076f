// SPDX-License-Identifier: Apache-2.0
// The group-lasso ops on the CPU: all matrices of a model in one parallel loop over blocks of rows.
// Blocks have a fixed size and their column sums are added in order, in double, so that a result
// does not depend on the number of threads.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"

namespace iss {
namespace {

// Also bounds the rounding of a column sum: at most this many terms are added in the weight's
// dtype.
constexpr int64_t kBlockRows = 64;

std::vector<Tensor> contiguous(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> result;
  for (const Tensor& t : tensors) result.push_back(t.contiguous());
  return result;
}

// One labelled matrix and, for each unit, the list of its columns.
struct Labelled {
  int64_t rows, columns, blocks;
  const int32_t *row_units, *column_units;
  std::vector<int64_t> unit_starts, unit_columns;

  Labelled(const char* op, const Tensor& row_units, const Tensor& column_units, int64_t units)
      : rows(row_units.numel()),
        columns(column_units.numel()),
        blocks((rows + kBlockRows - 1) / kBlockRows),
        row_units(row_units.const_data_ptr<int32_t>()),
        column_units(column_units.const_data_ptr<int32_t>()),
        unit_starts(units + 1, 0) {
    const auto check = [&](const char* name, const int32_t* ids, int64_t count) {
      for (int64_t i = 0; i < count; ++i)
        TORCH_CHECK(ids[i] >= -1 && ids[i] < units, op, ": expected ", name,
                    " to be -1 or below units = ", units, ", got ", ids[i]);
    };
    check("row_units", this->row_units, rows);
    check("column_units", this->column_units, columns);
    for (int64_t c = 0; c < columns; ++c)
      if (this->column_units[c] >= 0) ++unit_starts[this->column_units[c] + 1];
    for (int64_t u = 0; u < units; ++u) unit_starts[u + 1] += unit_starts[u];
    unit_columns.resize(unit_starts[units]);
    std::vector<int64_t> next(unit_starts.begin(), unit_starts.end() - 1);
    for (int64_t c = 0; c < columns; ++c)
      if (this->column_units[c] >= 0) unit_columns[next[this->column_units[c]]++] = c;
  }

  template <typename T>
  LabelledRows<T> block(int64_t index, bool paper_overlap) const {
    return {.row_begin = index * kBlockRows,
            .row_end = std::min(rows, (index + 1) * kBlockRows),
            .columns = columns,
            .row_units = row_units,
            .column_units = column_units,
            .unit_starts = unit_starts.data(),
            .unit_columns = unit_columns.data(),
            .paper_overlap = paper_overlap};
  }
};

std::vector<Labelled> labelled(const char* op, const std::vector<Tensor>& row_units,
                               const std::vector<Tensor>& column_units, int64_t units) {
  std::vector<Labelled> result;
  for (size_t i = 0; i < row_units.size(); ++i)
    result.emplace_back(op, row_units[i], column_units[i], units);
  return result;
}

// visit(matrix, block) for every block of every matrix, in parallel.
template <typename Visit>
void each_block(const std::vector<Labelled>& matrices, const Visit& visit) {
  std::vector<std::pair<size_t, int64_t>> blocks;
  for (size_t m = 0; m < matrices.size(); ++m)
    for (int64_t b = 0; b < matrices[m].blocks; ++b) blocks.emplace_back(m, b);
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) visit(blocks[i].first, blocks[i].second);
  });
}

Tensor group_norms_forward_cpu(const std::vector<Tensor>& weights,
                               const std::vector<Tensor>& row_units,
                               const std::vector<Tensor>& column_units, int64_t units, double eps,
                               bool paper_overlap) {
  check_labelled("group_norms_forward", weights, row_units, column_units);
  TORCH_CHECK(units >= 0, "group_norms_forward: expected units >= 0, got ", units);
  const std::vector<Tensor> matrices = contiguous(weights), rows = contiguous(row_units),
                            columns = contiguous(column_units);
  const std::vector<Labelled> labels = labelled("group_norms_forward", rows, columns, units);
  const Tensor norms = at::empty({units}, weights[0].options());
  AT_DISPATCH_FLOATING_TYPES(weights[0].scalar_type(), "group_norms_forward", [&] {
    std::vector<std::vector<scalar_t>> row_sums, column_sums;  // per matrix: [R]; [blocks, C]
    for (const Labelled& m : labels) {
      row_sums.emplace_back(m.rows);
      column_sums.emplace_back(m.blocks * m.columns);
    }
    each_block(labels, [&](size_t m, int64_t b) {
      cpu_kernels().of<scalar_t>().squares(
          {.rows = labels[m].block<scalar_t>(b, paper_overlap),
           .weight = matrices[m].const_data_ptr<scalar_t>(),
           .row_sums = row_sums[m].data(),
           .column_sums = column_sums[m].data() + b * labels[m].columns});
    });
    std::vector<double> squares(units, eps);
    for (size_t m = 0; m < labels.size(); ++m) {
      const Labelled& matrix = labels[m];
      for (int64_t r = 0; r < matrix.rows; ++r)
        if (matrix.row_units[r] >= 0) squares[matrix.row_units[r]] += row_sums[m][r];
      for (int64_t b = 0; b < matrix.blocks; ++b)
        for (int64_t c = 0; c < matrix.columns; ++c)
          if (matrix.column_units[c] >= 0)
            squares[matrix.column_units[c]] += column_sums[m][b * matrix.columns + c];
    }
    for (int64_t u = 0; u < units; ++u)
      norms.mutable_data_ptr<scalar_t>()[u] = static_cast<scalar_t>(std::sqrt(squares[u]));
  });
  return norms;
}

void add_scaled_by_units_cpu_(const std::vector<Tensor>& outputs,
                              const std::vector<Tensor>& weights,
                              const std::vector<Tensor>& row_units,
                              const std::vector<Tensor>& column_units, const Tensor& factors,
                              bool paper_overlap) {
  constexpr const char* op = "add_scaled_by_units_";
  check_labelled(op, weights, row_units, column_units);
  check_contiguous(op, "outputs", outputs);
  TORCH_CHECK(outputs.size() == weights.size(), op, ": expected ", weights.size(),
              " outputs, one for each weight, got ", outputs.size());
  for (size_t m = 0; m < weights.size(); ++m) {
    check_like(op, "outputs", outputs[m], weights[0]);
    check_shape(op, "outputs", outputs[m], "[R, C]", weights[m].sizes());
  }
  check_like(op, "factors", factors, weights[0]);
  TORCH_CHECK(factors.dim() == 1, op, ": expected factors of shape [units], got ", factors.sizes());
  const std::vector<Tensor> matrices = contiguous(weights), rows = contiguous(row_units),
                            columns = contiguous(column_units);
  const std::vector<Labelled> labels = labelled(op, rows, columns, factors.size(0));
  const Tensor by_unit = factors.contiguous();
  AT_DISPATCH_FLOATING_TYPES(weights[0].scalar_type(), "add_scaled_by_units_", [&] {
    const scalar_t* unit_factors = by_unit.const_data_ptr<scalar_t>();
    const auto spread = [&](const int32_t* units, int64_t count) {
      std::vector<scalar_t> spread_factors(count);
      for (int64_t i = 0; i < count; ++i)
        spread_factors[i] = units[i] < 0 ? scalar_t(0) : unit_factors[units[i]];
      return spread_factors;
    };
    each_block(labels, [&](size_t m, int64_t b) {
      const std::vector<scalar_t> row_factors = spread(labels[m].row_units, labels[m].rows);
      std::vector<scalar_t> column_factors = spread(labels[m].column_units, labels[m].columns);
      cpu_kernels().of<scalar_t>().add_scaled({.rows = labels[m].block<scalar_t>(b, paper_overlap),
                                               .weight = matrices[m].const_data_ptr<scalar_t>(),
                                               .row_factors = row_factors.data(),
                                               .column_factors = column_factors.data(),
                                               .output = outputs[m].mutable_data_ptr<scalar_t>()});
    });
  });
}

std::vector<Tensor> group_norms_backward_cpu(const Tensor& dnorms, const Tensor& norms,
                                             const std::vector<Tensor>& weights,
                                             const std::vector<Tensor>& row_units,
                                             const std::vector<Tensor>& column_units, double eps,
                                             bool paper_overlap) {
  check_shape("group_norms_backward", "dnorms", dnorms, "[units]", norms.sizes());
  std::vector<Tensor> dweights;
  for (const Tensor& weight : weights)
    dweights.push_back(at::zeros_like(weight, {}, {}, {}, {}, at::MemoryFormat::Contiguous));
  add_scaled_by_units_cpu_(dweights, weights, row_units, column_units, dnorms / norms,
                           paper_overlap);
  return dweights;
}

void threshold_cpu_(const std::vector<Tensor>& weights, const std::vector<Tensor>& row_units,
                    const std::vector<Tensor>& column_units, double threshold) {
  check_labelled("threshold_", weights, row_units, column_units);
  check_contiguous("threshold_", "weights", weights);
  const std::vector<Tensor> rows = contiguous(row_units), columns = contiguous(column_units);
  int64_t units = 0;
  for (const auto* list : {&rows, &columns})
    for (const Tensor& ids : *list)
      if (ids.numel() > 0) units = std::max(units, ids.max().item<int64_t>() + 1);
  const std::vector<Labelled> labels = labelled("threshold_", rows, columns, units);
  AT_DISPATCH_FLOATING_TYPES(weights[0].scalar_type(), "threshold_", [&] {
    each_block(labels, [&](size_t m, int64_t b) {
      cpu_kernels().of<scalar_t>().threshold({.rows = labels[m].block<scalar_t>(b, false),
                                              .weight = weights[m].mutable_data_ptr<scalar_t>(),
                                              .threshold = static_cast<scalar_t>(threshold)});
    });
  });
}

TORCH_LIBRARY_IMPL(iss_kernels, CPU, library) {
  library.impl("group_norms_forward", &group_norms_forward_cpu);
  library.impl("group_norms_backward", &group_norms_backward_cpu);
  library.impl("add_scaled_by_units_", &add_scaled_by_units_cpu_);
  library.impl("threshold_", &threshold_cpu_);
}

}  // namespace
}  // namespace iss
