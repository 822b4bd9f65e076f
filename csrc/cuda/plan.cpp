// SPDX-License-Identifier: Apache-2.0
// Tries a few dozen ways to lay a layer out on the GPU, estimates what a step takes with each, and
// keeps the fastest that is surely resident. The estimate counts, for one block, reads of shared
// memory, arithmetic and instructions, and adds what an exchange takes. It need not be right to
// more than the gaps between tiers: one whose blocks wait for each other must be faster by a fifth.
// Each step also bears its share of what filling shared memory takes, which decides short
// sequences.
//
// On an H100 (132 multiprocessors, 1.75 GHz) it says, in us per step forward, batch 16:
//   H            64    128    256    512
//   float32     0.6    0.7    1.2    2.4
//   bfloat16    0.3    0.5    0.8    1.3
#include "cuda/plan.h"

#include <algorithm>
#include <initializer_list>

#include "cuda/tile.h"

namespace iss {
namespace {

// Clocks unless it says otherwise.
struct Speeds {
  int schedulers = 4;         // warps that issue an instruction, a clock
  double shared = 128;        // bytes a multiprocessor reads of its shared memory, a clock
  double latency = 60;        // of a round of a product: a load, and two dependent mma or 16 fma
  double barrier = 40;        // of a block
  double cluster = 400;       // barrier of a cluster, and a store to a neighbour before it
  double cluster_block = 20;  // more for each of its blocks
  double cluster_bytes = 32;  // to and from other blocks of a cluster, a clock
  double grid = 2000;         // a flag and the data after it through L2, 600 ns each way at worst
  double grid_bytes = 24;     // to and from L2, a clock, for each multiprocessor
  double steps = 10000;       // two launches: 6 us
  double fill = 3500;         // before the first step: 2 us, and the block's shared memory is
  double fill_bytes = 15;     // filled, so many bytes a clock; backward both take twice as long
  double per_us = 1750;
};
constexpr Speeds kSpeeds;

// Instructions per cell (lstm_forward.cu) and per element (lstm_backward.cu).
constexpr double kCellExact = 170, kCellTensor = 70, kElement = 120;

// Waiting for other blocks is worth its risks from here on.
constexpr double kWorth = 0.8;

// A single step is one launch (lstm_step.cu) up to so many multiply-adds for each multiprocessor,
// and always for so few rows. On an H100 that takes 3.4 us and 1 us for every 6.5 million, 24 us at
// the limit of 138 million; two GEMMs and a cell take 15 us and more.
constexpr double kOneStepProducts = 1 << 20;
constexpr int64_t kOneStepRows = 4;

double multiply_adds_per_clock(Math math, const DeviceLimits& device) {
  const bool data_centre = is_data_centre(device.major, device.minor);
  switch (math) {
    case Math::kFloat32:
      return 128;
    case Math::kFloat64:
      return !data_centre ? 2 : device.major >= 9 ? 64 : 32;
    case Math::kTf32:
      return 256;
    default:
      return 512;  // what mma.sync reaches, half of the peak of wgmma
  }
}

struct Choice {
  LstmPlan plan;
  double clocks = -1;  // of a step of the whole batch and its share of the fill; < 0: none

  void keep_better(const Choice& other) {
    if (other.clocks >= 0 && (clocks < 0 || other.clocks < clocks)) *this = other;
  }
};

struct Planner {
  const LstmProblem& problem;
  const DeviceLimits& device;
  int64_t least_shared = -1;  // of the ways that did not fit in the tier under way

  // Warps, and how many of them split K: as many as there is room for, while each has two rounds.
  bool choose_threads(LstmPlan& plan) const {
    const int warps = max_threads(problem.math) / 32;
    const int passes = static_cast<int>(ceil_div(plan.rows, pass_rows(problem.math)));
    const int64_t k = problem.backward ? 4 * plan.units : problem.hidden;
    const int rounds = chunks_of(problem.math, k) / 4;
    const int64_t products =
        passes * (problem.backward ? ceil_div(problem.hidden, kWeightRows) : plan.units / kUnits);
    if (!problem.backward && products > warps) return false;
    const int workers = static_cast<int>(std::min<int64_t>(products, warps));
    plan.splits = std::clamp(std::min(warps / workers, rounds / 2), 1, 8);
    int per_split = workers;
    if (problem.backward) {
      const int64_t threads = std::max<int64_t>(ceil_div(plan.rows * plan.units, kItems), 128);
      per_split = std::max<int>(workers, ceil_div(threads, 32 * plan.splits));
    }
    plan.threads = 32 * per_split * plan.splits;
    return plan.threads <= max_threads(problem.math);
  }

  double product_clocks(const LstmPlan& plan) const {
    const Math math = problem.math;
    const bool tensor = uses_tensor_cores(math);
    const int columns = plan.rows * (tensor && plan.rows == 4 ? 2 : 1);
    const int64_t k = problem.backward ? 4 * plan.units : problem.hidden;
    const int64_t m =
        problem.backward ? ceil_div(problem.hidden, kWeightRows) * kWeightRows : 4 * plan.units;
    const double row_bytes = 16.0 * chunks_of(math, k);
    const double weights = m * row_bytes * ceil_div(plan.rows, pass_rows(math));
    // What 8 lanes share is read twice with FMA: a request of 512 bytes takes at least 2 clocks.
    const double vectors = columns * row_bytes * (m / kWeightRows) * (tensor ? 1 : 4);
    const double reads = (weights + vectors) / kSpeeds.shared;
    const double arithmetic =
        m * (row_bytes / element_bytes(math)) * columns / multiply_adds_per_clock(math, device);
    const double rounds = ceil_div(chunks_of(math, k) / 4, plan.splits) * kSpeeds.latency;
    return std::max({reads, arithmetic, rounds});
  }

  double step_clocks(const LstmPlan& plan) const {
    const bool tensor = uses_tensor_cores(problem.math);
    const double wide = wide_bytes(problem.math);
    const double elements = static_cast<double>(plan.rows) * plan.units;
    double clocks = product_clocks(plan) + kSpeeds.barrier;
    double sent, received;  // bytes of one block
    if (!problem.backward) {
      const int warps = plan.threads / 32 / plan.splits;
      const int rows_of_pass = std::min(plan.rows, pass_rows(problem.math));
      const double cells = rows_of_pass < 8 ? 1 : rows_of_pass / 4;  // of a lane
      clocks += ceil_div(warps, kSpeeds.schedulers) * cells * (tensor ? kCellTensor : kCellExact);
      if (plan.splits > 1) clocks += kSpeeds.barrier + (plan.splits - 1) * warps * cells * 4;
      received = static_cast<double>(plan.rows) * problem.hidden * element_bytes(problem.math);
      sent = elements * element_bytes(problem.math) *
             (plan.tier == Tier::kCluster ? plan.blocks - 1 : 1);
    } else {
      const double parts = elements * plan.blocks * plan.splits * wide;
      clocks += ceil_div(plan.rows * plan.units, 32 * kSpeeds.schedulers) * kElement;
      clocks += kSpeeds.barrier;
      clocks += 2 * parts / kSpeeds.shared;
      received = sent = parts;
    }
    switch (plan.tier) {
      case Tier::kCluster:
        return clocks + kSpeeds.cluster + plan.blocks * kSpeeds.cluster_block +
               std::max(sent, received) / kSpeeds.cluster_bytes;
      case Tier::kGrid:
        return clocks + kSpeeds.grid + (sent + received) / kSpeeds.grid_bytes;
      default:
        return clocks;
    }
  }

  // Of a call, before its first step.
  double fill_clocks(const LstmPlan& plan) const {
    return (kSpeeds.fill + plan.shared_bytes / kSpeeds.fill_bytes) * (problem.backward ? 2 : 1);
  }

  // Blocks of `units` units, with the best number of rows.
  Choice best_rows(Tier tier, int units) {
    Choice best;
    const int blocks = static_cast<int>(ceil_div(problem.hidden, units));
    const int resident = tier == Tier::kCluster ? device.clusters[blocks - 1]
                                                : std::max(device.multiprocessors / blocks, 1);
    if (resident == 0) return best;
    for (const int rows : {1, 2, 4, 8, 16, 32, 64}) {
      if (uses_tensor_cores(problem.math) && rows < 4) continue;
      Choice choice;
      LstmPlan& plan = choice.plan;
      plan = {.tier = tier,
              .math = problem.math,
              .backward = problem.backward,
              .units = units,
              .blocks = blocks,
              .rows = rows};
      const int64_t tiles = ceil_div(problem.batch, rows);
      plan.groups = static_cast<int>(std::min<int64_t>(tiles, resident));
      if (!choose_threads(plan)) break;
      const LstmTiles shape = tiles_of(plan);
      plan.shared_bytes = 16 * shared_layout(problem.math, tier, problem.backward, problem.hidden,
                                             shape, plan.threads)
                                   .end;
      if (plan.shared_bytes > device.shared_bytes) {
        if (least_shared < 0 || plan.shared_bytes < least_shared) least_shared = plan.shared_bytes;
        break;  // more rows need more
      }
      if (tier == Tier::kGrid)
        plan.exchange_bytes =
            16 * plan.groups * exchange_of(problem.math, problem.backward, problem.hidden, shape);
      choice.clocks = step_clocks(plan) * ceil_div(tiles, plan.groups) +
                      fill_clocks(plan) / static_cast<double>(problem.steps);
      best.keep_better(choice);
      if (tiles == 1) break;
    }
    return best;
  }

  Choice best_of(Tier tier) {
    Choice best;
    least_shared = -1;
    const int all = static_cast<int>(ceil_div(problem.hidden, kUnits) * kUnits);
    if (tier == Tier::kBlock) return best_rows(tier, all);
    if (tier == Tier::kCluster) {
      const auto try_up_to = [&](int most) {
        for (int64_t blocks = 2; blocks <= std::min<int64_t>(most, all / kUnits); ++blocks) {
          const int units = static_cast<int>(ceil_div(all / kUnits, blocks)) * kUnits;
          if (ceil_div(all, units) == blocks) best.keep_better(best_rows(tier, units));
        }
      };
      try_up_to(kPortableCluster);
      if (best.clocks < 0) try_up_to(kLargestCluster);
      return best;
    }
    for (const int units : {8, 16, 24, 32, 48, 64, 96, 128})
      if (units < all && ceil_div(problem.hidden, units) <= device.multiprocessors)
        best.keep_better(best_rows(tier, units));
    return best;
  }

  double steps_clocks() const {
    const double products = 4.0 * problem.hidden * problem.hidden;
    const double rate = multiply_adds_per_clock(problem.math, device) * 0.6;
    return kSpeeds.steps + std::max(products * problem.batch / rate,
                                    products * element_bytes(problem.math) / kSpeeds.grid_bytes) /
                               std::max(device.multiprocessors, 1);
  }
};

std::string number(double value) {
  const int64_t tenths = static_cast<int64_t>(value * 10 + 0.5);
  std::string text = std::to_string(tenths / 10);
  if (tenths < 100 && tenths % 10 != 0) text += "." + std::to_string(tenths % 10);
  return text;
}
std::string kilobytes(int64_t bytes) { return number(bytes / 1024.0) + " KB"; }
std::string microseconds(double clocks) { return number(clocks / kSpeeds.per_us) + " us"; }

bool is_one_step(const LstmProblem& problem, const DeviceLimits& device) {
  const double products = 8.0 * problem.hidden * problem.hidden * problem.batch;  // I = H
  return problem.steps == 1 && !problem.backward &&
         (problem.batch <= kOneStepRows || products <= kOneStepProducts * device.multiprocessors);
}

constexpr const char* kSubjects[] = {"one block", "a cluster", "the grid", "a product per step"};

}  // namespace

LstmPlan plan_lstm(const LstmProblem& problem, const DeviceLimits& device) {
  LstmPlan steps = {.tier = Tier::kSteps, .math = problem.math, .backward = problem.backward};
  if (is_one_step(problem, device)) {
    steps.tier = Tier::kOneStep;
    steps.why =
        "a single step is one launch that reads all weights, once for 8 rows, where they lie";
    return steps;
  }
  const std::string a_step = problem.steps == 1 ? " for the one step"
                             : problem.steps < kManySteps
                                 ? " for each of " + std::to_string(problem.steps) + " steps"
                                 : " a step";
  if (problem.projected) {
    steps.why = "a projection follows each step, a product of its own";
    return steps;
  }
  if (device.major < 8) {
    steps.why = "the kernels that keep weights resident need compute capability 8.0, this is " +
                std::to_string(device.major) + "." + std::to_string(device.minor);
    return steps;
  }
  Planner planner{problem, device};
  const double weights = 4.0 * problem.hidden * problem.hidden * element_bytes(problem.math);
  const double room = static_cast<double>(device.multiprocessors) * device.shared_bytes;
  if (weights > room) {
    steps.why = "about " + microseconds(planner.steps_clocks()) + a_step + "; the weights take " +
                number(weights / 1048576) + " MB, and all shared memory together has " +
                number(room / 1048576) + " MB";
    return steps;
  }
  Choice best;
  std::string passed_over;  // the tiers before
  for (const Tier tier : {Tier::kBlock, Tier::kCluster, Tier::kGrid, Tier::kSteps}) {
    Choice choice{steps, planner.steps_clocks()};
    if (tier != Tier::kSteps) choice = planner.best_of(tier);
    const double worth = tier == Tier::kSteps ? 1 : kWorth;
    const std::string subject = kSubjects[static_cast<int>(tier)];
    if (choice.clocks < 0) {
      if (best.clocks >= 0) continue;
      if (tier == Tier::kCluster && device.major < 9)
        passed_over += "; clusters need compute capability 9.0";
      else if (planner.least_shared >= 0)
        passed_over += "; " + subject + " would need " + kilobytes(planner.least_shared) +
                       " of shared memory per block, of " + kilobytes(device.shared_bytes);
      else
        passed_over += "; " + subject + " has no room for H = " + std::to_string(problem.hidden);
    } else if (best.clocks < 0 || choice.clocks < worth * best.clocks) {
      if (best.clocks >= 0)
        passed_over += "; " + std::string(kSubjects[static_cast<int>(best.plan.tier)]) +
                       " would take " + microseconds(best.clocks);
      best = choice;
    }
  }
  LstmPlan& plan = best.plan;
  plan.why = "about " + microseconds(best.clocks) + a_step;
  if (plan.tier != Tier::kSteps)
    plan.why += " with " + std::to_string(plan.blocks) +
                (plan.blocks == 1 ? " block of " : " blocks of ") + std::to_string(plan.units) +
                " units and " + kilobytes(plan.shared_bytes) + " in each group";
  plan.why += passed_over;
  return plan;
}

DeviceLimits less_than(const LstmPlan& plan, DeviceLimits device) {
  if (plan.tier == Tier::kCluster)  // by half, so that whoever goes on asking is soon done
    for (int n = plan.blocks; n <= kLargestCluster; ++n)
      device.clusters[n - 1] = std::min(device.clusters[n - 1], plan.groups / 2);
  else if (plan.tier == Tier::kGrid)
    device.multiprocessors = plan.blocks * plan.groups - 1;
  else
    device.shared_bytes = plan.shared_bytes - 1;
  return device;
}

}  // namespace iss
