// Which eights the fast form of a sigmoid may compute.
#pragma once

#include "core/device/vectors.cuh"
#include "host/gate.h"

namespace fp8::core {

// Whether all eight are kLeastFast at least; NaN as it comes.
template <typename T>
__device__ __forceinline__ bool none_below_fast(const Vec8<T>& x) {
  if constexpr (sizeof(T) == 4) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < 8; ++i) all = all && !(x.get(i) < kLeastFast);
    return all;
  } else {  // negative ones are greater the lower they are, as unsigned integers
    constexpr uint32_t kLeast = std::is_same_v<T, __half> ? 0xD570U : 0xC2AEU;
    const uint32_t words = __vmaxu2(__vmaxu2(x.words[0], x.words[1]),  //
                                    __vmaxu2(x.words[2], x.words[3]));
    return max(words >> 16, words & 0xFFFFU) <= kLeast;
  }
}

}  // namespace fp8::core
