// The one place where the torch layer meets the CUDA runtime: device guard and current stream.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>

#ifdef FP8_WITH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace fp8 {

[[noreturn]] inline void throw_no_cuda(const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "fp8 was built without CUDA (no nvcc was found then), got a tensor on ",
                              tensor.device(), ": rebuild where nvcc is on the PATH");
}

#ifdef FP8_WITH_CUDA
namespace cuda {
inline cudaStream_t current_stream(const at::Tensor& tensor) {
  return c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream();
}
}  // namespace cuda
#endif

}  // namespace fp8
