// Grouped matmuls of rows: one scale, or a scale for each row (grouped_kernel.cuh).
#include "core/matmul/grouped_launch.cuh"

namespace fp8::core::grouped {

void launch_rows(const GroupedPlan& plan, const Params& params, cudaStream_t stream) {
  if (plan.in_turn) {
    launch_config<Config<2, 128, true, Accumulation::kFast, false>>(plan, params, stream);
  } else if (plan.accumulation == Accumulation::kFast) {
    launch_together<Accumulation::kFast, false>(plan, params, stream);
  } else {
    launch_together<Accumulation::kSplit, false>(plan, params, stream);
  }
}

}  // namespace fp8::core::grouped
