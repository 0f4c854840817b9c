// Rows on their way through slots in shared memory, so that loads are in flight while a block
// computes. A thread reads what it copied itself: there is no barrier. Addresses are those of
// shared memory, 32 bits: of pointers the compiler makes them anew for each access.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "core/device/vectors.cuh"

namespace fp8::core {

// Where a thread's first word of the first slot is; `shared` is the block's.
__device__ __forceinline__ uint32_t first_slot(const uint4* shared) {
  auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared + threadIdx.x));
  asm volatile("" : "+r"(address));
  return address;
}

// An eight at `address`, whose words of 16 bytes are `step` bytes apart. From memory on 16 bytes:
// it is there after the caller's commit and wait_for_copies().
template <typename T>
__device__ __forceinline__ void copy_eight(uint32_t address, uint32_t step, const T* source) {
#pragma unroll
  for (int quad = 0; quad < kQuads<T>; ++quad) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address + quad * step),
                 "l"(reinterpret_cast<const uint4*>(source) + quad)
                 : "memory");
  }
}
// Each call reads memory.
template <typename T>
__device__ __forceinline__ Vec8<T> read_eight(uint32_t address, uint32_t step) {
  Vec8<T> v;
#pragma unroll
  for (int quad = 0; quad < kQuads<T>; ++quad) {
    uint32_t* words = v.words + 4 * quad;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address + quad * step));
  }
  return v;
}
template <typename T>
__device__ __forceinline__ void write_eight(uint32_t address, uint32_t step, const Vec8<T>& v) {
#pragma unroll
  for (int quad = 0; quad < kQuads<T>; ++quad) {
    const uint32_t* words = v.words + 4 * quad;
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address + quad * step),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  }
}

// A thread's kVectors eights of a row. Zeros beyond the columns. kThreads: of the block, where that
// is a constant; 0: blockDim.x. slot: the address of the thread's first word of a slot.
template <typename T, int kVectors, int kThreads = 0>
struct NextRows {
  int first_col;
  int stride;  // columns between a thread's eights
  int cols;

  // From slot to slot, in a block of `threads`.
  static __host__ __device__ constexpr uint32_t bytes(uint32_t threads) {
    return sizeof(Vec8<T>) * kVectors * threads;
  }
  static __device__ __forceinline__ uint32_t bytes() { return bytes(width()); }

  // A row on 16 bytes, of whole eights. It is there after the caller's commit and
  // wait_for_copies().
  __device__ __forceinline__ void copy_async(uint32_t slot, const T* row) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (col(i) < cols) copy_eight(word(slot, i), step(), row + col(i));
    }
  }
  // Any other, at once.
  __device__ __forceinline__ void copy_now(uint32_t slot, const T* row, bool vectorized) const {
    Vec8<T> v[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const T* eight = row + col(i);
      // Else the compiler keeps the columns' offsets, of 64 bits each, from row to row.
      asm volatile("" : "+l"(eight));
      v[i] = load8(eight, cols - col(i), vectorized);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) put(slot, i, v[i]);
  }
  __device__ __forceinline__ void put(uint32_t slot, int i, const Vec8<T>& v) const {
    write_eight(word(slot, i), step(), v);
  }
  __device__ __forceinline__ Vec8<T> take(uint32_t slot, int i) const {
    return col(i) < cols ? read(slot, i) : zero8<T>();
  }
  // One that is there.
  __device__ __forceinline__ Vec8<T> read(uint32_t slot, int i) const {
    return read_eight<T>(word(slot, i), step());
  }

 private:
  static __device__ __forceinline__ uint32_t width() {
    return kThreads > 0 ? kThreads : blockDim.x;
  }
  static __device__ __forceinline__ uint32_t step() { return width() * sizeof(uint4); }
  static __device__ __forceinline__ uint32_t word(uint32_t slot, int i) {
    return slot + static_cast<uint32_t>(i * kQuads<T>) * step();
  }
  __device__ __forceinline__ int col(int i) const { return first_col + i * stride; }
};

constexpr int kMaxNextRows = 3;

// Until no more than the `later` last commits are under way.
__device__ __forceinline__ void wait_for_copies(int later) {
  static_assert(kMaxNextRows == 3);
  if (later == 3) return __pipeline_wait_prior(3);
  if (later == 2) return __pipeline_wait_prior(2);
  if (later == 1) return __pipeline_wait_prior(1);
  __pipeline_wait_prior(0);
}

}  // namespace fp8::core
