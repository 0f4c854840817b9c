// A grouped product's kernel at compile time: its tile, and where things lie in shared memory. Four
// stages of 48 KiB are all that fits beside what waits to be stored.
#pragma once

#include <cstdint>

#include "core/matmul/grouped_params.h"

namespace fp8::core::grouped {

// What a kernel is compiled for.
template <int kBlocks_, int kN_, bool kPingPong_, Accumulation kAccumulation_, bool kColumns_>
struct Config {
  static constexpr int kBlocks = kBlocks_;  // of 64 rows in a tile
  static constexpr int kN = kN_;
  static constexpr bool kPingPong = kPingPong_;  // a tile to a warpgroup, not to both
  static constexpr Accumulation kAccumulation = kAccumulation_;
  static constexpr bool kColumns = kColumns_;

  static constexpr int kM = kBlocks * 64;
  static constexpr int kOwnBlocks = kPingPong ? kBlocks : kBlocks / 2;  // of a warpgroup
  static constexpr int kBlockBytes = 64 * 128;
  static constexpr int kStageBytes = (kM + kN) * 128;
  static constexpr int kStages = 196608 / kStageBytes;
  // Blocks of out wait here on their way: 16 rows by 128 columns of 16 bits for each warp.
  static constexpr int kStagingBytes = 16 * 256;
  // Zeros in place of eight rows lie first: checkers take them for all rows of an operand.
  static constexpr int kZerosAt = 0;
  static constexpr int kStagesAt = kColumns ? 1024 : 0;
  static constexpr int kStagingAt = kStagesAt + kStages * kStageBytes;
  static constexpr int kScalesAt = kStagingAt + 8 * kStagingBytes;
  static constexpr int kBarriersAt = kScalesAt + 2 * kN * 4;
  static constexpr int kSharedBytes = kBarriersAt + 2 * kStages * 8;
  static_assert(kSharedBytes <= 227 * 1024);
};

inline constexpr int kMmThreads = 384;  // a warpgroup that loads, two that multiply

// Where a warp is in the ring of stages.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ void skip(int steps) {
    const int sum = stage + steps;
    stage = sum % kStages;
    parity ^= sum / kStages & 1;
  }
};

template <typename C>
struct Shared {
  uint32_t base;
  __device__ __forceinline__ uint32_t a(int stage, int block) const {
    return base + C::kStagesAt + stage * C::kStageBytes + block * C::kBlockBytes;
  }
  __device__ __forceinline__ uint32_t b(int stage) const {
    return base + C::kStagesAt + stage * C::kStageBytes + C::kM * 128;
  }
  // Eight rows, which stand for all.
  __device__ __forceinline__ uint64_t zeros() const {
    return hopper::wgmma_operand(base + C::kZerosAt, /*eight_rows=*/0);
  }
  __device__ __forceinline__ uint32_t full(int stage) const {
    return base + C::kBarriersAt + stage * 8;
  }
  __device__ __forceinline__ uint32_t empty(int stage) const {
    return base + C::kBarriersAt + (C::kStages + stage) * 8;
  }
};

}  // namespace fp8::core::grouped
