// One gated unit, h = act(gate) * factor(up), and its derivatives: the formulas of every kernel on
// a GPU and of the CPU's. In fp32; what h is rounded to is the caller's affair.
#pragma once

#include <cmath>
#include <type_traits>

#include "fp8/core_grouped.h"
#include "host/formats.h"

namespace fp8 {

struct GatedUnit {
  float h;
  float d_gate;  // dh / dgate
  float d_up;    // dh / dup
};

// From here on 1 + exp(-x) < 2^126.
inline constexpr float kLeastFast = -87.0F;

// kFast: on a GPU, for x >= kLeastFast and NaN, 1 / d takes three instructions and no
// branch; it is the quotient to the bit.
template <bool kFast = false>
FP8_HOST_DEVICE float sigmoid(float x) {
  const float d = 1.0F + expf(-x);
#ifdef __CUDA_ARCH__
  if constexpr (kFast) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
    return __fmaf_rn(r, -__fmaf_rn(d, r, -1.0F), r);
  }
#endif
  return 1.0F / d;
}

// Whether a unit's formula has a sigmoid in it.
FP8_HOST_DEVICE constexpr bool has_sigmoid(core::Activation activation) {
  return activation == core::Activation::kSilu || activation == core::Activation::kClampedSilu;
}

// What the sigmoid of a unit that has one is taken of. alpha, limit: of kClampedSilu, here and
// below.
template <core::Activation kActivation>
FP8_HOST_DEVICE float sigmoid_argument(float gate, [[maybe_unused]] float alpha,
                                       [[maybe_unused]] float limit) {
  static_assert(has_sigmoid(kActivation));
  if constexpr (kActivation == core::Activation::kSilu) return gate;
  return alpha * (gate > limit ? limit : gate);
}

// kFast: of sigmoid.
template <core::Activation kActivation, bool kDerivatives, bool kFast = false>
FP8_HOST_DEVICE GatedUnit gated_unit(float gate, float up, [[maybe_unused]] float alpha,
                                     [[maybe_unused]] float limit) {
  using core::Activation;
  float act = 0.0F;
  float d_act = 0.0F;
  float factor = up;
  float d_factor = 1.0F;
  if constexpr (kActivation == Activation::kSilu) {
    const float s = sigmoid<kFast>(gate);
    act = gate * s;
    if (kDerivatives) d_act = s * (1.0F + gate * (1.0F - s));
  } else if constexpr (kActivation == Activation::kGelu) {
    const float cdf = 0.5F * (1.0F + erff(gate * 0.70710678F));
    act = gate * cdf;
    if (kDerivatives) d_act = cdf + gate * 0.39894228F * expf(-0.5F * gate * gate);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const float inner = 0.79788456F * (gate + 0.044715F * gate * gate * gate);
    const float t = tanhf(inner);
    act = 0.5F * gate * (1.0F + t);
    if (kDerivatives) {
      d_act = 0.5F * (1.0F + t) +
              0.5F * gate * (1.0F - t * t) * 0.79788456F * (1.0F + 3.0F * 0.044715F * gate * gate);
    }
  } else {
    // Clamps as torch does: NaN stays, and a value at the limit still has its gradient.
    const bool passes = !(gate > limit);
    const float clamped = passes ? gate : limit;
    const float s = sigmoid<kFast>(sigmoid_argument<kActivation>(gate, alpha, limit));
    act = clamped * s;
    if (kDerivatives && passes) d_act = s * (1.0F + alpha * clamped * (1.0F - s));
    const bool inside = !(up > limit) && !(up < -limit);
    factor = (inside ? up : up > 0.0F ? limit : -limit) + 1.0F;
    d_factor = inside ? 1.0F : 0.0F;
  }
  return {act * factor, d_act * factor, act * d_factor};
}

// f(std::integral_constant<core::Activation, activation>): one branch for many units.
template <typename F>
FP8_HOST_DEVICE void with_activation(core::Activation activation, const F& f) {
  using core::Activation;
  switch (activation) {
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kClampedSilu:
      return f(std::integral_constant<Activation, Activation::kClampedSilu>{});
  }
}

}  // namespace fp8
