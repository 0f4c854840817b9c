// What FP8_PRINT_PLAN=1 says of a quantization (host/print_plan.h): what is made of what, and in
// which launches.
//
//   fp8 plan: cuda:0 quantize rows=8192 cols=4096 ld=4096 x=bfloat16 out=float8_e4m3fn tensorwise
//   scale=dynamic makes=data,data_t | cooperative blocks=264 workspace=1056 launches=1
//
// Host logic: no CUDA, tested on any machine.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "fp8/core.h"
#include "host/formats.h"
#include "host/launch.h"
#include "host/print_plan.h"

namespace fp8::core {

// Where the scale comes from. With column sums a call of a history takes the amax of x itself.
inline const char* scaling_name(const QuantizeArgs& args) {
  if (std::holds_alternative<StaticScale>(args.scaling)) return "static";
  if (std::holds_alternative<KnownAmax>(args.scaling)) return "known_amax";
  if (std::holds_alternative<OwnAmax>(args.scaling)) return "dynamic";
  return is_delayed(args) ? "delayed" : "dynamic_for_delayed";
}

// The problem in one line.
inline std::string describe(const QuantizeArgs& args) {
  const auto number = [](int64_t value) { return std::to_string(value); };
  std::string makes;
  const auto make = [&](bool made, const std::string& what) {
    if (made) makes += (makes.empty() ? "" : ",") + what;
  };
  make(args.data.data != nullptr, "data");
  make(args.data_t.data != nullptr, "data_t");
  make(args.column_sum != nullptr, std::string("column_sum:") + dtype_name(args.column_sum_dtype));
  make(args.amax_out != nullptr, "amax");
  make(args.column_amax != nullptr, "column_amax");
  return "quantize rows=" + number(args.rows) + " cols=" + number(args.cols) +
         " ld=" + number(args.ld) + " x=" + dtype_name(args.x_dtype) +
         " out=" + dtype_name(args.dtype) + " " + granularity_name(args.granularity) +
         " scale=" + scaling_name(args) + (args.power_of_two ? " power_of_two" : "") +
         " makes=" + makes;
}

// How it runs: the plan of each launch that is made, nullptr for the others.
struct QuantizeFacts {
  const CooperativePlan* cooperative = nullptr;
  const StatisticsPlan* statistics = nullptr;
  const CastPlan* cast = nullptr;
  int64_t settle_blocks = 0;  // of the launch after a delayed cast
  const RowwisePlan* rowwise = nullptr;
  const ColumnAmaxPlan* column_amax = nullptr;  // with rowwise: how its blocks share the rows
  const BlockwisePlan* blockwise = nullptr;
};

// One text a launch, in order: "statistics grid=4x33 cluster=2x4", "cast blocks=4096".
inline std::vector<std::string> launches_of(const QuantizeArgs& args, const QuantizeFacts& facts) {
  const auto by = [](int64_t x, int64_t y) { return std::to_string(x) + "x" + std::to_string(y); };
  const auto blocks = [](int64_t count) { return " blocks=" + std::to_string(count); };
  std::vector<std::string> launches;
  if (const auto* plan = facts.cooperative)
    launches.push_back("cooperative" + blocks(plan->blocks));
  if (const auto* plan = facts.statistics) {
    launches.push_back("statistics grid=" +
                       by(round_up(plan->col_tiles, plan->cluster_x),
                          round_up(plan->row_chunks, plan->cluster_y)) +
                       " cluster=" + by(plan->cluster_x, plan->cluster_y));
  }
  if (const auto* plan = facts.cast) {
    launches.push_back("cast" + blocks(plan->col_tiles * plan->strips));
  }
  if (facts.settle_blocks > 0) launches.push_back("settle" + blocks(facts.settle_blocks));
  if (const auto* plan = facts.rowwise) {
    const int64_t count = facts.column_amax != nullptr
                              ? args.rows / args.group_rows * facts.column_amax->blocks_per_group
                              : ceil_div(args.data.rows, plan->rows_per_block);
    launches.push_back("rowwise" + blocks(count) +
                       " threads=" + std::to_string(plan->threads_per_row * plan->rows_per_block) +
                       " iterations=" + std::to_string(plan->iterations));
  }
  if (const auto* plan = facts.blockwise) {
    launches.push_back("blockwise" + blocks(plan->col_tiles * plan->row_tiles));
    if (args.column_sum != nullptr) launches.emplace_back("column_sum");
  }
  return launches;
}

// device: the CUDA index, or negative for the CPU, where nothing is launched.
inline std::string plan_line(const QuantizeArgs& args, int device, const QuantizeFacts& facts,
                             size_t workspace_bytes) {
  const std::vector<std::string> launches = launches_of(args, facts);
  std::string how = launches.empty() ? "reference" : "";
  for (const std::string& launch : launches) how += (how.empty() ? "" : " + ") + launch;
  return "fp8 plan: " + device_text(device) + " " + describe(args) + " | " + how +
         " workspace=" + std::to_string(workspace_bytes) +
         " launches=" + std::to_string(launches.size());
}

inline void print_plan(const QuantizeArgs& args, int device, const QuantizeFacts& facts,
                       size_t workspace_bytes) {
  print_first_time(plan_line(args, device, facts, workspace_bytes));
}

}  // namespace fp8::core
