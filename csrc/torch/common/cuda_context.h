// The one place where the torch layer meets CUDA: the current stream, and the choice between a pass
// of the core and the CPU's. It asks LibTorch's interface for any device, so no header and no
// library of CUDA is needed, and one libfp8_torch serves a LibTorch with CUDA and one without.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "fp8/core_device.h"
#include "torch/common/messages.h"

namespace fp8 {

[[noreturn]] inline void throw_no_cuda(const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(false,
                              join("fp8: expected a tensor on the CPU, because this build has no "
                                   "CUDA (no nvcc was found), got one on ",
                                   tensor.device(), ": build again where nvcc is on the PATH"));
}

namespace cuda {
inline core::Stream current_stream(const at::Tensor& tensor) {
  if (!tensor.is_cuda() || !core::has_cuda()) throw_no_cuda(tensor);
  const c10::impl::VirtualGuardImpl cuda(c10::DeviceType::CUDA);
  const c10::Stream stream = cuda.getStream(tensor.device());
  return static_cast<core::Stream>(cuda.getStreamNativeHandle(stream));
}
}  // namespace cuda

}  // namespace fp8

// Runs core::NAME on the current stream of `like`, or cpu::NAME.
#define FP8_RUN_PASS(NAME, like, ...)                                    \
  do {                                                                   \
    if ((like).is_cpu()) {                                               \
      ::fp8::cpu::NAME(__VA_ARGS__);                                     \
    } else {                                                             \
      ::fp8::core::NAME(__VA_ARGS__, ::fp8::cuda::current_stream(like)); \
    }                                                                    \
  } while (false)
