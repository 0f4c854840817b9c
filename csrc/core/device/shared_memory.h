// Dynamic shared memory beyond the 48 KB that every kernel has.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>

#include "core/device/check.h"
#include "core/device/device.h"

namespace fp8::core {

// Bytes of dynamic shared memory that a kernel may have: raised to the most once for each device.
// static_bytes: at least what the kernel declares; as a rule what warps tell each other.
inline size_t shared_memory_of(const void* kernel, std::array<std::atomic<int>, kMaxDevices>& known,
                               int static_bytes = 256) {
  const int device = current_device().index;
  int bytes = known[device].load(std::memory_order_relaxed);
  if (bytes == 0) {
    FP8_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    bytes -= static_bytes;
    FP8_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    FP8_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        cudaSharedmemCarveoutMaxShared));
    known[device].store(bytes, std::memory_order_relaxed);
  }
  return static_cast<size_t>(bytes);
}

}  // namespace fp8::core
