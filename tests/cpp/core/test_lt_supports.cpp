// What is handed to cuBLASLt at all: its rules for FP8, and the guards for the defects of 13.1.
#include <catch2/catch.hpp>

#include "core/matmul/lt_matmul.h"

using namespace fp8::core;

namespace {

MatmulArgs problem() {
  MatmulArgs args;
  args.m = 7;
  args.n = 32;
  args.k = 48;
  args.lda = args.ldb = 48;
  args.ldo = 32;
  args.a = args.b = args.out = reinterpret_cast<void*>(0x1000);
  args.scale_a = args.scale_b = reinterpret_cast<float*>(0x1000);
  return args;
}

template <typename Change>
bool supported(const Change& change, int capability = 90) {
  MatmulArgs args = problem();
  change(args);
  return lt_supports(args, capability);
}

}  // namespace

TEST_CASE("devices and granularities") {
  const auto same = [](MatmulArgs&) {};
  const auto rowwise = [](MatmulArgs& a) { a.granularity = Granularity::kRowwise; };
  REQUIRE(supported(same, 90));
  REQUIRE(supported(same, 89));
  REQUIRE(supported(same, 100));
  REQUIRE_FALSE(supported(same, 80));
  REQUIRE(supported(rowwise, 90));
  REQUIRE_FALSE(supported(rowwise, 89));
  REQUIRE_FALSE(supported(rowwise, 100));
}

TEST_CASE("blocks") {
  const auto blocks = [](Granularity of_a, Granularity of_b, int capability = 90) {
    return supported(
        [&](MatmulArgs& a) {
          a.m = 8;
          a.granularity = of_a;
          a.granularity_b = of_b;
        },
        capability);
  };
  constexpr auto kRow = Granularity::kBlock1x128;
  constexpr auto kSquare = Granularity::kBlock128x128;
  REQUIRE(blocks(kRow, kSquare));
  REQUIRE(blocks(kSquare, kRow));
  REQUIRE(blocks(kRow, kRow));
  REQUIRE_FALSE(blocks(kSquare, kSquare));
  REQUIRE_FALSE(blocks(kRow, Granularity::kTensorwise));
  REQUIRE_FALSE(blocks(Granularity::kRowwise, kSquare));
  REQUIRE_FALSE(blocks(Granularity::kRowwise, Granularity::kTensorwise));
  REQUIRE_FALSE(blocks(kRow, kSquare, 89));
  REQUIRE_FALSE(blocks(kRow, kSquare, 100));

  const auto with = [](auto change) {
    return supported([&](MatmulArgs& a) {
      a.m = 8;
      a.granularity = kRow;
      change(a);
    });
  };
  REQUIRE(with([](MatmulArgs&) {}));  // both operands
  REQUIRE(with([](MatmulArgs& a) { a.accumulate = true; }));
  REQUIRE(with([](MatmulArgs& a) { a.fast_accum = true; }));  // without effect
  REQUIRE_FALSE(with([](MatmulArgs& a) { a.m = 7; }));
  REQUIRE_FALSE(with([](MatmulArgs& a) { a.n = a.ldo = 36; }));
  REQUIRE_FALSE(with([](MatmulArgs& a) { a.bias = reinterpret_cast<void*>(0x1000); }));
}

TEST_CASE("formats") {
  REQUIRE(supported([](MatmulArgs& a) { a.a_dtype = Dtype::kE5M2; }));
  REQUIRE(supported([](MatmulArgs& a) { a.b_dtype = Dtype::kE5M2; }));
  REQUIRE_FALSE(supported([](MatmulArgs& a) { a.a_dtype = a.b_dtype = Dtype::kE5M2; }));
  REQUIRE(supported([](MatmulArgs& a) { a.out_dtype = Dtype::kFloat32; }));
  REQUIRE_FALSE(supported([](MatmulArgs& a) { a.out_dtype = Dtype::kE4M3; }));
}

TEST_CASE("extents and alignments") {
  REQUIRE(supported([](MatmulArgs& a) { a.m = 1; }));
  REQUIRE_FALSE(supported([](MatmulArgs& a) { a.m = 0; }));
  REQUIRE_FALSE(supported([](MatmulArgs& a) { a.k = 40; }));
  REQUIRE_FALSE(supported([](MatmulArgs& a) { a.lda = 56; }));
  REQUIRE_FALSE(supported([](MatmulArgs& a) { a.n = 30; }));
  REQUIRE(supported([](MatmulArgs& a) { a.n = 40; }));
  REQUIRE_FALSE(supported([](MatmulArgs& a) { a.ldo = 36; }));
  REQUIRE_FALSE(supported([](MatmulArgs& a) { a.a = reinterpret_cast<void*>(0x1008); }));
  REQUIRE_FALSE(supported([](MatmulArgs& a) { a.out = reinterpret_cast<void*>(0x1002); }));
  // cuBLASLt 13.1 wants scales on 16 bytes; rows of 2 GiB give wrong results.
  REQUIRE_FALSE(supported([](MatmulArgs& a) { a.scale_b = reinterpret_cast<float*>(0x1004); }));
  REQUIRE_FALSE(supported([](MatmulArgs& a) { a.lda = int64_t{1} << 31; }));
}

TEST_CASE("bias") {
  const auto bias = [](Dtype out, Dtype dtype, bool accumulate = false) {
    return supported([&](MatmulArgs& a) {
      a.out_dtype = out;
      a.bias = reinterpret_cast<void*>(0x1000);
      a.bias_dtype = dtype;
      a.accumulate = accumulate;
    });
  };
  REQUIRE(bias(Dtype::kBFloat16, Dtype::kBFloat16));
  REQUIRE(bias(Dtype::kFloat16, Dtype::kFloat16));
  REQUIRE(bias(Dtype::kFloat32, Dtype::kBFloat16));
  REQUIRE_FALSE(bias(Dtype::kFloat32, Dtype::kFloat32));
  REQUIRE_FALSE(bias(Dtype::kBFloat16, Dtype::kFloat16));
  REQUIRE_FALSE(bias(Dtype::kBFloat16, Dtype::kBFloat16, true));
}
