// fp8/core_device.h with CUDA; time_matmuls is in core/matmul/lt_timing.cpp.
#include "core/device/device.h"

#include "fp8/core_device.h"

namespace fp8::core {

bool has_cuda() { return true; }

int compute_capability(int device) { return current_device(device).capability; }

std::string current_device_name() {
  cudaDeviceProp properties{};
  FP8_CUDA_CHECK(cudaGetDeviceProperties(&properties, current_device().index));
  return properties.name;
}

size_t l2_bytes() {
  int bytes = 0;
  FP8_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, current_device().index));
  return static_cast<size_t>(bytes);
}

uint64_t capture_id(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  FP8_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &id));
  return status == cudaStreamCaptureStatusNone ? 0 : id + 1;
}

}  // namespace fp8::core
