// Eight floats rounded to a dtype, and stores of fewer than eight.
#pragma once

#include "core/device/vectors.cuh"

namespace fp8::core {

// The first `valid` of eight.
template <typename T>
__device__ __forceinline__ void store_first(T* destination, const Vec8<T>& v, int valid,
                                            bool vectorized) {
  if (vectorized && valid >= 8) return store8(destination, v);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i >= valid) continue;
    if constexpr (sizeof(T) == 4) {
      reinterpret_cast<uint32_t*>(destination)[i] = v.words[i];
    } else {
      reinterpret_cast<unsigned short*>(destination)[i] =
          static_cast<unsigned short>((i & 1) != 0 ? v.words[i / 2] >> 16 : v.words[i / 2]);
    }
  }
}

// Eight floats, rounded to T.
template <typename T>
__device__ __forceinline__ Vec8<T> rounded8(const float (&values)[8]) {
  Vec8<T> v;
#pragma unroll
  for (int j = 0; j < 4; ++j) set_pair(v, j, values[2 * j], values[2 * j + 1]);
  return v;
}

template <typename T>
__device__ __forceinline__ void round8(float (&values)[8]) {
  if constexpr (sizeof(T) == 4) return;
  const Vec8<T> v = rounded8<T>(values);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = v.get(i);
}

}  // namespace fp8::core
