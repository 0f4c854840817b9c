// Blocks of a matrix in several tensors: the kernel of blockwise.cuh.
#include "core/quantize/blockwise.cuh"
#include "core/quantize/joined.cuh"
#include "core/quantize/joined_launchers.h"

namespace fp8::core {

void launch_joined_blockwise(const JoinedArgs& args, const BlockwiseParams& params,
                             cudaStream_t stream) {
  with_joined_source(args, [&](auto source) {
    launch_blockwise_of<E4M3, decltype(source)::kBlocks>(source, params, stream);
  });
}

}  // namespace fp8::core
