// SPDX-License-Identifier: Apache-2.0
// The group-lasso ops on the CPU. Each op is one parallel loop over strips of rows of all matrices
// of a model. A strip has a fixed number of rows, and the column sums of the strips are added in
// order, in double, so a result does not depend on the number of threads.

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/kernels/table.h"
#include "memory.h"
#include "cpu/team.h"
#include "host.h"

namespace iss {
namespace {

// Rows of a strip, which is what a thread takes at a time. A column sum adds at most this many
// squares in Compute<W>, which bounds its rounding error; the sums of strips are added in double.
constexpr int64_t kStripRows = 256;

// The kernels' type for torch's scalar type.
template <typename scalar_t>
using Stored = std::conditional_t<std::is_same_v<scalar_t, at::BFloat16>, Bfloat16, scalar_t>;

// The labels of one matrix [R, C] and, for each unit, the list of its columns.
struct Labelled {
  int64_t rows, columns, strips;
  const int32_t *row_units, *column_units;
  Vector<int64_t> unit_starts, unit_columns;

  Labelled(const char* op, const Tensor& row_units, const Tensor& column_units, int64_t units)
      : rows(row_units.numel()),
        columns(column_units.numel()),
        strips(columns > 0 ? (rows + kStripRows - 1) / kStripRows : 0),
        row_units(row_units.const_data_ptr<int32_t>()),
        column_units(column_units.const_data_ptr<int32_t>()) {
    const auto check = [&](const char* name, const int32_t* ids, int64_t count) {
      int32_t least = -1, most = -1;  // a loop that threw here would not be vectorised
      for (int64_t i = 0; i < count; ++i) {
        least = std::min(least, ids[i]);
        most = std::max(most, ids[i]);
      }
      check_unit_ids(op, name, least, most, units);
    };
    check("row_units", this->row_units, rows);
    check("column_units", this->column_units, columns);
  }

  void list_columns(int64_t units) {
    unit_starts.resize(units + 1);
    for (int64_t c = 0; c < columns; ++c)
      if (column_units[c] >= 0) ++unit_starts[column_units[c] + 1];
    for (int64_t u = 0; u < units; ++u) unit_starts[u + 1] += unit_starts[u];
    unit_columns.resize(unit_starts[units]);
    Vector<int64_t> next(unit_starts.begin(), unit_starts.end() - 1);
    for (int64_t c = 0; c < columns; ++c)
      if (column_units[c] >= 0) unit_columns[next[column_units[c]]++] = c;
  }

  LabelledRows strip(int64_t index, bool paper_overlap) const {
    return {.row_begin = index * kStripRows,
            .row_end = std::min(rows, (index + 1) * kStripRows),
            .columns = columns,
            .row_units = row_units,
            .unit_starts = unit_starts.data(),
            .unit_columns = unit_columns.data(),
            .paper_overlap = paper_overlap};
  }

  // [C]: of_unit(unit of the column), or `none` for a column of no unit.
  template <typename T, typename OfUnit>
  Vector<T> by_column(T none, const OfUnit& of_unit) const {
    Vector<T> result(columns);
    for (int64_t c = 0; c < columns; ++c)
      result[c] = column_units[c] < 0 ? none : of_unit(column_units[c]);
    return result;
  }
};

std::vector<Labelled> labelled(const char* op, const std::vector<Tensor>& row_units,
                               const std::vector<Tensor>& column_units, int64_t units,
                               bool list_columns) {
  std::vector<Labelled> result;
  for (size_t i = 0; i < row_units.size(); ++i) {
    result.emplace_back(op, row_units[i], column_units[i], units);
    if (list_columns) result.back().list_columns(units);
  }
  return result;
}

// visit(matrix, strip) for every strip of every matrix, in parallel.
template <typename Visit>
void each_strip(const std::vector<Labelled>& matrices, const Visit& visit) {
  Vector<std::pair<size_t, int64_t>> strips;
  int64_t elements = 0;
  for (size_t m = 0; m < matrices.size(); ++m) {
    for (int64_t index = 0; index < matrices[m].strips; ++index) strips.emplace_back(m, index);
    elements += matrices[m].rows * matrices[m].columns;
  }
  const int64_t count = static_cast<int64_t>(strips.size());
  // The work of an element is counted as one multiply; reading it takes at least as long.
  each_block(count, 1, elements / std::max<int64_t>(1, count),
             [&](int64_t begin, int64_t end, int64_t) {
               for (int64_t i = begin; i < end; ++i) visit(strips[i].first, strips[i].second);
             });
}

Tensor group_norms_forward_cpu(const std::vector<Tensor>& weights,
                               const std::vector<Tensor>& row_units,
                               const std::vector<Tensor>& column_units, int64_t units, double eps,
                               bool paper_overlap) {
  constexpr const char* op = "group_norms_forward";
  check_labelled(op, weights, row_units, column_units);
  check_group_norms(op, units, eps);
  const std::vector<Tensor> matrices = contiguous(weights), rows = contiguous(row_units),
                            columns = contiguous(column_units);
  const std::vector<Labelled> labels = labelled(op, rows, columns, units, true);
  const Tensor norms = at::empty({units}, weights[0].options().dtype(factor_type(weights[0])));
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, weights[0].scalar_type(), op, [&] {
    using W = Stored<scalar_t>;
    using T = Compute<W>;
    std::vector<Vector<T>> row_sums;     // of each matrix: [R]
    std::vector<Vector<T>> column_sums;  // of each matrix: [strips, C]
    for (const Labelled& m : labels) {
      row_sums.emplace_back(m.rows);
      column_sums.emplace_back(m.strips * m.columns);
    }
    each_strip(labels, [&](size_t m, int64_t strip) {
      cpu_kernels().lasso<W>().squares(
          {.rows = labels[m].strip(strip, paper_overlap),
           .weight = values<W>(matrices[m]),
           .row_sums = row_sums[m].data(),
           .column_sums = column_sums[m].data() + strip * labels[m].columns});
    });
    Vector<double> squares(units, eps);
    for (size_t m = 0; m < labels.size(); ++m) {
      const Labelled& matrix = labels[m];
      for (int64_t r = 0; r < matrix.rows; ++r)
        if (matrix.row_units[r] >= 0) squares[matrix.row_units[r]] += row_sums[m][r];
      Vector<double> sums(matrix.columns);
      for (int64_t strip = 0; strip < matrix.strips; ++strip)
        for (int64_t c = 0; c < matrix.columns; ++c)
          sums[c] += column_sums[m][strip * matrix.columns + c];
      for (int64_t c = 0; c < matrix.columns; ++c)
        if (matrix.column_units[c] >= 0) squares[matrix.column_units[c]] += sums[c];
    }
    for (int64_t u = 0; u < units; ++u)
      mutable_values<T>(norms)[u] = static_cast<T>(std::sqrt(squares[u]));
  });
  return norms;
}

// Runs `what` over all matrices. The caller has checked everything but the ids of the labels.
// `outputs` are contiguous, and so are `weights` where they are the outputs.
void run_by_units(const char* op, ByUnits what, const std::vector<Tensor>& outputs,
                  const std::vector<Tensor>& weights, const std::vector<Tensor>& row_units,
                  const std::vector<Tensor>& column_units, int64_t units, const Tensor& factors,
                  bool paper_overlap, double threshold) {
  const std::vector<Tensor> matrices = contiguous(weights), rows = contiguous(row_units),
                            columns = contiguous(column_units);
  const std::vector<Labelled> labels =
      labelled(op, rows, columns, units, what != ByUnits::kThreshold);
  const Tensor contiguous_factors = factors.defined() ? factors.contiguous() : factors;
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, weights[0].scalar_type(), "by_units", [&] {
    using W = Stored<scalar_t>;
    using T = Compute<W>;
    const T* const of_unit = factors.defined() ? values<T>(contiguous_factors) : nullptr;
    const T limit = static_cast<T>(threshold);
    each_strip(labels, [&](size_t m, int64_t strip) {
      Vector<T> of_columns =
          labels[m].by_column(T(what == ByUnits::kScale ? 1 : 0),
                              [&](int32_t unit) { return of_unit ? of_unit[unit] : limit; });
      cpu_kernels().lasso<W>().by_units(what)({.rows = labels[m].strip(strip, paper_overlap),
                                               .weight = values<W>(matrices[m]),
                                               .output = mutable_values<W>(outputs[m]),
                                               .factors = of_unit,
                                               .threshold = limit,
                                               .of_columns = of_columns.data()});
    });
  });
}

void add_scaled_by_units_cpu_(const std::vector<Tensor>& outputs,
                              const std::vector<Tensor>& weights,
                              const std::vector<Tensor>& row_units,
                              const std::vector<Tensor>& column_units, const Tensor& factors,
                              bool paper_overlap) {
  constexpr const char* op = "add_scaled_by_units_";
  check_by_units(op, "outputs", outputs, weights, row_units, column_units, factors);
  run_by_units(op, ByUnits::kAddScaled, outputs, weights, row_units, column_units, factors.size(0),
               factors, paper_overlap, 0);
}

std::vector<Tensor> group_norms_backward_cpu(const Tensor& dnorms, const Tensor& norms,
                                             const std::vector<Tensor>& weights,
                                             const std::vector<Tensor>& row_units,
                                             const std::vector<Tensor>& column_units, double eps,
                                             bool paper_overlap) {
  constexpr const char* op = "group_norms_backward";
  check_labelled(op, weights, row_units, column_units);
  check_group_norms_backward(op, dnorms, norms, weights);
  std::vector<Tensor> dweights;
  for (const Tensor& weight : weights)
    dweights.push_back(at::zeros_like(weight, {}, {}, {}, {}, at::MemoryFormat::Contiguous));
  add_scaled_by_units_cpu_(dweights, weights, row_units, column_units, dnorms / norms,
                           paper_overlap);
  return dweights;
}

void scale_by_units_cpu_(const std::vector<Tensor>& weights, const std::vector<Tensor>& row_units,
                         const std::vector<Tensor>& column_units, const Tensor& factors) {
  constexpr const char* op = "scale_by_units_";
  check_by_units(op, "weights", weights, weights, row_units, column_units, factors);
  run_by_units(op, ByUnits::kScale, weights, weights, row_units, column_units, factors.size(0),
               factors, false, 0);
}

void threshold_cpu_(const std::vector<Tensor>& weights, const std::vector<Tensor>& row_units,
                    const std::vector<Tensor>& column_units, double threshold) {
  constexpr const char* op = "threshold_";
  constexpr int64_t kAnyUnit = std::numeric_limits<int32_t>::max();
  check_by_units(op, "weights", weights, weights, row_units, column_units, {});
  check_threshold(op, threshold);
  run_by_units(op, ByUnits::kThreshold, weights, weights, row_units, column_units, kAnyUnit,
               Tensor(), false, threshold);
}

TORCH_LIBRARY_IMPL(iss_kernels, CPU, library) {
  library.impl("group_norms_forward", &group_norms_forward_cpu);
  library.impl("group_norms_backward", &group_norms_backward_cpu);
  library.impl("add_scaled_by_units_", &add_scaled_by_units_cpu_);
  library.impl("scale_by_units_", &scale_by_units_cpu_);
  library.impl("threshold_", &threshold_cpu_);
}

}  // namespace
}  // namespace iss
