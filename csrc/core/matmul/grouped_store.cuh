// How results of a grouped product leave the registers: scaled by rows and columns, in fp32, and
// rounded once. Rows and columns that do not exist are left out.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/device/hopper.cuh"
#include "core/matmul/grouped_params.h"

namespace fp8::core::grouped {

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// 64 x 128 results of a warpgroup, 16 rows a warp.
struct OutBlock {
  int rows;         // that exist, from the warp's first on
  int cols;         // from the first on
  int64_t at;       // element of the warp's first row and the first column
  const float* sb;  // of the columns, in shared memory
  float sa[2];      // of the thread's two rows
};

// By 16 bytes, which rows of 16 lanes write: through shared memory.
template <typename T>
__device__ __forceinline__ void store_16bit(const Params& p, const OutBlock& block,
                                            const float* sums, uint32_t staging) {
  const int lane = threadIdx.x % 32;
  const int row = lane % 8 + lane / 8 % 2 * 8;
#pragma unroll
  for (int j = 0; j < 16; j += 2) {  // eight columns
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 sb = *reinterpret_cast<const float2*>(block.sb + (j + i) * 8 + lane % 4 * 2);
      const float* s = sums + (j + i) * 4;
      v[i * 2] = pack<T>(s[0] * block.sa[0] * sb.x, s[1] * block.sa[0] * sb.y);
      v[i * 2 + 1] = pack<T>(s[2] * block.sa[1] * sb.x, s[3] * block.sa[1] * sb.y);
    }
    const int chunk = (j + lane / 16) ^ (lane % 8);
    hopper::store_matrices(staging + row * 256 + chunk * 16, v[0], v[1], v[2], v[3]);
  }
  __syncwarp();
  T* out = static_cast<T*>(p.out) + block.at;
  const int chunk = lane % 16;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int r = i * 2 + lane / 16;
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(staging + r * 256 + (chunk ^ (r % 8)) * 16)
                 : "memory");
    if (r < block.rows && chunk * 8 < block.cols) {
      // First out of L2: what waits there is operands, which other tiles read too.
      __stcs(reinterpret_cast<uint4*>(out + r * p.ld_out + chunk * 8), v);
    }
  }
  __syncwarp();
}

__device__ __forceinline__ void store_fp32(const Params& p, const OutBlock& block,
                                           const float* sums) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + half * 8;
    if (row >= block.rows) continue;
    float* out = static_cast<float*>(p.out) + block.at + row * p.ld_out + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      if (j * 8 >= block.cols) break;
      const float2 sb = *reinterpret_cast<const float2*>(block.sb + j * 8 + lane % 4 * 2);
      float2 v = make_float2(sums[j * 4 + half * 2] * block.sa[half] * sb.x,
                             sums[j * 4 + half * 2 + 1] * block.sa[half] * sb.y);
      auto* place = reinterpret_cast<float2*>(out + j * 8);
      if (p.add) {
        const float2 old = *place;
        v.x += old.x;
        v.y += old.y;
      }
      *place = v;
    }
  }
}

}  // namespace fp8::core::grouped
