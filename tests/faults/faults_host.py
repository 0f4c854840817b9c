"""Faults in host logic: one C++ test to compile."""

from __future__ import annotations

from fault import Fault

HOST = [
    Fault(
        "halves round up, not to even",
        "csrc/host/formats.h",
        "((clamped >> kShift) & 1U)",
        "1U",
        "ctest test_formats",
    ),
    Fault(
        "NaN becomes the largest value",
        "csrc/host/formats.h",
        "magnitude > 0x7F800000U ? kNanCode : code",
        "code",
        "ctest test_formats",
    ),
    Fault(
        "the last chunk of rows is skipped",
        "csrc/host/launch.h",
        "plan.row_chunks = ceil_div(plan.rows, plan.rows_per_chunk);",
        "plan.row_chunks = std::max<int64_t>(1, plan.rows / plan.rows_per_chunk);",
        "ctest test_launch",
    ),
    Fault(
        "a plan for fast accumulation serves split accumulation",
        "csrc/host/plan_key.h",
        "bits(accumulates_fast(args), 22)",
        "0",
        "ctest test_plan_cache",
    ),
    Fault(
        "the plan used last is forgotten first",
        "csrc/host/plan_cache.h",
        "if (found->second != entries_.begin()) {",
        "if (false) {",
        "ctest test_plan_cache",
    ),
    Fault(
        "the plan cache is read without its lock",
        "csrc/host/plan_cache.h",
        """  std::optional<Plan> find(const Key& key) {
    const std::lock_guard lock(mutex_);
""",
        "  std::optional<Plan> find(const Key& key) {\n",
        "tsan test_plan_cache",
    ),
]
