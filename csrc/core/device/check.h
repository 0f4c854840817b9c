// Errors of the torch-free layer: throwing and no-throw checks for CUDA, and messages without a
// stream.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "fp8/core.h"

namespace fp8::core {

[[noreturn]] inline void throw_cuda_error(cudaError_t status, const char* call, const char* file,
                                          int line) {
  throw Error(std::string("fp8: ") + call + " failed with " + cudaGetErrorName(status) + " (" +
              cudaGetErrorString(status) + ") at " + file + ":" + std::to_string(line));
}

inline void require(bool condition, const char* message) {
  if (!condition) throw Error(std::string("fp8: ") + message);
}

inline bool on_16_bytes(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace fp8::core

#define FP8_CUDA_CHECK(call)                                                \
  do {                                                                      \
    const cudaError_t fp8_status = (call);                                  \
    if (fp8_status != cudaSuccess) {                                        \
      ::fp8::core::throw_cuda_error(fp8_status, #call, __FILE__, __LINE__); \
    }                                                                       \
  } while (false)
