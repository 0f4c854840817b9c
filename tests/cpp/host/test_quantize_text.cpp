// The lines of FP8_PRINT_PLAN for quantizations: what is made of what, and each launch.
#include <array>
#include <catch2/catch.hpp>
#include <set>
#include <string>
#include <vector>

#include "host/quantize_text.h"

using namespace fp8::core;

namespace {

float memory[4];  // pointers are looked at, not read

QuantizeArgs problem() {
  return {
      .x = memory, .rows = 200, .cols = 96, .ld = 96, .data = {memory, 208, 96}, .scale = memory};
}

std::string how(const QuantizeArgs& args, const QuantizeFacts& facts) {
  const std::string line = plan_line(args, 0, facts, 0);
  return line.substr(line.find(" | ") + 3);
}

}  // namespace

TEST_CASE("a line has the problem, the launches and the workspace") {
  QuantizeArgs args = problem();
  args.data_t = {memory, 96, 208};
  args.column_sum = memory;
  args.power_of_two = true;
  const StatisticsPlan statistics =
      plan_statistics(200, 96, 96, {.cols = true}, /*sm_count=*/132, /*max_cluster=*/1);
  const CastPlan cast = plan_cast(208, 96, /*per_axis=*/false, /*sm_count=*/132);
  REQUIRE(plan_line(args, 1, {.statistics = &statistics, .cast = &cast}, 4096) ==
          "fp8 plan: cuda:1 quantize rows=200 cols=96 ld=96 x=bfloat16 out=float8_e4m3fn tensorwise"
          " scale=dynamic power_of_two makes=data,data_t,column_sum:float32"
          " | statistics grid=1x25 cluster=1x1 + cast blocks=4 workspace=4096 launches=2");
  REQUIRE(plan_line(problem(), -1, {}, 0) ==
          "fp8 plan: cpu quantize rows=200 cols=96 ld=96 x=bfloat16 out=float8_e4m3fn tensorwise"
          " scale=dynamic makes=data | reference workspace=0 launches=0");
}

TEST_CASE("each way of quantizing names its launches") {
  const CooperativePlan plan{.col_tiles = 64, .tiles = 4096, .blocks = 264};
  REQUIRE(how(problem(), {.cooperative = &plan}) ==
          "cooperative blocks=264 workspace=0 launches=1");

  const CastPlan cast = plan_cast(208, 96, false, 132);
  REQUIRE(how(problem(), {.cast = &cast}) == "cast blocks=4 workspace=0 launches=1");
  REQUIRE(how(problem(), {.cast = &cast, .settle_blocks = 4}) ==
          "cast blocks=4 + settle blocks=4 workspace=0 launches=2");

  const RowwisePlan rowwise = plan_rowwise(96, /*block_threads=*/128);
  REQUIRE(how(problem(), {.rowwise = &rowwise}) ==
          "rowwise blocks=52 threads=128 iterations=1 workspace=0 launches=1");

  QuantizeArgs maxima = problem();
  maxima.column_amax = memory;
  maxima.group_rows = 100;
  const ColumnAmaxPlan columns = plan_column_amax(200, 100, 96, 128, 132);
  REQUIRE(how(maxima, {.rowwise = &columns.row, .column_amax = &columns}) ==
          "rowwise blocks=14 threads=128 iterations=1 workspace=0 launches=1");
  REQUIRE(plan_line(maxima, 0, {}, 0).find(" makes=data,column_amax ") != std::string::npos);

  QuantizeArgs sums = problem();
  sums.column_sum = memory;
  const BlockwisePlan blockwise = plan_blockwise(208, 96, 96, 208);
  REQUIRE(how(problem(), {.blockwise = &blockwise}) == "blockwise blocks=2 workspace=0 launches=1");
  REQUIRE(how(sums, {.blockwise = &blockwise}) ==
          "blockwise blocks=2 + column_sum workspace=0 launches=2");
}

TEST_CASE("where the scale comes from") {
  QuantizeArgs args = problem();
  REQUIRE(std::string(scaling_name(args)) == "dynamic");
  args.scaling = StaticScale{memory};
  REQUIRE(std::string(scaling_name(args)) == "static");
  args.scaling = KnownAmax{memory};
  REQUIRE(std::string(scaling_name(args)) == "known_amax");
  uint32_t history = 0;
  args.scaling = Delayed{&history};
  REQUIRE(std::string(scaling_name(args)) == "delayed");
  args.column_sum = memory;
  REQUIRE(std::string(scaling_name(args)) == "dynamic_for_delayed");
}

TEST_CASE("different quantizations have different lines; calls and pointers make none") {
  std::vector<QuantizeArgs> others(15, problem());
  others[1].rows = 8;
  others[2].cols = 80;
  others[3].ld = 128;
  others[4].x_dtype = Dtype::kFloat16;
  others[5].dtype = Dtype::kE5M2;
  others[6].granularity = Granularity::kRowwise;
  others[7].granularity = Granularity::kBlock1x128;
  others[8].granularity = Granularity::kBlock128x128;
  others[9].power_of_two = true;
  others[10].data_t = {memory, 96, 208};
  others[11].scaling = StaticScale{memory};
  others[12].column_sum = memory;
  others[13].amax_out = memory;
  others[14].scaling = KnownAmax{memory};
  std::set<std::string> lines;
  for (const QuantizeArgs& args : others) lines.insert(plan_line(args, 0, {}, 0));
  REQUIRE(lines.size() == others.size());

  QuantizeArgs delayed = problem();
  std::array<uint32_t, 2> history{};
  delayed.scaling = Delayed{history.data()};
  const std::string line = plan_line(delayed, 0, {}, 0);
  delayed.scaling = Delayed{history.data() + 1};
  REQUIRE(plan_line(delayed, 0, {}, 0) == line);
}
