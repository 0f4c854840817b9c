// What the kernels of a norm's gradients share: their arguments, and what a thread makes of eight
// elements of x and dy.
#pragma once

#include "core/norm/norm.cuh"

namespace fp8::core {

// kRoundedRms: NormForm::kRoundThenScale of 16 bits, where fp32 has nothing to round.
enum class BackwardKind : uint8_t { kRms, kRoundedRms, kLayer };

template <typename T, typename W>
struct BackwardParams {
  RowsOf<const T> dy;
  RowsOf<const T> x;
  RowsOf<const T> addend;
  RowsOf<T> dx;
  NormParameters<W> of;
  const float* mean;
  const float* rstd;
  float* weight_parts;  // [parts, cols], or nullptr
  float* bias_parts;    // the same
  int64_t rows;
  int cols;
  int threads_per_row;
  bool pairs;  // NormPlan::pairs
  bool whole;  // rows lie on 16 bytes and have whole eights
  int ahead;   // rows on their way beside the one at hand
};

// What the forward left of a row.
struct RowStatistics {
  float mean;
  float rstd;
};

template <BackwardKind kKind, typename T, typename W>
__device__ __forceinline__ RowStatistics statistics_of(const BackwardParams<T, W>& p, int64_t row) {
  return {kKind == BackwardKind::kLayer ? __ldg(p.mean + row) : 0.0F, __ldg(p.rstd + row)};
}

// g = dy * factor, rounded where autograd rounds it, xhat, and what dy adds to the weight's
// gradient.
template <typename T, BackwardKind kKind>
struct Eight {
  static constexpr bool kLayer = kKind == BackwardKind::kLayer;
  static constexpr bool kRounds = kKind == BackwardKind::kRoundedRms;
  static constexpr int kSums = kLayer ? 2 : 1;  // over a row
  float dy[8];
  float x[8];
  float hat[8];
  float g[8];
  Vec8<T> rounded_g;  // where it is rounded

  template <typename W>
  __device__ __forceinline__ Eight(const Vec8<T>& dy_values, const Vec8<T>& x_values,
                                   const Vec8<W>& weight, float offset, const RowStatistics& row) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      dy[j] = dy_values.get(j);
      x[j] = x_values.get(j);
      hat[j] = norm_hat<kLayer>(x[j], row.mean, row.rstd);
      const float w = weight.get(j);
      g[j] = mul(dy[j], kKind == BackwardKind::kRms ? norm_factor(w, offset) : w);
    }
    if constexpr (kRounds) {
      rounded_g = rounded8<T>(g);
#pragma unroll
      for (int j = 0; j < 8; ++j) g[j] = rounded_g.get(j);
    }
  }
  // What the first `valid` add to the sums over a row: of g * x, or of g * xhat and of g. What is
  // not there is 0 in dy and in x, but not in xhat, which may be Inf. Never -0, so that zeros in
  // place of eights change nothing.
  __device__ __forceinline__ void row_terms(int valid, float (&sums)[kSums]) const {
    float terms[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) terms[j] = mul(g[j], kLayer ? hat[j] : x[j]);
    if (kLayer && valid < 8) {
#pragma unroll
      for (int j = 0; j < 8; ++j) terms[j] = j < valid ? terms[j] : 0.0F;
    }
    sums[0] = add(0.0F, joined8(terms));
    if constexpr (kLayer) sums[1] = add(0.0F, joined8(g));
  }
  __device__ __forceinline__ void weight_terms(float (&terms)[8]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) terms[j] = hat[j];
    if (kRounds) round8<T>(terms);
#pragma unroll
    for (int j = 0; j < 8; ++j) terms[j] = mul(dy[j], terms[j]);
    if (kRounds) round8<T>(terms);
  }
};

// T(addend + T(dx)).
template <typename T>
__device__ __forceinline__ Vec8<T> joined_dx(const Vec8<T>& addend, const Vec8<T>& dx) {
  float sum[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) sum[j] = add(addend.get(j), dx.get(j));
  return rounded8<T>(sum);
}

}  // namespace fp8::core
