// From run-time types to template arguments, and the one way in which this library launches a
// kernel.
#pragma once

#include <utility>

#include "common/check.h"
#include "common/vectors.cuh"

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

template <typename Kernel, typename Params>
void launch(Kernel kernel, dim3 grid, dim3 block, cudaStream_t stream, const Params& params) {
  kernel<<<grid, block, 0, stream>>>(params);
  FP8_CUDA_CHECK(cudaGetLastError());
}

// The same with thread block clusters; a cluster of one block is an ordinary launch.
template <typename Kernel, typename Params>
void launch_cluster(Kernel kernel, dim3 grid, dim3 block, dim3 cluster, cudaStream_t stream,
                    const Params& params) {
  if (cluster.x * cluster.y == 1) return launch(kernel, grid, block, stream, params);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster.x, cluster.y, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  FP8_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace fp8::core
