// Whether eight elements can raise an amax at all, told from approximations that cost a third of
// the elements themselves: the amax passes compute only those that may. What they leave is exact.
//
// An approximation is at least the exact magnitude times (1 - 2^-7), whatever the input; where it
// is larger than that, the elements are computed for nothing. So what is less than (1 - 2^-6) of it
// cannot raise the amax. Inf and NaN pass no limit.
#pragma once

#include "core/device/reduce.cuh"
#include "core/mlp/unit.cuh"

namespace fp8::core {

// Units that have a screen: silu in bf16. Rounding to bf16 costs at most 2^-9 each time, twice;
// fp16 would lose more where it has no exponents left.
inline bool has_screen(const MlpUnitArgs& unit) {
  return unit.dtype == Dtype::kBFloat16 && unit.activation == MlpActivation::kSilu;
}

// The amax that the warps of a block have found so far: each raises its own, and learns of the
// others' once in a turn.
class RisingAmax {
 public:
  // of_block: in shared memory, 0 at first.
  __device__ __forceinline__ explicit RisingAmax(uint32_t* of_block) : of_block_(of_block) {}

  // Every lane of the warp calls it.
  __device__ __forceinline__ void exchange() {
    uint32_t others = 0;
    if (threadIdx.x % 32 == 0) others = atomicMax(of_block_, bits_);
    bits_ = max(bits_, __shfl_sync(0xFFFFFFFFU, others, 0));
  }
  // Whether an estimate of any lane may be above it. Every lane calls it.
  __device__ __forceinline__ bool may_rise(float estimate) const {
    const bool below = estimate < __uint_as_float(bits_) * (1.0F - 0x1p-6F);
    return __any_sync(0xFFFFFFFFU, !below);
  }
  // By exact magnitudes of each lane. Every lane calls it.
  __device__ __forceinline__ void raise(uint32_t bits) { bits_ = max(bits_, warp_max(bits)); }

 private:
  uint32_t* of_block_;
  uint32_t bits_ = 0;
};

// Of NaN and a number it is NaN.
__device__ __forceinline__ float greater(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// More than what rounding to bf16's smallest numbers can add.
constexpr float kRoundingOfSmall = 0x1p-132F;

// 1 / (1 + exp(-x)) and more where x is so low that this is no normal number.
__device__ __forceinline__ float logistic_estimate(float x) {
  return approximate_reciprocal(1.0F + approximate_exp2(fminf(x * -kLog2e, 125.0F)));
}

// Of |h| of eight.
template <typename T, bool kGated>
__device__ __forceinline__ float h_estimate(const Vec8<T>& gate, const Vec8<T>& up) {
  float most = 0.0F;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float x = gate.get(i);
    float h = __fmaf_rn(fabsf(x), logistic_estimate(x), kRoundingOfSmall);
    if constexpr (kGated) h *= fabsf(up.get(i));
    most = greater(most, h);
  }
  return most;
}

struct GradientEstimates {
  float gate;
  float up;
};

// Of the magnitudes of both gradients of eight. A product with up that bf16 rounds to Inf counts
// as such.
template <typename T, bool kGated>
__device__ __forceinline__ GradientEstimates gradient_estimates(const Vec8<T>& gate,
                                                                const Vec8<T>& up,
                                                                const Vec8<T>& dh) {
  GradientEstimates most{0.0F, 0.0F};
  float most_da = 0.0F;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float x = gate.get(i);
    const float dy = fabsf(dh.get(i));
    const float s = logistic_estimate(x);
    float da = dy;
    if constexpr (kGated) {
      da = __fmaf_rn(dy, fabsf(up.get(i)), kRoundingOfSmall);
      most_da = greater(most_da, da);
      most.up = greater(most.up, __fmaf_rn(fabsf(x), s, kRoundingOfSmall) * dy);
    }
    // 1 + x (1 - s) is exact to 2^-20 |x| s; its smallest magnitude at any x in bf16 is 2^-8.5.
    const float slope = fabsf(__fmaf_rn(x, 1.0F - s, 1.0F)) + 0x1p-14F;
    most.gate = greater(most.gate, da * s * slope);
  }
  if (kGated && !(most_da < 0x1p127F)) most.gate = INFINITY;
  return most;
}

}  // namespace fp8::core
