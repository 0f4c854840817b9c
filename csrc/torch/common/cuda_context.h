// The one place where the torch layer meets the CUDA runtime: device guard and current stream, and
// the choice between a pass of the core and the CPU's.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include "torch/common/messages.h"

#ifdef FP8_WITH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace fp8 {

[[noreturn]] inline void throw_no_cuda(const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(false,
                              join("fp8: expected a tensor on the CPU, because this build has no "
                                   "CUDA (no nvcc was found), got one on ",
                                   tensor.device(), ": build again where nvcc is on the PATH"));
}

#ifdef FP8_WITH_CUDA
namespace cuda {
inline cudaStream_t current_stream(const at::Tensor& tensor) {
  return c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream();
}

// Identifies the CUDA graph capture that the stream is in; 0 when it is in none.
inline uint64_t capture_id(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &id);
  TORCH_CHECK(error == cudaSuccess,
              "fp8: cudaStreamGetCaptureInfo failed: ", cudaGetErrorName(error));
  return status == cudaStreamCaptureStatusNone ? 0 : id + 1;
}
}  // namespace cuda
#endif

}  // namespace fp8

// Runs core::NAME on the current stream of `like`, or cpu::NAME.
#ifdef FP8_WITH_CUDA
#define FP8_RUN_PASS(NAME, like, ...)                                    \
  do {                                                                   \
    if ((like).is_cpu()) {                                               \
      ::fp8::cpu::NAME(__VA_ARGS__);                                     \
    } else {                                                             \
      ::fp8::core::NAME(__VA_ARGS__, ::fp8::cuda::current_stream(like)); \
    }                                                                    \
  } while (false)
#else
#define FP8_RUN_PASS(NAME, like, ...)                 \
  do {                                                \
    if (!(like).is_cpu()) ::fp8::throw_no_cuda(like); \
    ::fp8::cpu::NAME(__VA_ARGS__);                    \
  } while (false)
#endif
