// What the kernels of norms share: rows, their vectors of eight, parameters of a norm, and sums
// over a row in the order of host/norm.h.
#pragma once

#include <limits>

#include "core/device/dispatch.cuh"
#include "core/device/next_rows.cuh"
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
  Divisor n1;
  Divisor n2;
  int matrix_bytes = 0;  // from row to row of a matrix; -1: of another tensor
  bool vectorized = false;

  // Rows are fewer than 2^30.
  __device__ __forceinline__ T* row(int64_t index) const {
    if (matrix_bytes >= 0) {
      const int64_t bytes = int64_t{static_cast<int>(index)} * matrix_bytes;
      // Of a pointer, not of an integer: so that the compiler knows that this is global memory.
      using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
      return reinterpret_cast<T*>(reinterpret_cast<Byte*>(data) + bytes);
    }
    const auto r = static_cast<uint32_t>(index);
    const uint32_t outer = n2.quotient(r);
    const uint32_t i = n1.quotient(outer);
    return data + i * at.stride0 + (outer - i * static_cast<uint32_t>(at.n1)) * at.stride1 +
           (r - outer * static_cast<uint32_t>(at.n2)) * at.stride2;
  }
};

template <typename T>
RowsOf<T> rows_of(T* data, const NormRows& at) {
  const auto whole = [](int64_t stride) { return stride * static_cast<int64_t>(sizeof(T)) % 16; };
  const bool vectorized = reinterpret_cast<uintptr_t>(data) % 16 == 0 && whole(at.stride0) == 0 &&
                          whole(at.stride1) == 0 && whole(at.stride2) == 0;
  const int64_t bytes = at.stride0 * static_cast<int64_t>(sizeof(T));
  const bool matrix = at.n1 * at.n2 == 1 && bytes <= std::numeric_limits<int>::max();
  return {.data = data,
          .at = at,
          .n1 = Divisor(static_cast<uint32_t>(at.n1)),
          .n2 = Divisor(static_cast<uint32_t>(at.n2)),
          .matrix_bytes = matrix ? static_cast<int>(bytes) : -1,
          .vectorized = vectorized};
}

inline NormRows contiguous_rows(int64_t cols) { return {.stride0 = cols}; }

// Weight and bias in elements of W, and how a form uses them.
template <typename W>
struct NormParameters {
  const W* weight;  // or nullptr
  const W* bias;    // or nullptr
  bool vectorized;
  float offset;  // norm_offset()
  bool round_first;

  __device__ __forceinline__ void factors(int col, int valid, float (&out)[8]) const {
    if (weight == nullptr) {
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = 1.0F;
      return;
    }
    const Vec8<W> v = load8(weight + col, valid, vectorized);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = norm_factor(v.get(i), offset);
  }
};

template <typename W>
NormParameters<W> parameters_of(const NormArgs& args) {
  const auto on_16 = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return {.weight = static_cast<const W*>(args.weight),
          .bias = static_cast<const W*>(args.bias),
          .vectorized = on_16(args.weight) && on_16(args.bias),
          .offset = norm_offset(args.form, args.weight != nullptr),
          .round_first = args.form == NormForm::kRoundThenScale};
}

// A thread's eights of weight or bias, in registers for all of its rows where 16 of these hold
// them.
template <typename W, int kVectors>
struct HeldParameter {
  static constexpr bool kHeld = kVectors * Vec8<W>::kWords <= 16;

  const W* values;
  bool vectorized;
  float otherwise;
  Vec8<W> held[kHeld ? kVectors : 1];

  // otherwise: what stands for parameters that are not there.
  __device__ __forceinline__ HeldParameter(const W* values_, bool vectorized_, float otherwise_,
                                           int first_col, int stride, int cols)
      : values(values_), vectorized(vectorized_), otherwise(otherwise_) {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int col = first_col + i * stride;
        held[i] = load(col, of_eight(cols - col));
      }
    }
  }
  __device__ __forceinline__ Vec8<W> get(int i, int col, int valid) const {
    if constexpr (kHeld) return held[i];
    return load(col, valid);
  }
  // Without it the compiler keeps them unpacked, in twice the registers.
  __device__ __forceinline__ void forget() { forget_unpacked(held); }

 private:
  __device__ __forceinline__ Vec8<W> load(int col, int valid) const {
    if (values != nullptr) return load8(values + col, valid, vectorized);
    Vec8<W> v;
#pragma unroll
    for (int j = 0; j < 4; ++j) set_pair(v, j, otherwise, otherwise);
    return v;
  }
};

__device__ __forceinline__ float joined8(const float (&v)[8]) {
  return add(add(add(v[0], v[1]), add(v[2], v[3])), add(add(v[4], v[5]), add(v[6], v[7])));
}

// The threads of a row wait for each other; a block has up to 16 such groups of more than a warp.
__device__ __forceinline__ void wait_for_row(int slot, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(slot + 1), "r"(threads) : "memory");
}

// kCount sums over a row, which every thread of the row gets. scratch: kSumScratch<kCount> words on
// 16 bytes, or several times these.
template <int kCount>
constexpr int kSumScratch = kCount * kMaxRowThreads / 32;

template <int kCount>
class RowSums {
 public:
  static_assert(kCount == 1 || kCount == 2);

  __device__ __forceinline__ RowSums(int slot, int threads_per_row, const float* scratch)
      : slot_(slot), threads_(threads_per_row) {
    const auto lane = static_cast<int>(threadIdx.x) % 32;
    const auto warp = static_cast<int>(threadIdx.x) / 32;
    // Of two sums each half of a warp joins one.
    upper_ = kCount == 2 && lane >= 16;
    const uint32_t sums = static_cast<uint32_t>(__cvta_generic_to_shared(scratch)) +
                          (upper_ ? kMaxRowThreads / 32 * sizeof(float) : 0);
    of_row_ = sums + slot * (threads_per_row / 32) * sizeof(float);
    of_warp_ = lane % (kCount == 1 ? 32 : 16) == 0 ? sums + warp * sizeof(float) : kNowhere;
    // Else the compiler makes these addresses anew for each row.
    asm volatile("" : "+r"(of_row_), "+r"(of_warp_));
  }

  // part: of scratch, another than in the call before.
  __device__ __forceinline__ void join(float (&values)[kCount], int part) const {
    if (threads_ < 32) {
      for (int offset = threads_ / 2; offset > 0; offset /= 2) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) values[k] = add(values[k], across(values[k], offset));
      }
      return;
    }
    float sum = values[0];
    if constexpr (kCount == 1) {
      sum = add(sum, across(sum, 16));
    } else {
      const float other = upper_ ? values[0] : values[1];
      sum = add(upper_ ? values[1] : values[0], across(other, 16));
    }
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) sum = add(sum, across(sum, offset));
    if (threads_ > 32) sum = over_warps(sum, part * kSumScratch<kCount> * sizeof(float));
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      values[k] = kCount == 1 ? sum : __shfl_sync(0xFFFFFFFFU, sum, 16 * k);
    }
  }

 private:
  static constexpr uint32_t kNowhere = 0xFFFFFFFFU;

  static __device__ __forceinline__ float across(float value, int offset) {
    return __shfl_xor_sync(0xFFFFFFFFU, value, offset);
  }
  static __device__ __forceinline__ float4 load_four(uint32_t address) {
    float4 q;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(q.x), "=f"(q.y), "=f"(q.z), "=f"(q.w)
                 : "r"(address)
                 : "memory");
    return q;
  }
  // The warps' sums in order.
  __device__ __forceinline__ float over_warps(float sum, uint32_t offset) const {
    if (of_warp_ != kNowhere) {
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(of_warp_ + offset), "f"(sum) : "memory");
    }
    wait_for_row(slot_, threads_);
    const uint32_t sums = of_row_ + offset;
    if (threads_ == 64) {
      float2 two;
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                   : "=f"(two.x), "=f"(two.y)
                   : "r"(sums)
                   : "memory");
      return add(two.x, two.y);
    }
    float4 q = load_four(sums);
    float total = add(add(add(q.x, q.y), q.z), q.w);
#pragma unroll
    for (int i = 1; i < kMaxRowThreads / 128; ++i) {
      if (i >= threads_ / 128) break;
      q = load_four(sums + i * sizeof(float4));
      total = add(add(add(add(total, q.x), q.y), q.z), q.w);
    }
    return total;
  }

  int slot_;
  int threads_;
  bool upper_;
  uint32_t of_row_;
  uint32_t of_warp_;
};

// How many rows of `row_bytes` a block has on their way at a time, beside the one at hand.
inline int next_rows_in(size_t shared_bytes, size_t row_bytes) {
  const auto rows = static_cast<int>(shared_bytes / row_bytes) - 1;
  require(rows >= 0, "norms expect more shared memory than this GPU has");
  return std::min(rows, kMaxNextRows);
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
