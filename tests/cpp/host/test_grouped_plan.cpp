// How grouped matmuls are planned, and what is said of them.
#include <catch2/catch.hpp>

#include "host/grouped_plan.h"

using namespace fp8::core;

namespace {

GroupedMmArgs qwen() { return {.groups = 128, .m = 65536, .n = 1536, .k = 2048}; }

}  // namespace

TEST_CASE("grouped matmuls take the extents that tiles and copies can have") {
  REQUIRE(suits_grouped_extents(qwen()));
  const auto refused = [](auto change) {
    GroupedMmArgs args = qwen();
    change(args);
    return !suits_grouped_extents(args);
  };
  REQUIRE(refused([](auto& a) { a.n = 1532; }));
  REQUIRE(refused([](auto& a) { a.k = 2056; }));
  REQUIRE(refused([](auto& a) { a.m = 0; }));
  REQUIRE(refused([](auto& a) { a.groups = 0; }));
  REQUIRE(refused([](auto& a) { a.groups = kMaxGroups + 1; }));
  REQUIRE(refused([](auto& a) { a.m = int64_t{1} << 31; }));
  REQUIRE(refused([](auto& a) { a.n = int64_t{1} << 24; }));  // rows of b, of all groups
  REQUIRE(refused([](auto& a) { a.granularity = Granularity::kBlock128x128; }));
  REQUIRE(refused([](auto& a) {
    a.columns = true;
    a.granularity = Granularity::kBlock1x128;
  }));
  REQUIRE(refused([](auto& a) {  // tiles
    a.columns = true;
    a.m = a.n = int64_t{1} << 30;
  }));
}

TEST_CASE("grouped matmuls accumulate as they are asked to, and say so") {
  GroupedMmArgs args = qwen();
  REQUIRE(plan_grouped(args, 132).accumulation == Accumulation::kSplit);
  args.fast_accum = true;
  REQUIRE(plan_grouped(args, 132).accumulation == Accumulation::kFast);
  REQUIRE(grouped_plan_line(args, 0, describe(plan_grouped(args, 132))) ==
          "fp8 plan: cuda:0 grouped_mm rows groups=128 m=65536 n=1536 k=2048 out=bfloat16 rowwise"
          " | wgmma tile=128x128 in turn fast blocks=132 workspace=0 launches=1");
  args.k = 4096;
  REQUIRE(describe(plan_grouped(args, 132)) ==
          "wgmma tile=256x128 fast blocks=132 workspace=0 launches=1");
  args.k = 2048;
  args.granularity = Granularity::kBlock1x128;
  REQUIRE(plan_grouped(args, 132).accumulation == Accumulation::kBlocks);
  args.columns = true;
  args.accumulate = true;
  args.out_dtype = Dtype::kFloat32;
  REQUIRE(describe(args) ==
          "grouped_mm columns groups=128 m=65536 n=1536 k=2048 out=float32 1x128*128x128 "
          "accumulate");
}

TEST_CASE("transposed copies of groups have room for any sizes") {
  REQUIRE(padded_group(0) == 32);
  REQUIRE(padded_group(32) == 32);
  REQUIRE(padded_group(33) == 64);
  for (const int64_t groups : {1, 2, 7}) {
    for (int64_t rows = 0; rows < 200; ++rows) {
      // the most that groups can need: all but the last with one row
      const int64_t few = std::min(rows, groups - 1);
      const int64_t needed =
          (groups - 1) * padded_group(few > 0 ? 1 : 0) + padded_group(rows - few);
      REQUIRE(max_padded_rows(rows, groups) >= needed);
    }
  }
}
