// Activations of an MLP's unit as PyTorch's CUDA kernels compute them: the same expressions in
// fp32, rounded to T where an operator of eager code would store its result. So a fused pass has
// the bits of the operators it takes the place of. (The CPU runs those operators.)
//
// An activation has
//   value<T, kFast>(x)          act(x), to be rounded
//   gradient<T, kFast>(dy, x)   act'(x) * dy, to be rounded
//   allows_fast<T>(x8)          whether the fast forms give the same bits for eight x; without it,
//                               kFast makes no difference
// A new one is a struct and a line of with_mlp_activation.
#pragma once

#include <type_traits>

#include "core/device/fast_sigmoid.cuh"
#include "core/device/vectors.cuh"
#include "fp8/core_mlp.h"

namespace fp8::core {

// As a store to memory and a load would. Converted in pairs: a single conversion is made by the
// unit of exponentials, at a quarter of the rate.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    uint32_t pair;  // bits of x's, then of zero's
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(x), "f"(0.0F));
    return __uint_as_float(pair);
  } else {
    return __low2float(__floats2half2_rn(x, 0.0F));
  }
}

__device__ __forceinline__ float approximate_exp2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ float approximate_reciprocal(float d) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
  return r;
}

constexpr float kLog2e = 1.44269504088896340736F;

// 1 / (1 + exp(-x)) to the bit. Fast: without a branch, for x >= kLeastFast.
template <bool kFast>
__device__ __forceinline__ float logistic(float x) {
  const float d = 1.0F + expf(-x);
  if constexpr (!kFast) return __fdiv_rn(1.0F, d);
  const float r = approximate_reciprocal(d);
  return __fmaf_rn(r, -__fmaf_rn(d, r, -1.0F), r);
}

struct Silu {
  // bf16: the fast value is rounded to the same bits for each of the 65,536 x that there are, as a
  // test shows on every GPU that it runs on (tests/cpp/core/test_mlp_gpu.cpp).
  template <typename T>
  static __device__ __forceinline__ bool allows_fast(const Vec8<T>& x) {
    bool allows = none_below_fast(x);
    if constexpr (!std::is_same_v<T, __nv_bfloat16>) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // the quotient below is that of others
        const float size = fabsf(x.get(i));
        allows = allows && size > 0x1p-100F && size < INFINITY;
      }
    }
    return allows;
  }
  template <typename T, bool kFast>
  static __device__ __forceinline__ float value(float x) {
    if constexpr (!kFast) {
      return __fdiv_rn(x, 1.0F + expf(-x));
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return x * approximate_reciprocal(1.0F + approximate_exp2(x * -kLog2e));
    } else {
      const float d = 1.0F + expf(-x);
      const float r = logistic<true>(x);
      float q = x * r;
      q = __fmaf_rn(r, __fmaf_rn(-d, q, x), q);
      return __fmaf_rn(r, __fmaf_rn(-d, q, x), q);
    }
  }
  template <typename T, bool kFast>
  static __device__ __forceinline__ float gradient(float dy, float x) {
    const float s = logistic<kFast>(x);
    return dy * s * (1.0F + x * (1.0F - s));
  }
  // Of a value whose gradient is asked for too: one exponential for both.
  template <typename T, bool kFast>
  static __device__ __forceinline__ float value_beside_gradient(float x) {
    if constexpr (kFast && std::is_same_v<T, __nv_bfloat16>) return x * logistic<true>(x);
    return value<T, kFast>(x);
  }
};

struct Gelu {
  static constexpr float kAlpha = 0.70710678118654752440F;                 // 1 / sqrt(2)
  static constexpr float kBeta = 1.12837916709551257390F * kAlpha * 0.5F;  // 1 / sqrt(2 pi)
  template <typename T, bool kFast>
  static __device__ __forceinline__ float value(float x) {
    return x * 0.5F * (1.0F + erff(x * kAlpha));
  }
  template <typename T, bool kFast>
  static __device__ __forceinline__ float gradient(float dy, float x) {
    const float cdf = 0.5F * (1.0F + erff(x * kAlpha));
    const float pdf = expf(-0.5F * x * x) * kBeta;
    return dy * (cdf + x * pdf);
  }
};

struct GeluTanh {
  // sqrt(2 / pi)
  static constexpr float kBeta = 1.41421356237309504880F * 1.12837916709551257390F * 0.5F;
  static constexpr float kKappa = 0.044715F;
  template <typename T, bool kFast>
  static __device__ __forceinline__ float value(float x) {
    const float x_cube = x * x * x;
    const float inner = kBeta * (x + kKappa * x_cube);
    return 0.5F * x * (1.0F + tanhf(inner));
  }
  template <typename T, bool kFast>
  static __device__ __forceinline__ float gradient(float dy, float x) {
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
  template <typename T, bool kFast>
  static __device__ __forceinline__ float value(float x) {
    return isnan(x) ? x : fmaxf(x, 0.0F);
  }
  template <typename T, bool kFast>
  static __device__ __forceinline__ float gradient(float dy, float x) {
    return x <= 0.0F ? 0.0F : dy;
  }
};

// square(relu(x))
struct ReluSquared {
  template <typename T, bool kFast>
  static __device__ __forceinline__ float value(float x) {
    const float r = Relu::value<T, kFast>(x);
    return r * r;
  }
  template <typename T, bool kFast>
  static __device__ __forceinline__ float gradient(float dy, float x) {
    const float slope = rounded<T>(2.0F * Relu::value<T, kFast>(x));
    return Relu::gradient<T, kFast>(rounded<T>(dy * slope), x);
  }
};

// What a unit's backward gives, rounded to T.
struct UnitGradients {
  float gate;
  float up;
  float h;
};

template <typename Act, typename T>
concept HasFastForm = requires(const Vec8<T>& x) { Act::allows_fast(x); };

// act(gate) * up, or act(gate) alone.
template <typename Act, typename T, bool kGated>
struct Unit {
  static constexpr bool kHasFastForm = HasFastForm<Act, T>;
  static __device__ __forceinline__ bool allows_fast(const Vec8<T>& gate,
                                                     const MlpUnitArgs& /*args*/) {
    return Act::allows_fast(gate);
  }
  template <bool kFast>
  static __device__ __forceinline__ float h(float gate, float up, const MlpUnitArgs& /*args*/) {
    const float a = rounded<T>(Act::template value<T, kFast>(gate));
    return kGated ? rounded<T>(a * up) : a;
  }
  template <bool kFast>
  static __device__ __forceinline__ UnitGradients backward(float gate, float up, float dh,
                                                           const MlpUnitArgs& /*args*/) {
    float a;
    if constexpr (kHasFastForm) {
      a = rounded<T>(Act::template value_beside_gradient<T, kFast>(gate));
    } else {
      a = rounded<T>(Act::template value<T, kFast>(gate));
    }
    const float da = kGated ? rounded<T>(dh * up) : dh;
    return {rounded<T>(Act::template gradient<T, kFast>(da, gate)),
            kGated ? rounded<T>(dh * a) : 0.0F, kGated ? rounded<T>(a * up) : a};
  }
};

// gpt-oss' unit, operator by operator. torch's clamps leave NaN, and pass it no gradient.
struct ClampedSilu {};
template <typename T, bool kGated>
struct Unit<ClampedSilu, T, kGated> {
  static constexpr bool kHasFastForm = true;
  static __device__ __forceinline__ float clamped(float x, float low, float high) {
    return isnan(x) ? x : fminf(fmaxf(x, low), high);
  }
  static __device__ __forceinline__ float gate_of(float gate, const MlpUnitArgs& args) {
    return rounded<T>(clamped(gate, -INFINITY, args.limit));
  }
  static __device__ __forceinline__ bool allows_fast(const Vec8<T>& gate, const MlpUnitArgs& args) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      all = all && !(rounded<T>(gate_of(gate.get(i), args) * args.alpha) < kLeastFast);
    }
    return all;
  }
  template <bool kFast>
  static __device__ __forceinline__ float sigmoid(float x) {
    return rounded<T>(logistic<kFast>(x));
  }
  template <bool kFast>
  static __device__ __forceinline__ float h(float gate, float up, const MlpUnitArgs& args) {
    const float g = gate_of(gate, args);
    const float u = rounded<T>(clamped(up, -args.limit, args.limit));
    const float s = sigmoid<kFast>(rounded<T>(g * args.alpha));
    return rounded<T>(rounded<T>(u + 1.0F) * rounded<T>(g * s));
  }
  template <bool kFast>
  static __device__ __forceinline__ UnitGradients backward(float gate, float up, float dh,
                                                           const MlpUnitArgs& args) {
    const float g = gate_of(gate, args);
    const float u1 = rounded<T>(rounded<T>(clamped(up, -args.limit, args.limit)) + 1.0F);
    const float s = sigmoid<kFast>(rounded<T>(g * args.alpha));
    const float glu = rounded<T>(g * s);
    const float d_glu = rounded<T>(dh * u1);
    const float d_s = rounded<T>(d_glu * g);
    const float d_t = rounded<T>(rounded<T>(d_s * rounded<T>(1.0F - s)) * s);
    // Eager code rounds both products in fp32 too: not one fused with the sum.
    const float d_g = rounded<T>(
        __fadd_rn(rounded<T>(__fmul_rn(d_glu, s)), rounded<T>(__fmul_rn(d_t, args.alpha))));
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
