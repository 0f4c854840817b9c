// An MLP's h in FP8 with a scale for each row, in one pass: the frame of computed_row.cuh. Bound by
// bandwidth: 4 + 1 bytes an element (bf16).
#include "core/mlp/forward_launchers.h"
#include "core/mlp/unit.cuh"
#include "core/quantize/computed_row.cuh"
#include "core/quantize/padded_rows.cuh"

namespace fp8::core {
namespace {

constexpr int kMaxVectors = 8;  // of eight features a thread, before a row has more threads
constexpr int kBlockThreads = 128;

template <typename Source>
struct UnitRows {
  MlpUnitArgs unit;
  RowwisePlan plan;
  Destination data;
  float* scale;
  bool power_of_two;

  __host__ __device__ Source source() const { return {unit}; }
  __host__ __device__ PaddedRows sink() const { return {data, scale}; }
};

}  // namespace

void launch_unit_rowwise(const MlpUnitArgs& unit, const RowwiseParams& params,
                         cudaStream_t stream) {
  const RowwisePlan plan = plan_rowwise(params.data.ld, kBlockThreads, kMaxVectors);
  with_unit_source(unit, [&](auto source) {
    using Source = decltype(source);
    constexpr int kMinBlocks = Source::kMinBlocks > 3 ? 2 : 1;  // of 512 threads
    launch_computed_rows<E4M3, kMinBlocks>(
        UnitRows<Source>{unit, plan, params.data, params.scale, params.power_of_two},
        params.data.rows, stream);
  });
}

}  // namespace fp8::core
