// Grouped matmuls of rows with scales in blocks, 1x128 for a and 128x128 for b
// (grouped_kernel.cuh).
#include "core/matmul/grouped_launch.cuh"

namespace fp8::core::grouped {

void launch_blocks(const GroupedPlan& plan, const Params& params, cudaStream_t stream) {
  launch_together<Accumulation::kBlocks, false>(plan, params, stream);
}

}  // namespace fp8::core::grouped
