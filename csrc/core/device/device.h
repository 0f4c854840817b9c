// Properties of the current device, read once per device: no query on the way of a call.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>

#include "core/device/check.h"

namespace fp8::core {

struct DeviceInfo {
  int index = 0;
  int sm_count = 0;
  int capability = 0;  // 90 for compute capability 9.0
};

inline constexpr int kMaxDevices = 64;

// index: of the current device, or -1 to ask for it.
inline DeviceInfo current_device(int index = -1) {
  // 0: not read yet; else capability << 16 | sm_count. Reading twice in a race gives the same
  // value.
  static std::array<std::atomic<int>, kMaxDevices> known{};
  if (index < 0) FP8_CUDA_CHECK(cudaGetDevice(&index));
  require(index < kMaxDevices, "more CUDA devices than this library counts");
  int packed = known[index].load(std::memory_order_relaxed);
  if (packed == 0) {
    int major = 0;
    int minor = 0;
    int sm_count = 0;
    FP8_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    FP8_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
    FP8_CUDA_CHECK(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, index));
    packed = (major * 10 + minor) << 16 | sm_count;
    known[index].store(packed, std::memory_order_relaxed);
  }
  return {index, packed & 0xFFFF, packed >> 16};
}

#ifdef FP8_OLDEST_CUDA_ARCH  // within fp8_core
// Clusters and programmatic dependent launches. Code for an older architecture, which a newer GPU
// may run through PTX, has neither in it.
inline bool has_hopper_launches(const DeviceInfo& device) {
  return FP8_OLDEST_CUDA_ARCH >= 90 && device.capability >= 90;
}
#endif

}  // namespace fp8::core
