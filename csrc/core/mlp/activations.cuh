// Activations of an MLP's unit as PyTorch's CUDA kernels compute them: the same expressions in
// fp32, rounded to T where an operator of eager code would store its result. So a fused pass has
// the bits of the operators it takes the place of. (The CPU runs those operators.)
//
// An activation has
//   value<T>(x, usual)          act(x), to be rounded
//   gradient<T>(dy, x, usual)   act'(x) * dy, to be rounded
// `usual`: see quotient. A new one is a struct and a line of with_mlp_activation.
#pragma once

#include <type_traits>

#include "core/device/vectors.cuh"
#include "fp8/core_mlp.h"

namespace fp8::core {

// As a store to memory and a load would.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(__float2bfloat16_rn(x));
  } else {
    return __half2float(__float2half_rn(x));
  }
}

// 1 / d for d >= 1, without a branch. `usual` becomes false where that is not the quotient to the
// bit; without `usual` it always is.
__device__ __forceinline__ float reciprocal(float d, bool* usual) {
  if (usual == nullptr) return __fdiv_rn(1.0F, d);
  *usual = *usual && d < 0x1p126F;
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
  return __fmaf_rn(r, -__fmaf_rn(d, r, -1.0F), r);
}

// The same of x / d.
__device__ __forceinline__ float quotient(float x, float d, bool* usual) {
  if (usual == nullptr) return __fdiv_rn(x, d);
  *usual = *usual && fabsf(x) > 0x1p-100F;
  const float r = reciprocal(d, usual);
  float q = x * r;
  q = __fmaf_rn(r, __fmaf_rn(-d, q, x), q);
  return __fmaf_rn(r, __fmaf_rn(-d, q, x), q);
}

struct Silu {
  template <typename T>
  static __device__ __forceinline__ float value(float x, bool* usual) {
    return quotient(x, 1.0F + expf(-x), usual);
  }
  template <typename T>
  static __device__ __forceinline__ float gradient(float dy, float x, bool* usual) {
    const float s = reciprocal(1.0F + expf(-x), usual);
    return dy * s * (1.0F + x * (1.0F - s));
  }
};

struct Gelu {
  static constexpr float kAlpha = 0.70710678118654752440F;                 // 1 / sqrt(2)
  static constexpr float kBeta = 1.12837916709551257390F * kAlpha * 0.5F;  // 1 / sqrt(2 pi)
  template <typename T>
  static __device__ __forceinline__ float value(float x, bool* /*usual*/) {
    return x * 0.5F * (1.0F + erff(x * kAlpha));
  }
  template <typename T>
  static __device__ __forceinline__ float gradient(float dy, float x, bool* /*usual*/) {
    const float cdf = 0.5F * (1.0F + erff(x * kAlpha));
    const float pdf = expf(-0.5F * x * x) * kBeta;
    return dy * (cdf + x * pdf);
  }
};

struct GeluTanh {
  // sqrt(2 / pi)
  static constexpr float kBeta = 1.41421356237309504880F * 1.12837916709551257390F * 0.5F;
  static constexpr float kKappa = 0.044715F;
  template <typename T>
  static __device__ __forceinline__ float value(float x, bool* /*usual*/) {
    const float x_cube = x * x * x;
    const float inner = kBeta * (x + kKappa * x_cube);
    return 0.5F * x * (1.0F + tanhf(inner));
  }
  template <typename T>
  static __device__ __forceinline__ float gradient(float dy, float x, bool* /*usual*/) {
    const float x_sq = x * x;
    const float x_cube = x_sq * x;
    const float inner = kBeta * (x + kKappa * x_cube);
    const float tanh_inner = tanhf(inner);
    const float left = 0.5F * x;
    const float right = 1.0F + tanh_inner;
    const float left_derivative = 0.5F * right;
    const float tanh_derivative = 1.0F - tanh_inner * tanh_inner;
    const float inner_derivative = kBeta * (1.0F + 3.0F * kKappa * x_sq);
    const float right_derivative = left * tanh_derivative * inner_derivative;
    return dy * (left_derivative + right_derivative);
  }
};

struct Relu {
  template <typename T>
  static __device__ __forceinline__ float value(float x, bool* /*usual*/) {
    return isnan(x) ? x : fmaxf(x, 0.0F);
  }
  template <typename T>
  static __device__ __forceinline__ float gradient(float dy, float x, bool* /*usual*/) {
    return x <= 0.0F ? 0.0F : dy;
  }
};

// square(relu(x))
struct ReluSquared {
  template <typename T>
  static __device__ __forceinline__ float value(float x, bool* usual) {
    const float r = Relu::value<T>(x, usual);
    return r * r;
  }
  template <typename T>
  static __device__ __forceinline__ float gradient(float dy, float x, bool* usual) {
    return Relu::gradient<T>(rounded<T>(dy * rounded<T>(2.0F * Relu::value<T>(x, usual))), x,
                             usual);
  }
};

// What a unit's backward gives, rounded to T.
struct UnitGradients {
  float gate;
  float up;
  float h;
};

// act(gate) * up, or act(gate) alone.
template <typename Act, typename T, bool kGated>
struct Unit {
  static __device__ __forceinline__ float h(float gate, float up, const MlpUnitArgs& /*args*/,
                                            bool* usual) {
    const float a = rounded<T>(Act::template value<T>(gate, usual));
    return kGated ? rounded<T>(a * up) : a;
  }
  static __device__ __forceinline__ UnitGradients backward(float gate, float up, float dh,
                                                           const MlpUnitArgs& /*args*/,
                                                           bool* usual) {
    const float a = rounded<T>(Act::template value<T>(gate, usual));
    const float da = kGated ? rounded<T>(dh * up) : dh;
    return {rounded<T>(Act::template gradient<T>(da, gate, usual)),
            kGated ? rounded<T>(dh * a) : 0.0F, kGated ? rounded<T>(a * up) : a};
  }
};

// gpt-oss' unit, operator by operator. torch's clamps leave NaN, and pass it no gradient.
struct ClampedSilu {};
template <typename T, bool kGated>
struct Unit<ClampedSilu, T, kGated> {
  static __device__ __forceinline__ float clamped(float x, float low, float high) {
    return isnan(x) ? x : fminf(fmaxf(x, low), high);
  }
  static __device__ __forceinline__ float sigmoid(float x, bool* usual) {
    return rounded<T>(reciprocal(1.0F + expf(-x), usual));
  }
  static __device__ __forceinline__ float h(float gate, float up, const MlpUnitArgs& args,
                                            bool* usual) {
    const float g = rounded<T>(clamped(gate, -INFINITY, args.limit));
    const float u = rounded<T>(clamped(up, -args.limit, args.limit));
    const float s = sigmoid(rounded<T>(g * args.alpha), usual);
    return rounded<T>(rounded<T>(u + 1.0F) * rounded<T>(g * s));
  }
  static __device__ __forceinline__ UnitGradients backward(float gate, float up, float dh,
                                                           const MlpUnitArgs& args, bool* usual) {
    const float g = rounded<T>(clamped(gate, -INFINITY, args.limit));
    const float u1 = rounded<T>(rounded<T>(clamped(up, -args.limit, args.limit)) + 1.0F);
    const float s = sigmoid(rounded<T>(g * args.alpha), usual);
    const float glu = rounded<T>(g * s);
    const float d_glu = rounded<T>(dh * u1);
    const float d_s = rounded<T>(d_glu * g);
    const float d_t = rounded<T>(rounded<T>(d_s * rounded<T>(1.0F - s)) * s);
    const float d_g = rounded<T>(rounded<T>(d_glu * s) + rounded<T>(d_t * args.alpha));
    const bool inside = up >= -args.limit && up <= args.limit;
    return {gate <= args.limit ? d_g : 0.0F, inside ? rounded<T>(dh * glu) : 0.0F,
            rounded<T>(u1 * glu)};
  }
};

// f(Type): one branch for many units.
template <typename T>
struct ActivationType {
  using type = T;
};
template <typename F>
__device__ __forceinline__ void with_mlp_activation(MlpActivation activation, const F& f) {
  switch (activation) {
    case MlpActivation::kSilu:
      return f(ActivationType<Silu>{});
    case MlpActivation::kGelu:
      return f(ActivationType<Gelu>{});
    case MlpActivation::kGeluTanh:
      return f(ActivationType<GeluTanh>{});
    case MlpActivation::kRelu:
      return f(ActivationType<Relu>{});
    case MlpActivation::kReluSquared:
      return f(ActivationType<ReluSquared>{});
    case MlpActivation::kClampedSilu:
      return f(ActivationType<ClampedSilu>{});
  }
}

}  // namespace fp8::core
