// What kernels share that read a tensor once where two passes would read it twice: what fits on the
// chip stays there between the two.
//
// Two blocks to a multiprocessor take a tensor's tiles (tile.cuh), each its own, through a ring of
// slots in shared memory that copies run ahead in. The first time they keep maxima alone. After a
// barrier of the whole grid they have the scales and cast, the tiles backwards: those of the last
// slots are still there, those before them partly in L2. So a bf16 tensor of up to 25 MB is read
// from memory once, 2 + 1 (+ 1) bytes an element instead of 4 + 1 (+ 1), a larger one in part.
//
// L2 drops what was only read before what was written, and is full of what earlier work wrote: a
// second pass over x found next to nothing of it there. Hence the hints: a tile that stays in its
// slot, or is read for the last time, is the first to go from L2, those that come next the last.
//
// A thread reads from shared memory what it copied itself: slots need no barrier.
#pragma once

#include <cuda_pipeline_primitives.h>

#include <array>
#include <atomic>
#include <type_traits>

#include "core/device/device.h"
#include "core/device/dispatch.cuh"
#include "core/quantize/kernels.h"
#include "core/quantize/tile.cuh"

namespace fp8::core {

constexpr int kSlotBytes = 96 * 1024;  // of a block
constexpr int kKeptTiles = 6;          // of a block, for L2 to keep: 25 MB on 132 multiprocessors

template <typename T>
constexpr int kTileQuads = kRowsPerThread * kQuads<T>;  // of a thread
template <typename T>
constexpr int kSlots = kSlotBytes / (kTileQuads<T> * 16 * kThreads);
constexpr int kSharedBytes = kSlotBytes + 2 * kTransposedWords * 4;

enum class L2 { kNormal, kFirstToGo, kLastToGo };

// 16 bytes to shared memory, asynchronously; joins the thread's copies of cuda_pipeline. Not where
// only some threads of a warp come by: ptxas 13.0 makes an illegal instruction of a copy with a
// hint and a predicate.
template <L2 kHint>
__device__ __forceinline__ void copy16(uint4* to, const uint4* from) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kHint == L2::kNormal) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  } else {
    uint64_t policy = 0;
    if constexpr (kHint == L2::kFirstToGo) {
      asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    } else {
      asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    }
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(address),
                 "l"(from), "l"(policy)
                 : "memory");
  }
}

// A block's tiles, every step-th from the first on, and the ring of slots that they go through.
template <typename T>
struct Tiles {
  const CastParams& p;
  uint4* slots;  // the thread's first word of the first slot
  unsigned across;
  unsigned first;
  unsigned step;
  int count;
  int row_in_tile = static_cast<int>(threadIdx.x) / kColGroups * kRowsPerThread;
  int col_in_tile = static_cast<int>(threadIdx.x) % kColGroups * 8;

  __device__ __forceinline__ Tiles(const CooperativeParams& r, uint4* shared, unsigned first_tile,
                                   unsigned tile_step, unsigned tiles)
      : p(r.cast),
        slots(shared + threadIdx.x),
        across(r.plan.col_tiles),
        first(first_tile),
        step(tile_step),
        count(static_cast<int>(tiles)) {}

  __device__ __forceinline__ unsigned tile(int i) const {
    return first + static_cast<unsigned>(i) * step;
  }
  __device__ __forceinline__ int64_t row0(int i) const { return tile(i) / across * kTileRows; }
  __device__ __forceinline__ int64_t col0(int i) const { return tile(i) % across * kTileCols; }
  // Of the thread's four rows, from `row` on: how many elements row r has.
  __device__ __forceinline__ int valid(int64_t row, int64_t col, int r) const {
    return row + r < p.rows ? max(of_eight(p.cols - col), 0) : 0;
  }

  // Begins to copy tile i to a slot; zeros beyond the matrix.
  __device__ __forceinline__ void copy(int i, int slot, L2 hint) const {
    uint4* to = slots + slot * kTileQuads<T> * kThreads;
    const int64_t row = row0(i) + row_in_tile;
    const int64_t col = col0(i) + col_in_tile;
    const T* from = static_cast<const T*>(p.x) + row * p.ld + col;
    if (row0(i) + kTileRows > p.rows || col0(i) + kTileCols > p.cols) {
#pragma unroll 1
      for (int r = 0; r < kRowsPerThread; ++r) {
        const int bytes = valid(row, col, r) * static_cast<int>(sizeof(T));
#pragma unroll
        for (int quad = 0; quad < kQuads<T>; ++quad) {
          __pipeline_memcpy_async(to + (r * kQuads<T> + quad) * kThreads,
                                  reinterpret_cast<const uint4*>(from) + quad, 16,
                                  16 - min(max(bytes - 16 * quad, 0), 16));
        }
        from += p.ld;
      }
      return;
    }
    const auto whole = [&](auto hinted) {
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
#pragma unroll
        for (int quad = 0; quad < kQuads<T>; ++quad) {
          copy16<decltype(hinted)::value>(to + (r * kQuads<T> + quad) * kThreads,
                                          reinterpret_cast<const uint4*>(from) + quad);
        }
        from += p.ld;
      }
    };
    if (hint == L2::kFirstToGo) {
      whole(std::integral_constant<L2, L2::kFirstToGo>{});
    } else if (hint == L2::kLastToGo) {
      whole(std::integral_constant<L2, L2::kLastToGo>{});
    } else {
      whole(std::integral_constant<L2, L2::kNormal>{});
    }
  }

  // How tile i is read the first time.
  __device__ __forceinline__ L2 hint(int i) const {
    if (i + kSlots<T> >= count) return L2::kFirstToGo;
    return i + kSlots<T> + kKeptTiles >= count ? L2::kLastToGo : L2::kNormal;
  }

  __device__ __forceinline__ void take(int slot, Vec8<T> (&v)[kRowsPerThread]) const {
    const uint4* from = slots + slot * kTileQuads<T> * kThreads;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
#pragma unroll
      for (int quad = 0; quad < kQuads<T>; ++quad) {
        const uint4 q = from[(r * kQuads<T> + quad) * kThreads];
        v[r].words[4 * quad] = q.x;
        v[r].words[4 * quad + 1] = q.y;
        v[r].words[4 * quad + 2] = q.z;
        v[r].words[4 * quad + 3] = q.w;
      }
    }
  }

  // Every tile in turn, while copies run ahead: visit(i, v, free_slot) has the thread's part of
  // tile i in v, and calls free_slot() when it has read all of v, for the next copy to that slot to
  // begin. Returns the slot that would have come next.
  template <typename Visit>
  __device__ __forceinline__ int first_pass(const Visit& visit) const {
    constexpr int kLast = kSlots<T> - 1;
#pragma unroll 1
    for (int i = 0; i < kSlots<T>; ++i) {
      if (i < count) copy(i, i, hint(i));
      __pipeline_commit();
    }
    int slot = 0;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      __pipeline_wait_prior(kLast);
      Vec8<T> v[kRowsPerThread];
      take(slot, v);
      visit(i, v, [&] {
        const int next = i + kSlots<T>;
        if (next < count) copy(next, slot, hint(next));
        __pipeline_commit();
        slot = slot == kLast ? 0 : slot + 1;
      });
    }
    __pipeline_wait_prior(0);
    return slot;
  }

  // The same backwards, from the tiles that first_pass left in their slots: it returned `slot`.
  template <typename Visit>
  __device__ __forceinline__ void second_pass(int slot, const Visit& visit) const {
    constexpr int kLast = kSlots<T> - 1;
#pragma unroll 1
    for (int i = count - 1; i >= 0; --i) {
      slot = slot == 0 ? kLast : slot - 1;
      __pipeline_wait_prior(kLast);
      Vec8<T> v[kRowsPerThread];
      take(slot, v);
      visit(i, v, [&] {
        if (i > kLast) copy(i - kSlots<T>, slot, L2::kFirstToGo);
        __pipeline_commit();
      });
    }
  }
};

// Whether a multiprocessor holds as many blocks as the plan counts on: asked once for a kernel and
// device. No multiprocessor does that has less shared memory than Hopper's.
inline bool can_be_cooperative(const void* kernel, int device,
                               std::array<std::atomic<int>, kMaxDevices>& known) {
  int answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    int blocks = 0;
    const bool fits = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           kSharedBytes) == cudaSuccess &&
                      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                           cudaSharedmemCarveoutMaxShared) == cudaSuccess &&
                      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads,
                                                                    kSharedBytes) == cudaSuccess;
    if (!fits) cudaGetLastError();  // an answer, not an error
    answer = blocks >= kCooperativeBlocks ? 1 : -1;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer > 0;
}

// launch<T, Format>() for the types of x and of the codes: whether that launched something.
template <typename Launch>
bool launch_of_types(Dtype x_dtype, Dtype dtype, Launch&& launch) {
  bool launched = false;
  dispatch_input(x_dtype, [&](auto input) {
    dispatch_format(dtype, [&](auto format) {
      launched = launch.template
                 operator()<typename decltype(input)::type, typename decltype(format)::type>();
    });
  });
  return launched;
}

// false, and nothing is launched, where the plan's blocks would not all run at once.
template <auto kKernel>
bool launch_if_it_fits(const CooperativeParams& params, int device, cudaStream_t stream) {
  static std::array<std::atomic<int>, kMaxDevices> known{};
  if (!can_be_cooperative(reinterpret_cast<const void*>(kKernel), device, known)) return false;
  return launch_cooperative(kKernel, params.plan.blocks, kThreads, kSharedBytes, stream, params);
}

}  // namespace fp8::core
