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

// A row has a warp at least: compute-sanitizer's racecheck reports hazards in the sums over a
// block's rows where rows share one. What it sees there is not understood; no wrong result was.
inline NormPlan plan_norm_backward(const NormArgs& norm) {
  return plan_norm(norm.cols, norm_backward_vectors(norm.form == NormForm::kLayer, norm.dtype),
                   /*least_threads=*/32);
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

// One block to a multiprocessor: its threads need 128 registers.
inline NormParts plan_norm_parts(const NormPlan& plan, int64_t rows, int sm_count) {
  NormParts parts;
  parts.slots = plan.iterations > 1 ? 1 : kNormBackwardThreads / plan.threads_per_row;
  parts.parts = std::clamp<int64_t>(ceil_div(rows, parts.slots), 1, sm_count);
  return parts;
}

}  // namespace core

// --- formulas ---------------------------------------------------------------------------------

// From the sum of squares, of x or of x - mean.
FP8_HOST_DEVICE inline float rstd_of(float squares, float cols, float eps) {
  return divide(1.0F, root(add(divide(squares, cols), eps)));
}

// What multiplies xhat.
FP8_HOST_DEVICE inline float norm_factor(float weight, bool one_plus) {
  return one_plus ? add(1.0F, weight) : weight;
}

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
