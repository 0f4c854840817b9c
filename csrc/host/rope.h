// Rotary position embedding: its formula, and which rows a thread takes. For the kernel on a GPU
// and the CPU's pass alike.
#pragma once

#include <algorithm>

#include "fp8/core_rope.h"
#include "host/arithmetic.h"
#include "host/launch.h"

namespace fp8 {

namespace core {

constexpr int kRopeThreads = 128;    // of some hundred registers each
constexpr int kRopePairs = 8;        // of a row, that a thread takes at a time: 16 elements
constexpr int kRopeHeadBytes = 128;  // of one thread's loads before its first store
constexpr int64_t kMaxRopeItems = int64_t{1} << 32;

// Rows that share cos and sin, as the heads of a token do, which a thread reads for them once.
FP8_HOST_DEVICE constexpr int rope_heads(int element_bytes) {
  return kRopeHeadBytes / (2 * kRopePairs * element_bytes);
}

// Threads of a tensor: `units` of a row's 16 elements, times `chunks` of rows along the dimension
// `heads`, times the other dimensions.
struct RopePlan {
  int heads = -1;  // the longest dimension along which cos and sin stay the same; -1: none
  int64_t chunks = 1;
  int64_t rotary_units = 0;
  int64_t units = 0;
  int64_t items = 0;
};

inline RopePlan plan_rope(const RopeArgs& args, const RopeTensor& tensor, int element_bytes) {
  RopePlan plan;
  int64_t rows = 1;
  for (int i = 0; i < 3; ++i) {
    rows *= tensor.sizes[i];
    const bool same = tensor.cos_strides[i] == 0 && tensor.sin_strides[i] == 0;
    if (!same || tensor.sizes[i] <= 1) continue;
    if (plan.heads < 0 || tensor.sizes[i] > tensor.sizes[plan.heads]) plan.heads = i;
  }
  if (plan.heads >= 0) {
    rows /= tensor.sizes[plan.heads];
    plan.chunks = ceil_div(tensor.sizes[plan.heads], rope_heads(element_bytes));
  }
  plan.rotary_units = ceil_div(args.rotary / 2, kRopePairs);
  plan.units = plan.rotary_units + ceil_div(args.cols - args.rotary, 2 * kRopePairs);
  plan.items = rows * plan.chunks * plan.units;
  return plan;
}

}  // namespace core

// --- formula ------------------------------------------------------------------------------------

// What multiplies a pair (a, b): first = a * cos_a + b * by_b, second = b * cos_b + a * by_a. The
// transposed rotation turns back.
struct RopeFactors {
  float by_a;
  float by_b;
};

FP8_HOST_DEVICE inline RopeFactors rope_factors(float sin_a, float sin_b, bool transposed) {
  return transposed ? RopeFactors{-sin_a, sin_b} : RopeFactors{sin_b, -sin_a};
}

// Whether the backward rounds before it adds eager's zeros. Eager adds them to an fp32 sum, whose
// value that is too small for y's dtype keeps its sign as it becomes 0; but where columns are left
// alone their gradient is added too, in y's dtype, and after that no -0 is left.
FP8_HOST_DEVICE constexpr bool rope_rounds_before_zero(int64_t rotary, int64_t cols) {
  return rotary < cols;
}

}  // namespace fp8
