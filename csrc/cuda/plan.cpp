// SPDX-License-Identifier: Apache-2.0
// Tries a few dozen ways to lay a layer out on the GPU, estimates what a step takes with each, and
// keeps the fastest that is surely resident. The estimate counts, for one block, reads of shared
// memory, arithmetic and instructions, and adds what an exchange takes. Each step also bears its
// share of what filling shared memory takes, which decides short sequences.
//
// The speeds were measured with an LSTM. Other cells are taken to be like one, but for their
// weights and operands: a pointwise function more or less is little beside the barriers of a step.
//
// On an H100 (132 multiprocessors) it says, and the fastest plan took, us per step forward of 16
// rows of an LSTM:
//   H               64          128         256         512
//   float32     1.1  0.95    1.5  1.4    2.1  2.0    3.6  3.1
//   bfloat16    0.8  0.7     1.2  1.1    1.4  1.3    1.9  2.1
#include "cuda/plan.h"

#include <algorithm>
#include <initializer_list>

#include "cuda/tile.h"

namespace iss {
namespace {

// Clocks of an H100 at 1.98 GHz: fitted to some 13,000 timings of steps there, of all tiers, with
// 64 to 1024 units and 1 to 128 rows. Nine in ten plans take 0.85 to 1.3 of what this says, and the
// plan it picks takes 1.07 times as long as the fastest. Other GPUs are taken to be like it.
struct Speeds {
  double block, cluster, grid;  // of a step beside what follows: instructions, barriers, latencies
  double cluster_block = 0;     // more for each block of a cluster
  double work;                  // times the reads and the arithmetic of a product
  double round;                 // of a product that waits for its loads
  double results;  // forward, of a cell of each of a scheduler's lanes; backward, of 128 elements
  double split = 0, split_result = 0;  // of a sum over K in parts; of each part and result
  double cluster_byte, grid_byte;      // to and from the other blocks of a group, for each block
  double l2_byte;                      // for all blocks together
  double steps, steps_rate;  // a GEMM and a pointwise kernel, and the part of its peak a GEMM has
};
constexpr Speeds kForwardFma = {.block = 490,
                                .cluster = 1580,
                                .grid = 2430,
                                .work = 1.0,
                                .round = 120,
                                .results = 500,
                                .split = 180,
                                .split_result = 62,
                                .cluster_byte = 0.19,
                                .grid_byte = 0.16,
                                .l2_byte = 5e-4,
                                .steps = 11000,
                                .steps_rate = 0.35};
constexpr Speeds kForwardTensor = {.block = 850,
                                   .cluster = 1450,
                                   .grid = 2600,
                                   .cluster_block = 8,
                                   .work = 0.75,
                                   .round = 151,
                                   .results = 240,
                                   .split = 280,
                                   .split_result = 66,
                                   .cluster_byte = 0.11,
                                   .grid_byte = 0.12,
                                   .l2_byte = 6e-4,
                                   .steps = 12500,
                                   .steps_rate = 0.6};
constexpr Speeds kBackwardFma = {.block = 1080,
                                 .cluster = 2540,
                                 .grid = 4050,
                                 .cluster_block = 21,
                                 .work = 1.2,
                                 .round = 40,
                                 .results = 600,
                                 .cluster_byte = 0.11,
                                 .grid_byte = 0.12,
                                 .l2_byte = 3.5e-4,
                                 .steps = 24000,
                                 .steps_rate = 0.45};
constexpr Speeds kBackwardTensor = {.block = 1620,
                                    .cluster = 2800,
                                    .grid = 5160,
                                    .cluster_block = 22,
                                    .work = 1.1,
                                    .round = 134,
                                    .results = 240,
                                    .split_result = 30,
                                    .cluster_byte = 0.05,
                                    .grid_byte = 0.09,
                                    .l2_byte = 2e-4,
                                    .steps = 22000,
                                    .steps_rate = 0.6};

constexpr double kSharedBytes = 128;  // that a multiprocessor reads of its shared memory, a clock
constexpr double kL2Bytes = 20;       // that it reads of L2
// Before the first step: so many clocks, and shared memory is filled, so many bytes a clock;
// backward both take twice as long.
constexpr double kFill = 6000, kFillBytes = 6;
constexpr double kClocksPerUs = 1980;

// Waiting for other blocks is worth its risks from here on.
constexpr double kWorth = 0.95;

// A single step is one launch (single_step-inl.h) up to so many multiply-adds for each
// multiprocessor, and always for so few rows. On an H100 that takes 3.4 us and 1 us for every 6.5
// million, 24 us at the limit of 138 million; two GEMMs and a pointwise kernel take 15 us and more.
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
      return 640;  // what mma.sync reaches, two thirds of the peak of wgmma
  }
}

struct Choice {
  LayerPlan plan;
  double clocks = -1;  // of a step of the whole batch and its share of the fill; < 0: none

  void keep_better(const Choice& other) {
    if (other.clocks >= 0 && (clocks < 0 || other.clocks < clocks)) *this = other;
  }
};

struct Planner {
  const LayerProblem& problem;
  const DeviceLimits& device;
  int64_t least_shared = -1;  // of the ways that did not fit in the tier under way

  const Speeds& speeds() const {
    const bool tensor = uses_tensor_cores(problem.math);
    return problem.backward ? (tensor ? kBackwardTensor : kBackwardFma)
                            : (tensor ? kForwardTensor : kForwardFma);
  }
  int64_t k(const LayerPlan& plan) const {
    return problem.backward ? problem.gates * plan.units : problem.hidden;
  }
  // Products of a warp that make up one of a block.
  int64_t products(const LayerPlan& plan) const {
    return ceil_div(plan.rows, pass_rows(problem.math)) * weight_tiles(plan);
  }
  int64_t weight_tiles(const LayerPlan& plan) const {
    return problem.backward ? ceil_div(problem.hidden, kWeightRows)
                            : plan.units / units_of_tile(problem.gates);
  }
  int eights_of_tile() const {
    return problem.backward ? kWeightRows / kUnits : problem.gates * units_of_lane(problem.gates);
  }

  // With so many warps to each sum over K; whether there is room for them, and work.
  bool choose_threads(LayerPlan& plan, int splits) const {
    const int64_t warps = max_threads(problem.math) / 32;
    int64_t per_split = products(plan);
    if (problem.backward) {
      per_split = std::min(per_split, std::max<int64_t>(warps / splits, 1));
      const int64_t threads = std::max<int64_t>(ceil_div(plan.rows * plan.units, kItems), 128);
      per_split = std::max(per_split, ceil_div(threads, 32 * splits));
    }
    plan.splits = splits;
    plan.threads = static_cast<int>(32 * per_split * splits);
    return per_split * splits <= warps && splits <= chunks_of(problem.math, k(plan)) / 4;
  }

  double product_clocks(const LayerPlan& plan) const {
    const Math math = problem.math;
    const bool tensor = uses_tensor_cores(math);
    const int columns = plan.rows * column_step(math, plan.rows);
    // Rows of weights; tensor cores load and multiply eights of them in pairs.
    const int64_t m =
        weight_tiles(plan) * kUnits * (tensor ? (eights_of_tile() + 1) / 2 * 2 : eights_of_tile());
    const double row_bytes = 16.0 * chunks_of(math, k(plan));
    const double weights = m * row_bytes * ceil_div(plan.rows, pass_rows(math));
    // What 8 lanes share is read twice with FMA: a request of 512 bytes takes at least 2 clocks.
    const double vectors = columns * row_bytes * weight_tiles(plan) * (tensor ? 1 : 4);
    const double reads = (weights + vectors) / kSharedBytes;
    const int64_t warps = plan.threads / 32;
    const double idle = 4.0 * ceil_div(warps, 4) / warps;  // of four schedulers
    const double arithmetic = m * (row_bytes / element_bytes(math)) * columns * idle /
                              multiply_adds_per_clock(math, device);
    const double rounds =
        static_cast<double>(ceil_div(chunks_of(math, k(plan)) / 4, plan.splits) *
                            ceil_div(products(plan) * plan.splits * 32, plan.threads));
    // The FMAs of a round are one lane's, 4 for each eight and row.
    const double round =
        speeds().round + (tensor ? 0 : 4 * eights_of_tile() * std::min(plan.rows, pass_rows(math)));
    const double few = 1 + 2.0 / warps;  // do not keep the multiprocessor busy all the time
    return std::max(speeds().work * few * std::max(reads, arithmetic), round * rounds);
  }

  double step_clocks(const LayerPlan& plan) const {
    const Speeds& speed = speeds();
    const double elements = static_cast<double>(plan.rows) * plan.units;
    double clocks = product_clocks(plan);
    double sent, received;  // bytes of one block
    if (!problem.backward) {
      const double warps = std::max(1.0, plan.threads / 128.0 / plan.splits);  // of a scheduler
      const int rows_of_pass = std::min(plan.rows, pass_rows(problem.math));
      const double results = warps * (rows_of_pass < 8 ? 1 : rows_of_pass / 4);
      clocks += speed.results * results;
      if (plan.splits > 1) clocks += speed.split + (plan.splits - 1) * speed.split_result * results;
      received = static_cast<double>(plan.rows) * problem.hidden * element_bytes(problem.math);
      sent = elements * element_bytes(problem.math) *
             (plan.tier == Tier::kCluster ? plan.blocks - 1 : 1);
    } else {
      clocks += speed.results * std::max(1.0, elements / 128);
      if (plan.tier != Tier::kGrid)
        clocks +=
            plan.blocks * plan.splits * speed.split_result * std::max(1.0, elements / plan.threads);
      received = sent = elements * plan.blocks * plan.splits * wide_bytes(problem.math);
    }
    switch (plan.tier) {
      case Tier::kCluster:
        return clocks + speed.cluster + plan.blocks * speed.cluster_block +
               std::max(sent, received) * speed.cluster_byte;
      case Tier::kGrid:
        return clocks + speed.grid +
               (sent + received) * (speed.grid_byte + plan.blocks * plan.groups * speed.l2_byte);
      default:
        return clocks + speed.block;
    }
  }

  // Of a call, before its first step.
  double fill_clocks(const LayerPlan& plan) const {
    return (kFill + plan.shared_bytes / kFillBytes) * (problem.backward ? 2 : 1);
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
      const int64_t tiles = ceil_div(problem.batch, rows);
      bool fits = false;
      for (const int splits : {1, 2, 4, 8}) {
        Choice choice;
        LayerPlan& plan = choice.plan;
        plan = {.tier = tier,
                .math = problem.math,
                .backward = problem.backward,
                .gates = problem.gates,
                .units = units,
                .blocks = blocks,
                .rows = rows,
                .groups = static_cast<int>(std::min<int64_t>(tiles, resident))};
        if (!choose_threads(plan, splits)) break;
        const LayerTiles shape = tiles_of(plan);
        plan.shared_bytes = 16 * shared_layout(problem.math, tier, problem.backward, problem.gates,
                                               problem.hidden, shape, plan.threads)
                                     .end;
        if (plan.shared_bytes > device.shared_bytes) {
          if (least_shared < 0 || plan.shared_bytes < least_shared)
            least_shared = plan.shared_bytes;
          break;  // more splits need more
        }
        fits = true;
        if (tier == Tier::kGrid)
          plan.exchange_bytes =
              16 * plan.groups * exchange_of(problem.math, problem.backward, problem.hidden, shape);
        choice.clocks = step_clocks(plan) * ceil_div(tiles, plan.groups) +
                        fill_clocks(plan) / static_cast<double>(problem.steps);
        best.keep_better(choice);
      }
      if (!fits) break;  // more rows need more
      if (tiles == 1) break;
    }
    return best;
  }

  Choice best_of(Tier tier) {
    Choice best;
    least_shared = -1;
    // What a block's units are a multiple of.
    const int least = problem.backward ? kUnits : units_of_tile(problem.gates);
    const int all = static_cast<int>(ceil_div(problem.hidden, least) * least);
    if (tier == Tier::kBlock) return best_rows(tier, all);
    if (tier == Tier::kCluster) {
      for (int64_t blocks = 2; blocks <= std::min<int64_t>(kLargestCluster, all / least);
           ++blocks) {
        const int units = static_cast<int>(ceil_div(all / least, blocks)) * least;
        if (ceil_div(all, units) == blocks) best.keep_better(best_rows(tier, units));
      }
      return best;
    }
    for (const int units : {8, 16, 24, 32, 48, 64, 96, 128})
      if (units % least == 0 && units < all &&
          ceil_div(problem.hidden, units) <= device.multiprocessors)
        best.keep_better(best_rows(tier, units));
    return best;
  }

  double steps_clocks() const {
    const double weights = 1.0 * problem.gates * problem.hidden * problem.hidden;
    const double rate = multiply_adds_per_clock(problem.math, device) * speeds().steps_rate;
    // A GEMM of few rows takes as long as one of some more, but for a single row.
    const int64_t least_rows = problem.batch == 1 ? 1 : uses_tensor_cores(problem.math) ? 128 : 48;
    return speeds().steps + std::max(weights * std::max(problem.batch, least_rows) / rate,
                                     weights * element_bytes(problem.math) / kL2Bytes) /
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
std::string microseconds(double clocks) { return number(clocks / kClocksPerUs) + " us"; }

bool is_one_step(const LayerProblem& problem, const DeviceLimits& device) {
  const double products =  // I = H
      2.0 * problem.gates * problem.hidden * problem.hidden * problem.batch;
  return problem.steps == 1 && !problem.backward &&
         (problem.batch <= kOneStepRows || products <= kOneStepProducts * device.multiprocessors);
}

constexpr const char* kSubjects[] = {"one block", "a cluster", "the grid", "a product per step"};

}  // namespace

LayerPlan plan_layer(const LayerProblem& problem, const DeviceLimits& device) {
  LayerPlan steps = {.tier = Tier::kSteps,
                     .math = problem.math,
                     .backward = problem.backward,
                     .gates = problem.gates};
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
  if (problem.hidden == 0) {
    steps.why = "a layer without units has nothing to keep";
    return steps;
  }
  if (problem.batch >= int64_t{1} << 30) {
    steps.why = "the kernels that keep weights resident count rows in 32 bits";
    return steps;
  }
  if (device.major < 8) {
    steps.why = "the kernels that keep weights resident need compute capability 8.0, this is " +
                std::to_string(device.major) + "." + std::to_string(device.minor);
    return steps;
  }
  Planner planner{problem, device};
  const double weights =
      1.0 * problem.gates * problem.hidden * problem.hidden * element_bytes(problem.math);
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
  LayerPlan& plan = best.plan;
  plan.why = "about " + microseconds(best.clocks) + a_step;
  if (plan.tier != Tier::kSteps)
    plan.why += " with " + std::to_string(plan.blocks) +
                (plan.blocks == 1 ? " block of " : " blocks of ") + std::to_string(plan.units) +
                " units and " + kilobytes(plan.shared_bytes) + " in each group";
  plan.why += passed_over;
  return plan;
}

DeviceLimits less_than(const LayerPlan& plan, DeviceLimits device) {
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
