// Norms: which thread has which columns of a row, hence the order of every sum, and the formulas,
// for the kernels on a GPU and the CPU's alike.
//
// Every operation is an fp32 one that rounds by itself: kernels must not contract a product and a
// sum, nor take approximations. That makes the bits those of eager PyTorch, but for the order of
// sums, and those of the CPU.
//
// Order of a sum over a row: eight elements in a row are joined in pairs. Eight number e belongs to
// thread e % threads_per_row, which adds its eights as they come; then the threads of a warp are
// joined, at distances that halve, then the warps in order.
// In the backward a row of up to 32 eights has a thread for each in that order. There a kernel's
// thread holds several (NormPlan::pairs) and joins them as those threads would.
#pragma once

#include <algorithm>
#include <cmath>

#include "fp8/core_norm.h"
#include "host/arithmetic.h"
#include "host/launch.h"

namespace fp8 {

namespace core {

struct NormPlan {
  int threads_per_row = 1;  // a power of two, at most kMaxRowThreads
  int iterations = 1;       // > 1: the row does not fit into registers and is read more than once
  // A thread's eights count as a thread's each: those at the largest distance are joined first.
  bool pairs = false;
};

constexpr int kNormVectors = 4;  // of eight elements, that a thread keeps in registers

// Beside two rows the backward keeps a sum for each column there, for LayerNorm two.
FP8_HOST_DEVICE constexpr int norm_backward_vectors(bool layer, Dtype dtype) {
  return layer || dtype == Dtype::kFloat32 ? 2 : kNormVectors;
}
constexpr int kNormForwardThreads = 256;  // of a block of short rows

// Of the columns alone.
inline NormPlan plan_norm(int64_t cols, int vectors = kNormVectors, int least_threads = 1) {
  NormPlan plan{.threads_per_row = least_threads};
  const int64_t eights = ceil_div(cols, 8);
  while (plan.threads_per_row < kMaxRowThreads &&
         eights > static_cast<int64_t>(plan.threads_per_row) * vectors) {
    plan.threads_per_row *= 2;
  }
  plan.iterations = static_cast<int>(
      std::max<int64_t>(1, ceil_div(eights, static_cast<int64_t>(plan.threads_per_row) * vectors)));
  return plan;
}

inline NormPlan plan_norm_backward(const NormArgs& norm) {
  const int vectors = norm_backward_vectors(norm.form == NormForm::kLayer, norm.dtype);
  const bool pairs = ceil_div(norm.cols, 8) <= 32;
  NormPlan plan = plan_norm(norm.cols, vectors, /*least_threads=*/pairs ? 1 : 32);
  plan.pairs = pairs;
  return plan;
}

// The gradients of weight and bias: block b of `parts` has `slots` rows at a time, from row b *
// slots on, every parts * slots-th. Each slot adds up its rows; slots that share a warp are joined
// in pairs, then the warps (or slots of more than one) in order: a partial result. kNormLanes lanes
// add up every kNormLanes-th of these, and are added up in order.
struct NormParts {
  int slots = 1;
  int64_t parts = 1;
};

constexpr int kNormLanes = 32;
constexpr int kNormBackwardThreads = 512;
constexpr int kNormSms = 132;  // for the CPU, so that it has the order of an H100 or H200

// One block to a multiprocessor: its threads need 128 registers, and most of the shared memory.
inline NormParts plan_norm_parts(const NormPlan& plan, int64_t rows, int sm_count) {
  NormParts parts;
  parts.slots = plan.iterations > 1 ? 1 : kNormBackwardThreads / plan.threads_per_row;
  parts.parts = std::clamp<int64_t>(ceil_div(rows, parts.slots), 1, sm_count);
  return parts;
}

}  // namespace core

// Division of numbers below 2^31 by one that is known before: a product and a shift.
struct Divisor {
  uint32_t magic = 0;  // 0: by 1
  uint32_t shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t by) {
    if (by <= 1) return;
    while ((uint64_t{2} << shift) < by) ++shift;  // 2^shift < by <= 2 * 2^shift
    magic = static_cast<uint32_t>(((uint64_t{1} << (32 + shift)) + by - 1) / by);
  }
  FP8_HOST_DEVICE uint32_t quotient(uint32_t number) const {
    const auto high = static_cast<uint32_t>(uint64_t{number} * magic >> 32);
    return magic == 0 ? number : high >> shift;
  }
};

// --- formulas ---------------------------------------------------------------------------------

// From the sum of squares, of x or of x - mean.
FP8_HOST_DEVICE inline float rstd_of(float squares, float cols, float eps) {
  return divide(1.0F, root(add(divide(squares, cols), eps)));
}

// What multiplies xhat: offset + weight, where an offset of -0 changes no weight.
inline float norm_offset(core::NormForm form, bool has_weight) {
  return form == core::NormForm::kScaleByOnePlus && has_weight ? 1.0F : -0.0F;
}
FP8_HOST_DEVICE inline float norm_factor(float weight, float offset) { return add(offset, weight); }

template <bool kLayer>
FP8_HOST_DEVICE inline float norm_hat(float x, float mean, float rstd) {
  return mul(kLayer ? sub(x, mean) : x, rstd);
}

// A row's constants of dx, from g = dy * factor: of RMSNorm the sum of g * x, of LayerNorm the sums
// of g and of g * xhat.
struct NormGradient {
  float rstd;
  float c;
  float sum;
  float product;
};

template <bool kLayer>
FP8_HOST_DEVICE inline NormGradient norm_gradient(float sum, float product, float rstd,
                                                  float cols) {
  if constexpr (kLayer) return {rstd, divide(rstd, cols), sum, product};
  // As autograd differentiates x * rsqrt(mean(x^2) + eps).
  const float cube = mul(mul(rstd, rstd), rstd);
  return {rstd, divide(mul(mul(-0.5F, product), cube), cols), 0.0F, 0.0F};
}

template <bool kLayer>
FP8_HOST_DEVICE inline float norm_dx(float g, float x, float hat, float cols,
                                     const NormGradient& row) {
  if constexpr (kLayer) {
    return mul(sub(sub(mul(cols, g), mul(hat, row.product)), row.sum), row.c);
  }
  return add(mul(g, row.rstd), mul(row.c, mul(2.0F, x)));
}

}  // namespace fp8
