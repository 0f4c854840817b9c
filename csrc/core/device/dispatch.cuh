// From run-time types to template arguments, and the ways in which this library launches a kernel.
#pragma once

#include <utility>

#include "core/device/check.h"
#include "core/device/vectors.cuh"

namespace fp8::core {

template <typename T>
struct Type {
  using type = T;
};

template <typename F>
void dispatch_input(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(Type<float>{});
    case Dtype::kBFloat16:
      return f(Type<__nv_bfloat16>{});
    case Dtype::kFloat16:
      return f(Type<__half>{});
    default:
      throw Error(std::string("fp8: expected float32, bfloat16 or float16, got ") +
                  dtype_name(dtype));
  }
}

template <typename F>
void dispatch_format(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kE4M3:
      return f(Type<E4M3>{});
    case Dtype::kE5M2:
      return f(Type<E5M2>{});
    default:
      throw Error(std::string("fp8: expected float8_e4m3fn or float8_e5m2, got ") +
                  dtype_name(dtype));
  }
}

// How a launch differs from an ordinary one.
struct LaunchOptions {
  dim3 cluster{1, 1, 1};
  // Programmatic dependent launch: the grid may start while the one before it in the stream drains.
  // The kernel must call wait_for_previous() before it reads what that one wrote, and before it
  // writes anything; every thread must.
  bool pdl = false;
  size_t shared_bytes = 0;  // dynamic; more than 48 KiB: SharedMemory
};

template <typename Kernel, typename Params>
void launch(Kernel kernel, dim3 grid, dim3 block, cudaStream_t stream, const Params& params,
            const LaunchOptions& options = {}) {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = options.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (options.cluster.x * options.cluster.y > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {options.cluster.x, options.cluster.y, 1};
  }
  if (options.pdl) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  FP8_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params));
}

// A grid whose blocks all run at a time and may wait for each other. False, and nothing launched,
// where they do not all fit: this process may have a part of the GPU only.
template <typename Kernel, typename Params>
bool launch_cooperative(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes,
                        cudaStream_t stream, const Params& params) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, params);
  if (status == cudaErrorCooperativeLaunchTooLarge) {
    cudaGetLastError();  // an answer, not an error
    return false;
  }
  FP8_CUDA_CHECK(status);
  return true;
}

// The two ends of a programmatic dependent launch; without it, and before sm_90, they do nothing.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace fp8::core
