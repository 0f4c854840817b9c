// Rows on their way through slots in shared memory, so that loads are in flight while a block
// computes. A thread reads what it copied itself: there is no barrier.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "core/device/vectors.cuh"

namespace fp8::core {

// A thread's kVectors eights of a row. Zeros beyond the columns. kThreads: of the block, where that
// is a constant; 0: blockDim.x.
template <typename T, int kVectors, int kThreads = 0>
struct NextRows {
  uint4* slots;  // the thread's first word
  int first_col;
  int stride;  // columns between a thread's eights
  int cols;

  // 16-byte words of a slot, in a block of `threads`.
  static __host__ __device__ constexpr int words(int threads) {
    return kVectors * kQuads<T> * threads;
  }

  __device__ __forceinline__ uint4* slot(int index) const { return slots + index * words(width()); }
  // The row lands after the commit and wait_for_copies() that the caller makes.
  __device__ __forceinline__ void copy(int index, const T* row, bool vectorized) const {
    uint4* to = slot(index);
    if (!vectorized) {
      Vec8<T> v[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const T* eight = row + col(i);
        // Else the compiler keeps the columns' offsets, of 64 bits each, from row to row.
        asm volatile("" : "+l"(eight));
        v[i] = load8(eight, cols - col(i), false);
      }
#pragma unroll
      for (int i = 0; i < kVectors; ++i) put(to, i, v[i]);
      return;
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int valid = cols - col(i);
      if (valid >= 8) {
#pragma unroll
        for (int quad = 0; quad < kQuads<T>; ++quad) {
          __pipeline_memcpy_async(word(to, i, quad),
                                  reinterpret_cast<const uint4*>(row + col(i)) + quad, 16);
        }
      } else if (valid > 0) {
        const T* eight = row + col(i);
        asm volatile("" : "+l"(eight));
        put(to, i, load8(eight, valid, false));
      }
    }
  }
  __device__ __forceinline__ void put(uint4* to, int i, const Vec8<T>& v) const {
#pragma unroll
    for (int quad = 0; quad < kQuads<T>; ++quad) {
      *word(to, i, quad) = make_uint4(v.words[4 * quad], v.words[4 * quad + 1],
                                      v.words[4 * quad + 2], v.words[4 * quad + 3]);
    }
  }
  __device__ __forceinline__ Vec8<T> take(int index, int i) const {
    return col(i) < cols ? read(index, i) : zero8<T>();
  }
  // One that is there.
  __device__ __forceinline__ Vec8<T> read(int index, int i) const {
    Vec8<T> v;
#pragma unroll
    for (int quad = 0; quad < kQuads<T>; ++quad) {
      const uint4 q = *word(slot(index), i, quad);
      v.words[4 * quad] = q.x;
      v.words[4 * quad + 1] = q.y;
      v.words[4 * quad + 2] = q.z;
      v.words[4 * quad + 3] = q.w;
    }
    return v;
  }

 private:
  static __device__ __forceinline__ int width() {
    return kThreads > 0 ? kThreads : static_cast<int>(blockDim.x);
  }
  static __device__ __forceinline__ uint4* word(uint4* slot, int i, int quad) {
    return slot + (i * kQuads<T> + quad) * width();
  }
  __device__ __forceinline__ int col(int i) const { return first_col + i * stride; }
};

constexpr int kMaxNextRows = 3;

// Until no more than the `later` last commits are under way.
__device__ __forceinline__ void wait_for_copies(int later) {
  static_assert(kMaxNextRows == 3);
  switch (later) {
    case 0:
      return __pipeline_wait_prior(0);
    case 1:
      return __pipeline_wait_prior(1);
    case 2:
      return __pipeline_wait_prior(2);
    default:
      return __pipeline_wait_prior(3);
  }
}

}  // namespace fp8::core
