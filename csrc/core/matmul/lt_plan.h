// What the lt_*.cpp files keep in a plan, and how they report a failure. Internal to fp8_core.
#pragma once

#include <cublasLt.h>

#include <cstring>
#include <string>
#include <type_traits>

#include "fp8/core.h"
#include "host/plan_text.h"

namespace fp8::core {

// What a plan's state holds. Descriptors are plain memory here: nothing to create, destroy or leak.
struct LtPlan {
  cublasLtMatmulDescOpaque_t desc;
  cublasLtMatrixLayoutOpaque_t a;
  cublasLtMatrixLayoutOpaque_t b;
  cublasLtMatrixLayoutOpaque_t out;
  cublasLtMatmulAlgo_t algo;
};
static_assert(sizeof(LtPlan) <= MatmulPlan::kStateBytes && std::is_trivially_copyable_v<LtPlan>);

inline LtPlan unpack(const MatmulPlan& plan) {
  LtPlan lt;
  std::memcpy(&lt, plan.state, sizeof(lt));
  return lt;
}

inline void check_lt(cublasStatus_t status, const char* call, const MatmulArgs& args) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw Error(std::string("fp8: ") + call + " failed with " + cublasLtGetStatusName(status) +
              " for " + describe(args));
}
#define FP8_LT_CHECK(call, args) check_lt((call), #call, args)

}  // namespace fp8::core
