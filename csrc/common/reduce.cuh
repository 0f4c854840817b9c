// Maxima across a warp and a block of unsigned integers (bits of non-negative floats).
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

}  // namespace fp8::core
