// Eight elements at a time: 16-byte loads of bf16, fp16 or fp32, their magnitudes as integers, and
// their conversion to eight FP8 codes. Arrays are indexed by constants only, so that they stay in
// registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "host/formats.h"

namespace fp8::core {

// kWords 32-bit words hold 8 elements.
template <typename T>
struct Vec8 {
  static constexpr int kWords = 8 * sizeof(T) / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ float get(int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i]);
    } else {
      const uint32_t half = (i & 1) != 0 ? words[i / 2] >> 16 : words[i / 2] & 0xFFFFU;
      return bits_to_float(half);
    }
  }

  static __device__ __forceinline__ float bits_to_float(uint32_t bits) {
    if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(bits);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return __uint_as_float(bits << 16);
    } else {
      return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    }
  }
};

template <typename T>
constexpr int kQuads = Vec8<T>::kWords / 4;  // 16-byte words of eight elements

// Of `count` elements that may be negative or many, how many of the next eight are there; for load8
// and keep_first, which take what is below 0 as 0 and above 8 as 8.
__device__ __forceinline__ int of_eight(int64_t count) {
  return static_cast<int>(min(count, int64_t{8}));
}

// Loads the first `valid` of the eight elements at `source`; the others are zero. `vectorized` says
// that the source lies on a 16-byte boundary.
template <typename T>
__device__ __forceinline__ Vec8<T> load8(const T* source, int valid, bool vectorized) {
  Vec8<T> v;
  if (vectorized && valid >= 8) {
#pragma unroll
    for (int i = 0; i < Vec8<T>::kWords / 4; ++i) {
      const uint4 q = __ldg(reinterpret_cast<const uint4*>(source) + i);
      v.words[4 * i] = q.x;
      v.words[4 * i + 1] = q.y;
      v.words[4 * i + 2] = q.z;
      v.words[4 * i + 3] = q.w;
    }
    return v;
  }
#pragma unroll
  for (int i = 0; i < Vec8<T>::kWords; ++i) v.words[i] = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < valid) {
      if constexpr (sizeof(T) == 4) {
        v.words[i] = __ldg(reinterpret_cast<const uint32_t*>(source) + i);
      } else {
        const uint32_t bits = __ldg(reinterpret_cast<const unsigned short*>(source) + i);
        v.words[i / 2] |= bits << (16 * (i & 1));
      }
    }
  }
  return v;
}

// Elements 2 * pair and 2 * pair + 1, rounded to T.
template <typename T>
__device__ __forceinline__ void set_pair(Vec8<T>& v, int pair, float low, float high) {
  if constexpr (sizeof(T) == 4) {
    v.words[2 * pair] = __float_as_uint(low);
    v.words[2 * pair + 1] = __float_as_uint(high);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    v.words[pair] = *reinterpret_cast<const uint32_t*>(&both);
  } else {
    const __half2 both = __floats2half2_rn(low, high);
    v.words[pair] = *reinterpret_cast<const uint32_t*>(&both);
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

// Inf, of either sign, becomes NaN.
template <typename T>
__device__ __forceinline__ void infinite_to_nan(Vec8<T>& v) {
#pragma unroll
  for (int i = 0; i < Vec8<T>::kWords; ++i) {
    if constexpr (sizeof(T) == 4) {
      if ((v.words[i] & 0x7FFFFFFFU) == kExponentBits) v.words[i] |= 1;
    } else {
      constexpr uint32_t kInf = std::is_same_v<T, __half> ? 0x7C007C00U : 0x7F807F80U;
      v.words[i] |= __vcmpeq2(v.words[i] & 0x7FFF7FFFU, kInf) & 0x00010001U;
    }
  }
}

// The largest finite |x| as the bits of a float.
template <typename T>
__device__ __forceinline__ uint32_t finite_amax_bits(const Vec8<T>& v) {
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t bits = __float_as_uint(v.get(i)) & 0x7FFFFFFFU;
    if (bits < kExponentBits) amax = max(amax, bits);
  }
  return amax;
}

// Without it the compiler keeps what it has unpacked of v for the next use, in registers that are
// not there.
template <typename T, int kCount>
__device__ __forceinline__ void forget_unpacked(Vec8<T> (&v)[kCount]) {
#pragma unroll
  for (int r = 0; r < kCount; ++r) {
#pragma unroll
    for (int i = 0; i < Vec8<T>::kWords; ++i) asm volatile("" : "+r"(v[r].words[i]));
  }
}

// Magnitudes of a Vec8, kept packed: as bit patterns of |x| they order like the values, NaN above
// all.
template <typename T>
struct PackedAmax {
  uint32_t words[Vec8<T>::kWords];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Vec8<T>::kWords; ++i) words[i] = 0;
  }
  __device__ __forceinline__ void update(const Vec8<T>& v) {
#pragma unroll
    for (int i = 0; i < Vec8<T>::kWords; ++i) {
      if constexpr (sizeof(T) == 4) {
        words[i] = max(words[i], v.words[i] & 0x7FFFFFFFU);
      } else {
        words[i] = __vmaxu2(words[i], v.words[i] & 0x7FFF7FFFU);
      }
    }
  }
  // a word that changes, as a rule, with any of the eight
  __device__ __forceinline__ uint32_t fold() const {
    uint32_t h = 0;
#pragma unroll
    for (int i = 0; i < Vec8<T>::kWords; ++i) h = h * 0x01000193U + words[i];
    return h;
  }
  // |x| of element i as the bits of a float
  __device__ __forceinline__ uint32_t float_bits(int i) const {
    if constexpr (sizeof(T) == 4) {
      return words[i];
    } else {
      const uint32_t half = (i & 1) != 0 ? words[i / 2] >> 16 : words[i / 2] & 0xFFFFU;
      return __float_as_uint(Vec8<T>::bits_to_float(half));
    }
  }
  // the largest of the eight
  __device__ __forceinline__ uint32_t max_float_bits() const {
    uint32_t m = words[0];
#pragma unroll
    for (int i = 1; i < Vec8<T>::kWords; ++i) {
      m = sizeof(T) == 4 ? max(m, words[i]) : __vmaxu2(m, words[i]);
    }
    if constexpr (sizeof(T) == 4) {
      return m;
    } else {
      return __float_as_uint(Vec8<T>::bits_to_float(max(m >> 16, m & 0xFFFFU)));
    }
  }
};

template <typename T>
__device__ __forceinline__ uint32_t amax_bits(const Vec8<T>& v) {
  PackedAmax<T> amax;
  amax.clear();
  amax.update(v);
  return amax.max_float_bits();
}

// Two values to two codes, the first in the low byte. One cvt.rn.satfinite on sm_89 and later.
template <typename Format>
__device__ __forceinline__ uint32_t encode2(float low, float high) {
  constexpr auto kInterpretation = std::is_same_v<Format, E4M3> ? __NV_E4M3 : __NV_E5M2;
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, kInterpretation);
}

// The scale of a scaling group from its amax, as host/formats.h has it: quant_multiplier there.
struct GroupScale {
  float quant_multiplier;
  float scale;
};

__device__ __forceinline__ GroupScale scale_from_amax(uint32_t bits, float format_max,
                                                      bool power_of_two = false) {
  float multiplier = __fdiv_rn(format_max, __uint_as_float(bits));
  if (bits == 0) multiplier = 1.0F;
  if (multiplier > 3.402823466e+38F) multiplier = 3.402823466e+38F;
  // Not where the group holds a NaN: without its mantissa it would be Inf.
  if (power_of_two && bits <= kExponentBits) {
    multiplier = __uint_as_float(__float_as_uint(multiplier) & kExponentBits);
  }
  return {multiplier, __fdiv_rn(1.0F, multiplier)};
}

// Zeroes the codes from `valid` on; codes hold eight bytes.
__device__ __forceinline__ uint2 keep_first(uint2 codes, int valid) {
  if (valid >= 8) return codes;
  const uint64_t mask = valid <= 0 ? 0 : (uint64_t{1} << (8 * valid)) - 1;
  return make_uint2(codes.x & static_cast<uint32_t>(mask),
                    codes.y & static_cast<uint32_t>(mask >> 32));
}

}  // namespace fp8::core
