// Launchers of passes over an MLP's h, which core/mlp/mlp_forward.cu brings together.
#pragma once

#include "core/quantize/kernels.h"
#include "fp8/core_mlp.h"

namespace fp8::core {

void launch_unit_rowwise(const MlpUnitArgs& unit, const RowwiseParams& params, cudaStream_t stream);
void launch_unit_blockwise(const MlpUnitArgs& unit, const BlockwiseParams& params,
                           cudaStream_t stream);

}  // namespace fp8::core
