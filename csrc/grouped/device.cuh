// What the kernels of this folder share: groups and their rows on the device, rows of eight
// elements at a time.
#pragma once

#include "common/launch.h"
#include "common/reduce.cuh"
#include "fp8/core_grouped.h"
#include "quantize/dispatch.cuh"

namespace fp8::core {

// Rows that belong to a group; what lies behind them is nobody's.
__device__ __forceinline__ int64_t grouped_rows(const int32_t* offsets, int64_t groups,
                                                int64_t rows) {
  return groups == 0 ? 0 : min(static_cast<int64_t>(__ldg(offsets + groups - 1)), rows);
}

// The group of a row below the last offset: the first whose end lies behind it.
__device__ __forceinline__ int group_of(const int32_t* offsets, int64_t groups, int64_t row) {
  int low = 0;
  int high = static_cast<int>(groups) - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (__ldg(offsets + middle) > row) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

template <typename T>
__device__ __forceinline__ uint32_t to_bits(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return __float_as_uint(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  } else {
    return __half_as_ushort(__float2half_rn(value));
  }
}

// Elements 2 * pair and 2 * pair + 1, rounded to T.
template <typename T>
__device__ __forceinline__ void set_pair(Vec8<T>& v, int pair, float low, float high) {
  if constexpr (sizeof(T) == 4) {
    v.words[2 * pair] = to_bits<T>(low);
    v.words[2 * pair + 1] = to_bits<T>(high);
  } else {
    v.words[pair] = to_bits<T>(low) | to_bits<T>(high) << 16;
  }
}

// destination lies on 16 bytes.
template <typename T>
__device__ __forceinline__ void store8(T* destination, const Vec8<T>& v) {
#pragma unroll
  for (int i = 0; i < Vec8<T>::kWords / 4; ++i) {
    reinterpret_cast<uint4*>(destination)[i] =
        make_uint4(v.words[4 * i], v.words[4 * i + 1], v.words[4 * i + 2], v.words[4 * i + 3]);
  }
}

template <typename T>
__device__ __forceinline__ Vec8<T> zero8() {
  Vec8<T> v;
#pragma unroll
  for (int i = 0; i < Vec8<T>::kWords; ++i) v.words[i] = 0;
  return v;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFU, value, offset);
  }
  return value;
}

// Sum of the values of the threads before this one; *total is that of all. kThreadCount threads
// take part; scratch: one word a warp, reused after the next barrier.
template <int kThreadCount>
__device__ __forceinline__ int exclusive_scan(int value, int* total, int* scratch) {
  constexpr int kWarpCount = kThreadCount / 32;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  int sum = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(0xFFFFFFFFU, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  int before = 0;
  int all = 0;
#pragma unroll
  for (int w = 0; w < kWarpCount; ++w) {
    if (w < warp) before += scratch[w];
    all += scratch[w];
  }
  __syncthreads();
  *total = all;
  return before + sum - value;
}

inline bool on_16_bytes(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace fp8::core
