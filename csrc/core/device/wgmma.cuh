// Hopper's matrix instructions for e4m3: 128 threads multiply 64 rows by kCols columns over 32
// elements of k, both read from shared memory, with fp32 accumulators in registers. They exist in
// code for sm_90a alone; elsewhere these functions do nothing, and no kernel that calls them is
// launched.
//
// In shared memory a row is 128 bytes of k, rows follow each other, and the eight 16-byte words of
// a row lie in the order of the copy engine's 128-byte swizzle: word w of row r at w ^ (r % 8).
// Such a box begins on 1024 bytes. The accumulators of row 16 * warp + lane / 4 (+ 8) and column 8
// * j + lane % 4 * 2 (+ 1) are d[4 * j + 2 * (+ 8) + (+ 1)], warp counted within the 128 threads.
#pragma once

#include <cstdint>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FP8_WGMMA(...) asm volatile(__VA_ARGS__)
#else
#define FP8_WGMMA(...)
#endif

namespace fp8::core {

constexpr int kSwizzleBytes = 128;  // a row of a box
constexpr int kMmaRows = 64;
constexpr int kMmaDepth = 32;

// Of a box of rows: the descriptor that the instructions take. Adding 2 steps by kMmaDepth.
__device__ __forceinline__ uint64_t box_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{8 * kSwizzleBytes >> 4} << 32;
  return (address & 0x3FFFFU) >> 4 | uint64_t{1} << 16 | kEightRows | kSwizzle128;
}

// Before the first instruction whose accumulators other instructions wrote.
__device__ __forceinline__ void mma_fence() { FP8_WGMMA("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() {
  FP8_WGMMA("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all but the last kPending groups are done.
template <int kPending>
__device__ __forceinline__ void mma_wait() {
  FP8_WGMMA("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define FP8_FOUR(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])

// d = a b, or d += a b.
template <int kCols>
__device__ __forceinline__ void mma(float (&d)[kCols / 2], uint64_t a, uint64_t b, bool add) {
  static_assert(kCols == 8 || kCols == 16 || kCols == 32 || kCols == 64);
  [[maybe_unused]] const int adds = add ? 1 : 0;
  if constexpr (kCols == 8) {
    FP8_WGMMA(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, %4, %5, p, 1, 1;\n}"
        : FP8_FOUR(0)
        : "l"(a), "l"(b), "r"(adds));
  } else if constexpr (kCols == 16) {
    FP8_WGMMA(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1;\n}"
        : FP8_FOUR(0), FP8_FOUR(4)
        : "l"(a), "l"(b), "r"(adds));
  } else if constexpr (kCols == 32) {
    FP8_WGMMA(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "%16, %17, p, 1, 1;\n}"
        : FP8_FOUR(0), FP8_FOUR(4), FP8_FOUR(8), FP8_FOUR(12)
        : "l"(a), "l"(b), "r"(adds));
  } else {
    FP8_WGMMA(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1;\n}"
        : FP8_FOUR(0), FP8_FOUR(4), FP8_FOUR(8), FP8_FOUR(12), FP8_FOUR(16), FP8_FOUR(20),
          FP8_FOUR(24), FP8_FOUR(28)
        : "l"(a), "l"(b), "r"(adds));
  }
}

#undef FP8_FOUR

}  // namespace fp8::core
