// The lines of FP8_PRINT_PLAN: everything that tells problems apart is in them, each comes once.
#include <atomic>
#include <catch2/catch.hpp>
#include <set>
#include <thread>
#include <vector>

#include "host/plan_text.h"

using namespace fp8::core;

namespace {

MatmulArgs problem() {
  MatmulArgs args{.m = 8, .n = 32, .k = 48};
  args.lda = args.ldb = 48;
  args.ldo = 32;
  return args;
}

}  // namespace

TEST_CASE("a line has problem, algorithm, workspace and launches") {
  REQUIRE(plan_line(problem(), 1, {"cublasLt algo=66 tile=20", 4096, 2}) ==
          "fp8 plan: cuda:1 matmul m=8 n=32 k=48 lda=48 ldb=48 ldo=32 a=float8_e4m3fn "
          "b=float8_e4m3fn out=bfloat16 tensorwise fast_accum | cublasLt algo=66 tile=20 "
          "workspace=4096 launches=2");
  const std::string fallback = plan_line(problem(), -1, {.algorithm = "reference", .launches = 0});
  REQUIRE_THAT(fallback, Catch::StartsWith("fp8 plan: cpu matmul "));
  REQUIRE_THAT(fallback, Catch::EndsWith("| reference workspace=0 launches=several"));
}

TEST_CASE("block scales are named for each operand, without fast accumulation") {
  MatmulArgs args = problem();
  args.granularity = Granularity::kBlock1x128;
  args.granularity_b = Granularity::kBlock128x128;
  REQUIRE_THAT(plan_line(args, 0, {}), Catch::Contains(" out=bfloat16 1x128*128x128 |"));
}

TEST_CASE("different problems have different lines") {
  std::vector<MatmulArgs> others(16, problem());
  others[1].m = 9;
  others[2].n = 48;
  others[3].k = 64;
  others[4].lda = 64;
  others[5].ldb = 64;
  others[6].ldo = 64;
  others[7].a_dtype = Dtype::kE5M2;
  others[8].b_dtype = Dtype::kE5M2;
  others[9].out_dtype = Dtype::kFloat16;
  others[10].bias = &others;
  others[11].accumulate = true;
  others[12].fast_accum = false;
  others[13].granularity = Granularity::kRowwise;
  others[14].granularity = Granularity::kBlock1x128;
  others[15].granularity = Granularity::kBlock1x128;
  others[15].granularity_b = Granularity::kBlock128x128;
  std::set<std::string> lines;
  for (const MatmulArgs& args : others) lines.insert(plan_line(args, 0, {}));
  REQUIRE(lines.size() == others.size());
}

TEST_CASE("each line is first once, in two threads too") {
  FirstTimes first;
  std::atomic<int> firsts{0};
  const auto ask = [&] {
    for (int i = 0; i < 1000; ++i) firsts += first(std::to_string(i)) ? 1 : 0;
  };
  std::thread one(ask), two(ask);
  one.join();
  two.join();
  REQUIRE(firsts == 1000);
}
