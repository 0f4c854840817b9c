// Grouped matmuls of rows: one scale, or a scale for each row (grouped_kernel.cuh).
#include "core/matmul/grouped_launch.cuh"

namespace fp8::core::grouped {

void launch_rows(const GroupedPlan& plan, const Params& params, cudaStream_t stream) {
  if (plan.accumulation == Accumulation::kFast) {
    launch_tiles<Accumulation::kFast, false>(plan, params, stream);
  } else {
    launch_tiles<Accumulation::kSplit, false>(plan, params, stream);
  }
}

}  // namespace fp8::core::grouped
