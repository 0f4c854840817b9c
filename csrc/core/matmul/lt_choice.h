// Which of cuBLASLt's algorithms a problem runs with: the heuristic's choice, past the guards
// against what it offers wrongly. Internal to fp8_core. None of the choices may be made during
// capture: they ask cuBLASLt.
#pragma once

#include <cublasLt.h>

#include <vector>

#include "core/matmul/lt_plan.h"
#include "fp8/core.h"
#include "host/plan_text.h"

namespace fp8::core {

// The heuristic's first safe candidate for the problem that `lt` describes; not supported where
// there is none.
MatmulPlan first_choice(cublasLtHandle_t handle, const MatmulArgs& args, const LtPlan& lt);

// That one, then the other safe ones, at most `max`.
std::vector<MatmulPlan> all_choices(cublasLtHandle_t handle, const MatmulArgs& args,
                                    const LtPlan& lt, int max);

// An algorithm from elsewhere; not supported where cuBLASLt or the guards refuse it.
MatmulPlan given_choice(cublasLtHandle_t handle, const MatmulArgs& args, LtPlan lt,
                        const MatmulAlgorithm& algorithm);

// For FP8_PRINT_PLAN.
PlanFacts plan_facts(const MatmulPlan& plan);

}  // namespace fp8::core
