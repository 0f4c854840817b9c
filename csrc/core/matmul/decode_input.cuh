// Rows of x as the matrix instructions read them from shared memory, quantized by every block for
// itself: worth it for few rows, whose launch would cost more. The bits of core::quantize.
//
// A warp takes 256 columns of a row at a time, eight a lane, and keeps four such parts in
// registers. Where those are not all, a second pass reads them again, from L2.
#pragma once

#include "core/device/codes.cuh"
#include "core/device/hopper.cuh"
#include "core/device/reduce.cuh"
#include "core/matmul/decode_params.h"

namespace fp8::core {

// Among the warps that multiply; the one that copies goes on.
__device__ __forceinline__ void sync_groups() { hopper::sync_threads<kDecodeGroups * 128>(1); }

template <typename T, bool kBlocks>
class DecodeInputRows {
 public:
  // codes: [k_boxes] boxes of kTokens rows. scales: [kTokens], or with blocks [k_boxes][kTokens].
  // amax: [kTokens].
  __device__ __forceinline__ DecodeInputRows(const DecodeParams& p, uint8_t* codes, float* scales,
                                             uint32_t* amax)
      : p_(p),
        codes_(codes),
        scales_(scales),
        amax_(amax),
        parts_per_row_(static_cast<int>((p.k + kPartCols - 1) / kPartCols)),
        parts_(p.m * parts_per_row_),
        shift_(static_cast<int>(static_cast<int64_t>(blockIdx.x) * parts_ / gridDim.x)) {}

  // By all warps that multiply.
  __device__ __forceinline__ void quantize() {
    if (kBlocks || p_.input_scale != nullptr) {
      for (int first = warp(); first < parts_; first += kStep) {
        load(first);
        cast(first);
      }
    } else {
      for (int row = static_cast<int>(threadIdx.x); row < p_.m; row += kDecodeGroups * 128) {
        amax_[row] = 0;
      }
      sync_groups();
      for (int first = warp(); first < parts_; first += kStep) {
        load(first);
        find_amax(first);
      }
      sync_groups();
      for (int first = warp(); first < parts_; first += kStep) {
        if (parts_ > kStep) load(first);
        cast(first);
      }
    }
    hopper::fence_shared();
    sync_groups();
  }

 private:
  static constexpr int kPartCols = 256;
  static constexpr int kParts = 4;  // that a warp keeps
  static constexpr int kWarpCount = kDecodeGroups * 4;
  static constexpr int kStep = kWarpCount * kParts;

  __device__ __forceinline__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  // Each block begins elsewhere, so that they do not all ask one slice of L2 at a time.
  __device__ __forceinline__ int shifted(int part) const {
    return part + shift_ < parts_ ? part + shift_ : part + shift_ - parts_;
  }
  __device__ __forceinline__ int row_of(int part) const { return shifted(part) / parts_per_row_; }
  __device__ __forceinline__ int col_of(int part) const {
    return shifted(part) % parts_per_row_ * kPartCols + lane() * 8;
  }

  __device__ __forceinline__ void load(int first) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int part = first + i * kWarpCount;
      v_[i] = zero8<T>();
      if (part >= parts_) continue;
      const int col = col_of(part);
      v_[i] = load8(static_cast<const T*>(p_.x) + row_of(part) * p_.ldx + col, of_eight(p_.k - col),
                    p_.vectorized);
    }
  }

  __device__ __forceinline__ void find_amax(int first) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int part = first + i * kWarpCount;
      if (part >= parts_) continue;
      const uint32_t bits = warp_max(amax_bits(v_[i]));
      if (lane() == 0) atomicMax(amax_ + row_of(part), bits);
    }
  }

  __device__ __forceinline__ GroupScale scale_of(int part, int i) const {
    if (p_.input_scale != nullptr) {
      const float scale = __ldg(p_.input_scale);
      return {__fdiv_rn(1.0F, scale), scale};
    }
    uint32_t bits = 0;
    if constexpr (kBlocks) {
      bits = amax_bits(v_[i]);
#pragma unroll
      for (int distance = 8; distance > 0; distance /= 2) {  // 16 lanes have a block
        bits = max(bits, __shfl_xor_sync(0xFFFFFFFFU, bits, distance));
      }
    } else {
      bits = amax_[row_of(part)];
    }
    return scale_from_amax(bits, E4M3::kMax, p_.power_of_two);
  }

  __device__ __forceinline__ void cast(int first) {
    forget_unpacked(v_);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int part = first + i * kWarpCount;
      if (part >= parts_) continue;
      const GroupScale group = scale_of(part, i);
      const int row = row_of(part);
      const int col = col_of(part);
      const int box = col / kDecodeBoxCols;
      const uint2 codes = encode8<E4M3>(v_[i], [&](int) { return group.quant_multiplier; });
      const int in_box = col % kDecodeBoxCols;
      const int word = in_box / 16 ^ row % 8;
      uint8_t* to = codes_ + (box * p_.plan.tokens + row) * kDecodeBoxCols;
      *reinterpret_cast<uint2*>(to + word * 16 + in_box % 16) =
          keep_first(codes, of_eight(p_.k - col));
      if (kBlocks ? in_box == 0 : col == 0) {
        scales_[(kBlocks ? box * p_.plan.tokens : 0) + row] = group.scale;
      }
    }
  }

  const DecodeParams& p_;
  uint8_t* codes_;
  float* scales_;
  uint32_t* amax_;
  int parts_per_row_;
  int parts_;
  int shift_;
  Vec8<T> v_[kParts];
};

}  // namespace fp8::core
