// Hopper's copy engine: barriers in shared memory that count arrivals and bytes, and copies of
// boxes of a matrix that complete on them. Addresses are those of shared memory.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace fp8::core {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes what init_barrier wrote known to the copy engine.
__device__ __forceinline__ void barriers_are_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Until the phase of this parity is over.
__device__ __forceinline__ void wait_for(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// How long a line should stay in L2: what createpolicy gives for all of an access.
enum class KeepInL2 : uint64_t { kBriefly = 0x12F0000000000000ULL, kLong = 0x14F0000000000000ULL };

// The map's box from column `col` of row `row`; what lies beyond the matrix is zero, and counts.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap& map, int col, int row,
                                         uint32_t barrier, KeepInL2 keep) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(col), "r"(row), "r"(barrier), "l"(static_cast<uint64_t>(keep))
      : "memory");
}

// After ordinary stores to shared memory that the copy engine or the tensor cores will read; before
// the barrier of threads.
__device__ __forceinline__ void publish_to_async_readers() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace fp8::core
