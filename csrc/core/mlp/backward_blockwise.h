// The backward in blocks, for core/mlp/mlp_backward.cu: the tiles of backward_tile.cuh are others.
#pragma once

#include <cuda_runtime_api.h>

#include "fp8/core_mlp.h"

namespace fp8::core {

void launch_backward_blockwise(const MlpBackwardArgs& args, cudaStream_t stream);

}  // namespace fp8::core
