// y = x W^T for few rows of x: bound by the bytes of W.
//
// A block owns whole rows of W, a tile of at most 64 at a time. One warp streams them, 256 columns
// a stage, into a ring that takes all of shared memory that is left; it begins before x is looked
// at, and before the launch in front has ended where that is allowed, so what precedes a product
// (the quantization of x, here or in a launch of its own) costs no time of the stream. Four
// warpgroups multiply, each every fourth stage: rows of W are the 64 rows of the instruction,
// tokens its columns, so little is wasted on tokens that are not there.
//
// Order of sums, the same for any number of tokens and any tile: a stage's columns in the tensor
// cores (those of each scale, with blocks), the stages of a warpgroup in turn in fp32, then the
// four. What lies beyond a tile's rows, in the ring, and beyond x's rows, is read and multiplied
// and not used: rows and columns of a product do not meet.
#pragma once

#include "core/device/dispatch.cuh"
#include "core/device/hopper_narrow.cuh"
#include "core/matmul/decode_input.cuh"

namespace fp8::core {

// The ring's barriers: full[s] counts bytes, free[s] the warps of the group that has read it. A
// wait knows a phase by its parity only. So nobody may be a whole turn ahead of a slot: a slot's
// readers are one group within a tile, since the number of stages is a multiple of that of groups,
// and no group begins a tile before all have ended the last one.
struct DecodeRing {
  uint32_t stages;  // addresses
  uint32_t full;
  uint32_t free;

  __device__ __forceinline__ DecodeRing(const DecodePlan& plan, uint32_t shared)
      : stages(shared), full(shared + plan.barriers_offset), free(full + 8 * plan.stages) {}

  __device__ __forceinline__ void init(const DecodePlan& plan) const {
    for (int i = 0; i < plan.stages; ++i) {
      hopper::init_barrier(full + 8 * i, 1);
      hopper::init_barrier(free + 8 * i, 4);
    }
    hopper::fence_barrier_init();
  }
};

// What the copying thread does: stages in order, the weight's part of the first ones before x.
class DecodeProducer {
 public:
  __device__ __forceinline__ DecodeProducer(const DecodeParams& p, const DecodeRing& ring)
      : p_(p),
        ring_(ring),
        per_tile_(static_cast<int>(p.plan.k_boxes) / 2),
        x_part_(p.plan.tile_rows * kDecodeStageCols) {}

  __device__ __forceinline__ void run() {
    const auto mine = static_cast<int>((p_.plan.tiles - blockIdx.x + gridDim.x - 1) / gridDim.x);
    const int total = mine * per_tile_;
    const int ahead = min(total, p_.plan.stages);
    for (int i = 0; i < ahead; ++i) copy_weight(i, i);
    const bool streams = p_.plan.source == DecodeSource::kStreamed;
    if (streams) {
      wait_for_previous();
      for (int i = 0; i < ahead; ++i) copy_x_of_stage(i, i);
    }
    int slot = 0;
    uint32_t parity = 0;
    for (int i = ahead; i < total; ++i) {
      hopper::wait(ring_.free + 8 * slot, parity);
      copy_weight(i, slot);
      if (streams) copy_x_of_stage(i, slot);
      if (++slot == p_.plan.stages) {
        slot = 0;
        parity ^= 1;
      }
    }
  }

 private:
  __device__ __forceinline__ void copy_weight(int i, int slot) const {
    const uint32_t to = ring_.stages + slot * p_.plan.stage_bytes;
    const uint32_t barrier = ring_.full + 8 * slot;
    const auto row = static_cast<int>((blockIdx.x + i / per_tile_ * gridDim.x) * p_.plan.tile_rows);
    const int col = i % per_tile_ * kDecodeStageCols;
    hopper::arrive_expecting(barrier, p_.plan.stage_bytes);
    hopper::load_box(&p_.weight_map, barrier, to, col, row, hopper::KeepInL2::kBriefly);
    hopper::load_box(&p_.weight_map, barrier, to + p_.plan.tile_rows * kDecodeBoxCols,
                     col + kDecodeBoxCols, row, hopper::KeepInL2::kBriefly);
  }
  __device__ __forceinline__ void copy_x_of_stage(int i, int slot) const {
    const uint32_t to = ring_.stages + slot * p_.plan.stage_bytes + x_part_;
    const uint32_t barrier = ring_.full + 8 * slot;
    const int col = i % per_tile_ * kDecodeStageCols;
    hopper::load_box(&p_.x_map, barrier, to, col, 0, hopper::KeepInL2::kLong);
    hopper::load_box(&p_.x_map, barrier, to + p_.plan.tokens * kDecodeBoxCols, col + kDecodeBoxCols,
                     0, hopper::KeepInL2::kLong);
  }
  const DecodeParams& p_;
  const DecodeRing& ring_;
  int per_tile_;  // stages
  int x_part_;
};

__device__ __forceinline__ float loaded_float(const void* values, Dtype dtype, int64_t i) {
  if (dtype == Dtype::kFloat32) return __ldg(static_cast<const float*>(values) + i);
  const uint32_t bits = __ldg(static_cast<const unsigned short*>(values) + i);
  return dtype == Dtype::kBFloat16 ? Vec8<__nv_bfloat16>::bits_to_float(bits)
                                   : Vec8<__half>::bits_to_float(bits);
}

// y of a tile from the groups' sums.
template <bool kBlocks>
__device__ __forceinline__ void finish_tile(const DecodeParams& p, const float* sums,
                                            const float* x_scale, int64_t row0) {
  const int rows = static_cast<int>(min(int64_t{p.plan.tile_rows}, p.n - row0));
  const int pitch = p.plan.sums_pitch;
  for (int i = static_cast<int>(threadIdx.x); i < p.m * rows; i += kDecodeGroups * 128) {
    const int token = i / rows;
    const int row = i % rows;
    float value = sums[token * pitch + row];
#pragma unroll
    for (int group = 1; group < kDecodeGroups; ++group) {
      value += sums[(group * p.plan.tokens + token) * pitch + row];
    }
    const int64_t n = row0 + row;
    if constexpr (!kBlocks) {
      value *= x_scale[token];
      value *= __ldg(p.weight_scale + n * p.weight_scale_row_stride);
    }
    if (p.bias != nullptr) value += loaded_float(p.bias, p.dtype, n);
    store_sum(p.y, p.dtype, token * p.n + n, value);
  }
}

// X: the type of x, or void for codes.
template <int kTokens, bool kBlocks, typename X>
__global__ void __launch_bounds__(kDecodeThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams p) {
  constexpr bool kValues = !std::is_void_v<X>;
  constexpr int kSums = kTokens / 2;  // of 64 rows by kTokens in 128 threads
  constexpr int kUnrolledBoxes = kBlocks && kTokens == 64 ? 1 : 2;  // or registers are short
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = hopper::shared_address(shared);
  const DecodeRing ring(p.plan, base);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) ring.init(p.plan);
  __syncthreads();
  if (warp == kDecodeGroups * 4) {
    if (lane == 0) DecodeProducer(p, ring).run();
    return;
  }

  // What came before is complete now. A launch after this one that starts early relies on it.
  wait_for_previous();
  let_next_start();
  auto* made_scales = reinterpret_cast<float*>(shared + p.plan.scales_offset);
  if constexpr (kValues) {
    auto* amax = reinterpret_cast<uint32_t*>(shared + p.plan.amax_offset);
    DecodeInputRows<X, kBlocks>(p, shared + p.plan.x_offset, made_scales, amax).quantize();
  }
  const float* x_scale = kValues ? made_scales : p.x_scale;
  auto* sums = reinterpret_cast<float*>(shared + p.plan.sums_offset);
  const int group = warp / 4;
  const int first_row = warp % 4 * 16 + lane / 4;  // and the eighth after it
  const int first_token = lane % 4 * 2;            // and the one after it, of each eight
  const int w_box = p.plan.tile_rows * kDecodeBoxCols;
  const int per_tile = static_cast<int>(p.plan.k_boxes) / 2;
  [[maybe_unused]] const int last_box = static_cast<int>((p.k - 1) / kDecodeBoxCols);
  int stage0 = 0;

  for (int64_t tile = blockIdx.x; tile < p.plan.tiles; tile += gridDim.x, stage0 += per_tile) {
    const int64_t row0 = tile * p.plan.tile_rows;
    float total[kSums] = {};
    // Where the scales of the first row lie, and of the eighth after it.
    [[maybe_unused]] int w_scale[2];
    if constexpr (kBlocks) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = min(row0 + first_row + 8 * i, p.n - 1);
        w_scale[i] = static_cast<int>(row / kScaleBlock * p.weight_scale_row_stride);
      }
    }
    for (int in_tile = group; in_tile < per_tile; in_tile += kDecodeGroups) {
      const int stage = stage0 + in_tile;
      const int slot = stage % p.plan.stages;
      const uint32_t at = ring.stages + slot * p.plan.stage_bytes;
      const uint64_t w = hopper::wgmma_operand(at);
      const uint64_t x = hopper::wgmma_operand(kValues ? base + p.plan.x_offset +
                                                             in_tile * 2 * kTokens * kDecodeBoxCols
                                                       : at + 2 * w_box);
      float sum[kSums];
      hopper::wait(ring.full + 8 * slot, stage / p.plan.stages & 1);
#pragma unroll kUnrolledBoxes
      for (int box = 0; box < 2; ++box) {
        if (kBlocks || box == 0) hopper::wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDecodeBoxCols / hopper::kProductDepth; ++k) {
          hopper::wgmma<kTokens>(sum, w + (box * w_box >> 4) + 2 * k,
                                 x + (box * kTokens * kDecodeBoxCols >> 4) + 2 * k,
                                 k > 0 || (!kBlocks && box > 0));
        }
        if constexpr (kBlocks) {
          hopper::wgmma_commit();
          const int k_box = min(in_tile * 2 + box, last_box);
          const int col = k_box * static_cast<int>(p.weight_scale_col_stride);
          const float w0 = __ldg(p.weight_scale + w_scale[0] + col);
          const float w8 = __ldg(p.weight_scale + w_scale[1] + col);
          const float* scales = x_scale + (k_box * kTokens + first_token);
          constexpr bool kAhead = kTokens < 64;  // of the products, where registers are left
          const auto of_x = [&](int j) { return *reinterpret_cast<const float2*>(scales + 8 * j); };
          [[maybe_unused]] float2 ahead[kAhead ? kTokens / 8 : 1];
          if constexpr (kAhead) {
#pragma unroll
            for (int j = 0; j < kTokens / 8; ++j) ahead[j] = of_x(j);
          }
          hopper::wgmma_wait<0>();
          hopper::settle(sum);
          if (box == 1 && lane == 0) hopper::arrive(ring.free + 8 * slot);
#pragma unroll
          for (int j = 0; j < kTokens / 8; ++j) {
            const float2 s = kAhead ? ahead[kAhead ? j : 0] : of_x(j);
            total[4 * j] += sum[4 * j] * (s.x * w0);
            total[4 * j + 1] += sum[4 * j + 1] * (s.y * w0);
            total[4 * j + 2] += sum[4 * j + 2] * (s.x * w8);
            total[4 * j + 3] += sum[4 * j + 3] * (s.y * w8);
          }
        }
      }
      if constexpr (!kBlocks) {
        hopper::wgmma_commit();
        hopper::wgmma_wait<0>();
        hopper::settle(sum);
        if (lane == 0) hopper::arrive(ring.free + 8 * slot);
#pragma unroll
        for (int i = 0; i < kSums; ++i) total[i] += sum[i];
      }
    }

    float* to = sums + (group * kTokens + first_token) * p.plan.sums_pitch + first_row;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      if (first_row < p.plan.tile_rows) {
        to[0] = total[4 * j];
        to[p.plan.sums_pitch] = total[4 * j + 1];
      }
      if (first_row + 8 < p.plan.tile_rows) {
        to[8] = total[4 * j + 2];
        to[p.plan.sums_pitch + 8] = total[4 * j + 3];
      }
      to += 8 * p.plan.sums_pitch;
    }
    sync_groups();
    finish_tile<kBlocks>(p, sums, x_scale, row0);
    sync_groups();
  }
}

}  // namespace fp8::core
