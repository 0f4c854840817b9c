// What the kernels that cast tiles share: eight codes from eight elements, bytes transposed within
// registers, column sums on their way out.
#pragma once

#include "core/device/vectors.cuh"

namespace fp8::core {

// out[j] = byte j of rows a, b, c, d, for the four bytes of a word
__device__ __forceinline__ void transpose_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d,
                                                uint32_t* out) {
  const uint32_t ab01 = __byte_perm(a, b, 0x5140);
  const uint32_t cd01 = __byte_perm(c, d, 0x5140);
  const uint32_t ab23 = __byte_perm(a, b, 0x7362);
  const uint32_t cd23 = __byte_perm(c, d, 0x7362);
  out[0] = __byte_perm(ab01, cd01, 0x5410);
  out[1] = __byte_perm(ab01, cd01, 0x7632);
  out[2] = __byte_perm(ab23, cd23, 0x5410);
  out[3] = __byte_perm(ab23, cd23, 0x7632);
}

// multiplier(j): that of element j
template <typename Format, typename T, typename Multiplier>
__device__ __forceinline__ uint2 encode8(const Vec8<T>& v, const Multiplier& multiplier) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] =
        encode2<Format>(v.get(2 * i) * multiplier(2 * i), v.get(2 * i + 1) * multiplier(2 * i + 1));
  }
  return make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
}

__device__ __forceinline__ void store_sum(void* out, Dtype dtype, int64_t i, float value) {
  if (dtype == Dtype::kFloat32) {
    static_cast<float*>(out)[i] = value;
  } else if (dtype == Dtype::kBFloat16) {
    static_cast<__nv_bfloat16*>(out)[i] = __float2bfloat16_rn(value);
  } else {
    static_cast<__half*>(out)[i] = __float2half_rn(value);
  }
}

}  // namespace fp8::core
