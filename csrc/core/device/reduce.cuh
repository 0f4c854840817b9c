// Maxima across a warp and a block of unsigned integers (bits of non-negative floats), and sums.
#pragma once

#include <cstdint>

namespace fp8::core {

__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xFFFFFFFFU, value);
#else
  for (int offset = 16; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(0xFFFFFFFFU, value, offset));
  }
  return value;
#endif
}

__device__ __forceinline__ uint32_t warp_add(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(0xFFFFFFFFU, value);
#else
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFU, value, offset);
  }
  return value;
#endif
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFU, value, offset);
  }
  return value;
}

// Every thread of the block gets the maximum. scratch: one word a warp; it may be reused after the
// next barrier.
template <int kWarpCount>
__device__ __forceinline__ uint32_t block_max(uint32_t value, uint32_t* scratch) {
  value = warp_max(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  uint32_t result = scratch[0];
#pragma unroll
  for (int i = 1; i < kWarpCount; ++i) result = max(result, scratch[i]);
  return result;
}

// From kRows rows' maxima in a lane to the maximum of one row over the 2 * kRows lanes that share
// them: that of row lane % kRows. Each step halves the rows that a lane looks after, so that eight
// shuffles do the work of 32 where there are eight rows.
template <int kRows>
__device__ __forceinline__ uint32_t max_of_one_row(const uint32_t (&bits)[kRows]) {
  uint32_t left[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) left[i] = bits[i];
#pragma unroll
  for (int distance = 1; distance < kRows; distance *= 2) {
    const bool odd = (threadIdx.x & distance) != 0;
#pragma unroll
    for (int i = 0; i < kRows / 2 / distance; ++i) {
      const uint32_t sent = odd ? left[2 * i] : left[2 * i + 1];
      const uint32_t kept = odd ? left[2 * i + 1] : left[2 * i];
      left[i] = max(kept, __shfl_xor_sync(0xFFFFFFFFU, sent, distance));
    }
  }
  return max(left[0], __shfl_xor_sync(0xFFFFFFFFU, left[0], kRows));
}

}  // namespace fp8::core
