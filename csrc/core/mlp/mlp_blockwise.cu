// An MLP's h in FP8 with a scale for each 128 elements of a row, in one pass: the kernel of
// blockwise.cuh. Bound by bandwidth: 4 + 1 bytes an element (bf16).
#include "core/mlp/forward_launchers.h"
#include "core/mlp/unit.cuh"
#include "core/quantize/blockwise.cuh"

namespace fp8::core {

void launch_unit_blockwise(const MlpUnitArgs& unit, const BlockwiseParams& params,
                           cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(params.plan.col_tiles * params.plan.row_tiles);
  with_unit_source(unit, [&](auto source) {
    using Source = decltype(source);
    launch(blockwise_kernel<Source, E4M3, Granularity::kBlock1x128, true, false>, grid, kThreads,
           stream, From<Source, BlockwiseParams>{source, params});
  });
}

}  // namespace fp8::core
