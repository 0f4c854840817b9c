// Grouped matmuls of columns, weight gradients (grouped_kernel.cuh).
#include "core/matmul/grouped_launch.cuh"

namespace fp8::core::grouped {

void launch_columns(const GroupedPlan& plan, const Params& params, cudaStream_t stream) {
  if (plan.accumulation == Accumulation::kFast) {
    launch_together<Accumulation::kFast, true>(plan, params, stream);
  } else {
    launch_together<Accumulation::kSplit, true>(plan, params, stream);
  }
}

}  // namespace fp8::core::grouped
