// Of Hopper's own instructions (hopper.cuh) those that products of few columns take: 8 to 64, where
// the rows are a weight's; and tensor copies that say how long L2 should keep what they read.
#pragma once

#include "core/device/hopper.cuh"

namespace fp8::core::hopper {

constexpr int kProductRows = 64;
constexpr int kProductDepth = 32;

// For all of an access, as createpolicy makes them.
enum class KeepInL2 : uint64_t { kBriefly = 0x12F0000000000000ULL, kLong = 0x14F0000000000000ULL };

// load_box; what lies beyond the matrix is zero, and counts.
__device__ __forceinline__ void load_box(const CUtensorMap* map, uint32_t barrier, uint32_t to,
                                         int column, int row, KeepInL2 keep) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "l"(static_cast<uint64_t>(keep))
      : "memory");
}

#define FP8_ACC4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])

template <>
__device__ __forceinline__ void wgmma<8>(float (&d)[4], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, %4, %5, p, 1, 1;\n}\n"
      : FP8_ACC4(0)
      : "l"(a), "l"(b), "r"(add));
}

template <>
__device__ __forceinline__ void wgmma<16>(float (&d)[8], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1;\n}\n"
      : FP8_ACC4(0), FP8_ACC4(4)
      : "l"(a), "l"(b), "r"(add));
}

template <>
__device__ __forceinline__ void wgmma<32>(float (&d)[16], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "%16, %17, p, 1, 1;\n}\n"
      : FP8_ACC4(0), FP8_ACC4(4), FP8_ACC4(8), FP8_ACC4(12)
      : "l"(a), "l"(b), "r"(add));
}

template <>
__device__ __forceinline__ void wgmma<64>(float (&d)[32], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1;\n}\n"
      : FP8_ACC4(0), FP8_ACC4(4), FP8_ACC4(8), FP8_ACC4(12), FP8_ACC4(16), FP8_ACC4(20),
        FP8_ACC4(24), FP8_ACC4(28)
      : "l"(a), "l"(b), "r"(add));
}

#undef FP8_ACC4

}  // namespace fp8::core::hopper
