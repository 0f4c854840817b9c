// What FP8_PRINT_PLAN=1 says of a matmul (host/print_plan.h):
//
//   fp8 plan: cuda:0 matmul m=8192 n=4096 k=4096 lda=4096 ... tensorwise fast_accum |
//   cublasLt algo=66 tile=20 stages=35 splits=1 workspace=0 launches=1
//
// Host logic: no CUDA, tested on any machine.
#pragma once

#include <cstdint>
#include <string>

#include "fp8/core.h"
#include "host/formats.h"
#include "host/plan_key.h"
#include "host/print_plan.h"

namespace fp8::core {

// "rowwise", or "1x128*128x128": a's scales and b's.
inline std::string granularities(const MatmulArgs& args) {
  const char* a = granularity_name(args.granularity);
  if (!has_block_scales(args)) return a;
  return std::string(a) + "*" + granularity_name(granularity_of_b(args));
}

// The problem in one line, for messages and for the printed plans.
inline std::string describe(const MatmulArgs& args) {
  const auto number = [](int64_t value) { return std::to_string(value); };
  return "matmul m=" + number(args.m) + " n=" + number(args.n) + " k=" + number(args.k) +
         " lda=" + number(args.lda) + " ldb=" + number(args.ldb) + " ldo=" + number(args.ldo) +
         " a=" + dtype_name(args.a_dtype) + " b=" + dtype_name(args.b_dtype) +
         " out=" + dtype_name(args.out_dtype) + " " + granularities(args) +
         (args.bias != nullptr ? std::string(" bias=") + dtype_name(args.bias_dtype) : "") +
         (args.accumulate ? " accumulate" : "") + (accumulates_fast(args) ? " fast_accum" : "");
}

// How a problem runs. cuBLASLt's numbers are those of cublasLtMatmulAlgoConfigGetAttribute.
struct PlanFacts {
  std::string algorithm;  // "cublasLt algo=66 tile=20 stages=35 splits=1", or the other way taken
  size_t workspace_bytes = 0;
  int launches = 1;  // 0: several, by its options
};

inline std::string plan_line(const MatmulArgs& args, int device, const PlanFacts& facts) {
  return "fp8 plan: " + device_text(device) + " " + describe(args) + " | " + facts.algorithm +
         " workspace=" + std::to_string(facts.workspace_bytes) +
         " launches=" + (facts.launches > 0 ? std::to_string(facts.launches) : "several");
}

inline void print_plan(const MatmulArgs& args, int device, const PlanFacts& facts) {
  print_first_time(plan_line(args, device, facts));
}

}  // namespace fp8::core
