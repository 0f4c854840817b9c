// The tiles of a block of resident.cu, and the ring of slots in shared memory that copies of them
// run ahead in.
//
// L2 drops what was only read before what was written, and is full of what earlier work wrote: a
// second pass over x found next to nothing of it there. Hence the hints: a tile that stays in its
// slot, or is read for the last time, is the first to go from L2, those that come next the last.
//
// A thread reads from shared memory what it copied itself: slots need no barrier.
#pragma once

#include <cuda_pipeline_primitives.h>

#include <type_traits>

#include "quantize/kernels.h"
#include "quantize/tile.cuh"

namespace fp8::core {

constexpr int kSlotBytes = 96 * 1024;  // of a block
constexpr int kKeptTiles = 6;          // of a block, for L2 to keep: 25 MB on 132 multiprocessors

template <typename T>
constexpr int kQuads = Vec8<T>::kWords / 4;  // 16-byte words of eight elements
template <typename T>
constexpr int kTileQuads = kRowsPerThread * kQuads<T>;  // of a thread
template <typename T>
constexpr int kSlots = kSlotBytes / (kTileQuads<T> * 16 * kThreads);

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

// A block's tiles, every gridDim.x-th, and the ring of slots that they go through.
template <typename T>
struct Tiles {
  const CastParams& p;
  uint4* slots;  // the thread's first word of the first slot
  unsigned across;
  int count;
  int row_in_tile = static_cast<int>(threadIdx.x) / kColGroups * kRowsPerThread;
  int col_in_tile = static_cast<int>(threadIdx.x) % kColGroups * 8;

  __device__ __forceinline__ Tiles(const ResidentParams& r, uint4* shared)
      : p(r.cast),
        slots(shared + threadIdx.x),
        across(r.plan.col_tiles),
        count(static_cast<int>((r.plan.tiles - blockIdx.x + gridDim.x - 1) / gridDim.x)) {}

  __device__ __forceinline__ unsigned tile(int i) const {
    return blockIdx.x + static_cast<unsigned>(i) * gridDim.x;
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
};

}  // namespace fp8::core
