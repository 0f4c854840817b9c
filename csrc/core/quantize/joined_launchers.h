// The passes of core::quantize over a matrix in several tensors.
#pragma once

#include "core/quantize/kernels.h"
#include "fp8/core_joined.h"

namespace fp8::core {

void launch_joined_statistics(const JoinedArgs& args, const StatisticsParams& params,
                              cudaStream_t stream);
void launch_joined_cast(const JoinedArgs& args, const CastParams& params, cudaStream_t stream);
void launch_joined_settle(const JoinedArgs& args, const CastParams& params, unsigned blocks,
                          cudaStream_t stream);
void launch_joined_rowwise(const JoinedArgs& args, const RowwiseParams& params,
                           cudaStream_t stream);
void launch_joined_blockwise(const JoinedArgs& args, const BlockwiseParams& params,
                             cudaStream_t stream);

}  // namespace fp8::core
