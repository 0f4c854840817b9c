// How a grouped matmul runs on Hopper (core/matmul/grouped_mm.cpp), as a pure function of the
// problem, and what FP8_PRINT_PLAN=1 says of it:
//
//   fp8 plan: cuda:0 grouped_mm rows groups=128 m=65536 n=1536 k=2048 out=bfloat16 rowwise |
//   wgmma tile=128x128 in turn fast blocks=132 workspace=0 launches=1
//
// Host logic: no CUDA, tested on any machine.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "fp8/core_grouped.h"
#include "host/formats.h"
#include "host/launch.h"
#include "host/print_plan.h"

namespace fp8::core {

enum class Accumulation : uint8_t {
  kFast,    // in the tensor cores, over the whole contraction
  kSplit,   // there for 128 elements at a time, which fp32 registers add up
  kBlocks,  // so, each 128 times the scale of a's row and of b's square
};

// Up to here a tile's sums take so little time that storing it should not be waited for: 4 to 10%
// faster (H200, Qwen3-30B's experts); 15 to 30% slower at 28672, because smaller tiles are read
// more often.
inline constexpr int64_t kMaxInTurnContraction = 2048;

struct GroupedPlan {
  Accumulation accumulation = Accumulation::kFast;
  // Two warpgroups on one tile of 256 x 128; or each on its own of 128 x 128, in turn: while one
  // stores, the other multiplies.
  bool in_turn = false;
  int blocks = 0;  // of threads

  int tile_rows() const { return in_turn ? 128 : 256; }
};

// Whether a kernel of ours takes it, on a device that has them. Extents are kept in 32 bits.
inline bool suits_grouped_extents(const GroupedMmArgs& a) {
  constexpr int64_t kLimit = (int64_t{1} << 31) - 512;  // with a tile's extent added
  const int64_t rows_of_b = a.columns ? a.n : a.groups * a.n;
  const bool granularity = a.granularity == Granularity::kRowwise ||
                           (!a.columns && (a.granularity == Granularity::kTensorwise ||
                                           a.granularity == Granularity::kBlock1x128));
  return granularity && a.groups >= 1 && a.groups <= kMaxGroups && a.m > 0 && a.n > 0 && a.k > 0 &&
         a.n % 8 == 0 && a.k % 16 == 0 && a.m < kLimit && a.k < kLimit && rows_of_b < kLimit &&
         // tiles are counted in 32 bits too
         (a.columns ? a.groups * ceil_div(a.m, 128) : ceil_div(a.m, 128) + a.groups) *
                 ceil_div(a.n, 256) <
             kLimit;
}

inline GroupedPlan plan_grouped(const GroupedMmArgs& a, int sm_count) {
  GroupedPlan plan;
  plan.accumulation = a.granularity == Granularity::kBlock1x128 ? Accumulation::kBlocks
                      : a.fast_accum                            ? Accumulation::kFast
                                                                : Accumulation::kSplit;
  plan.in_turn =
      plan.accumulation == Accumulation::kFast && !a.columns && a.k <= kMaxInTurnContraction;
  plan.blocks = sm_count;
  return plan;
}

inline std::string describe(const GroupedMmArgs& a) {
  const auto number = [](int64_t value) { return std::to_string(value); };
  return std::string("grouped_mm ") + (a.columns ? "columns" : "rows") +
         " groups=" + number(a.groups) + " m=" + number(a.m) + " n=" + number(a.n) +
         " k=" + number(a.k) + " out=" + dtype_name(a.out_dtype) + " " +
         granularity_name(a.granularity) +
         (a.granularity == Granularity::kBlock1x128 ? "*128x128" : "") +
         (a.accumulate ? " accumulate" : "");
}

inline std::string describe(const GroupedPlan& plan) {
  return "wgmma tile=" + std::to_string(plan.tile_rows()) + "x128 " +
         (plan.in_turn ? "in turn " : "") +
         (plan.accumulation == Accumulation::kFast ? "fast" : "split") +
         " blocks=" + std::to_string(plan.blocks) + " workspace=0 launches=1";
}

inline std::string grouped_plan_line(const GroupedMmArgs& a, int device, const std::string& how) {
  return "fp8 plan: " + device_text(device) + " " + describe(a) + " | " + how;
}

}  // namespace fp8::core
