// What the kernels of norms share: rows, their vectors of eight, parameters of a norm, and sums
// over a row in the order of host/norm.h.
#pragma once

#include "core/device/dispatch.cuh"
#include "core/device/reduce.cuh"
#include "core/device/rounding.cuh"
#include "host/norm.h"

namespace fp8::core {

template <typename T>
constexpr Dtype kDtypeOf = std::is_same_v<T, float>           ? Dtype::kFloat32
                           : std::is_same_v<T, __nv_bfloat16> ? Dtype::kBFloat16
                                                              : Dtype::kFloat16;

// A tensor's rows, as a kernel has them. vectorized: each begins on 16 bytes.
template <typename T>
struct RowsOf {
  T* data = nullptr;
  NormRows at;
  bool vectorized = false;

  __device__ __forceinline__ T* row(int64_t index) const {
    if (at.n1 * at.n2 == 1) return data + index * at.stride0;
    const auto r = static_cast<uint32_t>(index);  // rows are fewer than 2^30
    const auto n2 = static_cast<uint32_t>(at.n2);
    const auto n1 = static_cast<uint32_t>(at.n1);
    const uint32_t outer = r / n2;
    const uint32_t i = outer / n1;
    return data + i * at.stride0 + (outer - i * n1) * at.stride1 + (r - outer * n2) * at.stride2;
  }
};

template <typename T>
RowsOf<T> rows_of(T* data, const NormRows& at) {
  const auto whole = [](int64_t stride) { return stride * static_cast<int64_t>(sizeof(T)) % 16; };
  const bool vectorized = reinterpret_cast<uintptr_t>(data) % 16 == 0 && whole(at.stride0) == 0 &&
                          whole(at.stride1) == 0 && whole(at.stride2) == 0;
  return {data, at, vectorized};
}

inline NormRows contiguous_rows(int64_t cols) { return {.stride0 = cols}; }

// Weight and bias in elements of W, and how a form uses them.
template <typename W>
struct NormParameters {
  const W* weight;  // or nullptr
  const W* bias;    // or nullptr
  bool vectorized;
  bool one_plus;
  bool round_first;

  __device__ __forceinline__ void factors(int col, int valid, float (&out)[8]) const {
    if (weight == nullptr) {
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = 1.0F;
      return;
    }
    const Vec8<W> v = load8(weight + col, valid, vectorized);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = norm_factor(v.get(i), one_plus);
  }
};

template <typename W>
NormParameters<W> parameters_of(const NormArgs& args) {
  const auto on_16 = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return {.weight = static_cast<const W*>(args.weight),
          .bias = static_cast<const W*>(args.bias),
          .vectorized = on_16(args.weight) && on_16(args.bias),
          .one_plus = args.form == NormForm::kScaleByOnePlus,
          .round_first = args.form == NormForm::kRoundThenScale};
}

__device__ __forceinline__ float joined8(const float (&v)[8]) {
  return add(add(add(v[0], v[1]), add(v[2], v[3])), add(add(v[4], v[5]), add(v[6], v[7])));
}

// The threads of a row wait for each other; a block has up to 16 such groups of more than a warp.
__device__ __forceinline__ void wait_for_row(int slot, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(slot + 1), "r"(threads) : "memory");
}

// Every thread of a row gets its kCount sums. scratch: kCount words a warp, not those of the call
// before.
template <int kCount>
__device__ __forceinline__ void sum_over_row(float (&values)[kCount], int slot, int threads_per_row,
                                             float* scratch) {
  for (int offset = min(threads_per_row, 32) / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      values[k] = add(values[k], __shfl_xor_sync(0xFFFFFFFFU, values[k], offset));
    }
  }
  if (threads_per_row <= 32) return;
  const int warps = threads_per_row / 32;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) scratch[threadIdx.x / 32 * kCount + k] = values[k];
  }
  wait_for_row(slot, threads_per_row);
  const float* of_row = scratch + slot * warps * kCount;
#pragma unroll
  for (int k = 0; k < kCount; ++k) values[k] = of_row[k];
  for (int w = 1; w < warps; ++w) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) values[k] = add(values[k], of_row[w * kCount + k]);
  }
}

// f(Type<T>, Type<W>) for what a norm's elements and its weight's are.
template <typename F>
void dispatch_norm(const NormArgs& args, const F& f) {
  require(args.weight_dtype == args.dtype || args.weight_dtype == Dtype::kFloat32,
          "norms expect a weight in x's dtype or float32");
  require(
      args.rows > 0 && args.cols > 0 && args.rows < kMaxNormExtent && args.cols < kMaxNormExtent,
      "norms expect a matrix that is not empty, of fewer than 2^30 rows and columns");
  dispatch_input(args.dtype, [&](auto input) {
    using T = typename decltype(input)::type;
    if constexpr (!std::is_same_v<T, float>) {
      if (args.weight_dtype != Dtype::kFloat32) return f(Type<T>{}, Type<T>{});
    }
    f(Type<T>{}, Type<float>{});
  });
}

}  // namespace fp8::core
