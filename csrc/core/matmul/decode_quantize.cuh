// The launch before decode_kernel, of more rows than every block should quantize for itself: a
// block for each row of x. The bits of core::quantize. Its time passes while the weight is on its
// way.
#pragma once

#include "core/device/codes.cuh"
#include "core/device/dispatch.cuh"
#include "core/device/reduce.cuh"
#include "core/matmul/decode_params.h"

namespace fp8::core {

constexpr int kDecodeQuantizeThreads = 512;

// A group's scale from its part of x in `v`, or from the row's amax.
template <bool kBlocks, typename T>
__device__ __forceinline__ GroupScale decode_scale(const DecodeParams& p, const Vec8<T>& v,
                                                   uint32_t row_bits) {
  if (p.input_scale != nullptr) {
    const float scale = __ldg(p.input_scale);
    return {__fdiv_rn(1.0F, scale), scale};
  }
  uint32_t bits = row_bits;
  if constexpr (kBlocks) {
    bits = amax_bits(v);
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2) {  // 16 lanes have a block
      bits = max(bits, __shfl_xor_sync(0xFFFFFFFFU, bits, distance));
    }
  }
  return scale_from_amax(bits, E4M3::kMax, p.power_of_two);
}

template <bool kBlocks, typename T>
__global__ void __launch_bounds__(kDecodeQuantizeThreads)
    decode_quantize_kernel(const __grid_constant__ DecodeParams p) {
  constexpr int kStep = kDecodeQuantizeThreads * 8;
  __shared__ uint32_t warp_amax[kDecodeQuantizeThreads / 32];
  // In this order: what follows may read the weight at once, and all that could have written it is
  // complete.
  wait_for_previous();
  let_next_start();
  const int row = static_cast<int>(blockIdx.x);
  const T* x = static_cast<const T*>(p.x) + row * p.ldx;
  const auto load = [&](int col) { return load8(x + col, of_eight(p.k - col), p.vectorized); };
  const int first = static_cast<int>(threadIdx.x) * 8;
  const int cols = static_cast<int>(p.plan.k_boxes) * kDecodeBoxCols;  // of whole warps

  Vec8<T> v = load(first);
  uint32_t bits = 0;
  if (!kBlocks && p.input_scale == nullptr) {
    bits = amax_bits(v);
    for (int col = first + kStep; col < p.k; col += kStep) bits = max(bits, amax_bits(load(col)));
    bits = block_max<kDecodeQuantizeThreads / 32>(bits, warp_amax);
  }
  for (int col = first; col < cols; col += kStep) {
    if (col > first) v = load(col);
    const GroupScale group = decode_scale<kBlocks>(p, v, bits);
    if (kBlocks ? col % kDecodeBoxCols == 0 : col == 0) {
      p.x_scale[(kBlocks ? col / kDecodeBoxCols * p.plan.tokens : 0) + row] = group.scale;
    }
    if (col >= p.ld_codes) continue;
    const uint2 codes = encode8<E4M3>(v, [&](int) { return group.quant_multiplier; });
    *reinterpret_cast<uint2*>(p.x_codes + row * p.ld_codes + col) =
        keep_first(codes, of_eight(p.k - col));
  }
}

}  // namespace fp8::core
