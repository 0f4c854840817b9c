// The one place where the torch layer meets the CUDA runtime: device guard and current stream.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include "common/messages.h"

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
}  // namespace cuda
#endif

}  // namespace fp8
